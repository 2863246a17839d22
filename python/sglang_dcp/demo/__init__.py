"""A demonstration that runs anywhere: tiny models, live CPU servers, exact comparison."""

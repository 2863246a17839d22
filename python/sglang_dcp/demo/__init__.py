"""A demonstration that runs anywhere: tiny models on CPU servers, compared exactly."""

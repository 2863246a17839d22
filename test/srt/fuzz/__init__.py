"""Random mixes of requests against live servers, and a soak. See `__main__`."""

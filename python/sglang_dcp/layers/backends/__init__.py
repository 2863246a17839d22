"""Inner attention backends, one file for each. They return their output with its LSE."""

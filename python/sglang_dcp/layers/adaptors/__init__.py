"""One file per inner attention backend: what it computes, with its LSE."""

"""Attention over a sequence-sharded KV cache: index math, local view, merge, adaptors."""

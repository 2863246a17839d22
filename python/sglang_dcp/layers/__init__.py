"""Attention over a sequence-sharded KV cache: local batch, KV pool, heads and backends."""

"""Helix parallelism for SGLang: sequence-sharded attention, tensor-parallel FFN."""

__version__ = "0.1.0"

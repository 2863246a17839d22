"""Kernels and index math. Each kernel has its torch version beside it."""

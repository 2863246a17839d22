"""Stands in for a module of FlashMLA: all its functions raise."""

from flash_mla import __getattr__  # noqa: F401

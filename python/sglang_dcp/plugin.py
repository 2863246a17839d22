"""The entry point of the group `sglang.srt.plugins`, which SGLang loads."""

from sglang_dcp.hooks.install import load

__all__ = ["load"]

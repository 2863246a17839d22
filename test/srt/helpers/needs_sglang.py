"""The mark of tests that only a later release of SGLang can run."""

from __future__ import annotations

import pytest

from sglang_dcp.releases.installed import in_range, sglang_version


def needs_sglang(since: str, reason: str) -> pytest.MarkDecorator:
    """Skip, with `reason`, on releases before `since`."""
    return pytest.mark.skipif(
        not in_range(sglang_version(), since, None), reason=reason
    )

"""`python -m sglang_dcp compare`: what changed for this package between two releases.

It reads source and metadata alone, and imports neither torch nor SGLang.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

from sglang_dcp.hooks.compare.report import print_report
from sglang_dcp.hooks.compare.tree import CompareError, open_tree


def compare(
    old: Path,
    new: Path,
    old_version: Optional[str] = None,
    new_version: Optional[str] = None,
) -> int:
    """Print what changed, and return the exit status.

    It is 1 if a target of the old release is gone, moved or called otherwise, or if SGLang
    now has what a hook adds. It is 2 for wrong input, else 0.
    """
    try:
        return print_report(open_tree(old, old_version), open_tree(new, new_version))
    except CompareError as error:
        print(f"sglang-dcp: error: {error}", file=sys.stderr)
        return 2

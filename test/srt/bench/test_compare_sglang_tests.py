"""The comparison of SGLang's own tests: a test that only one form fails must be named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers import compare_sglang_tests, patch_trees
from sglang_dcp.patch import cli

# Imports no SGLang: it is about the runs and their reports.
FORMS_DIFFER = """
import pathlib, unittest
from importlib.util import find_spec
SOURCE = pathlib.Path(find_spec("sglang").origin).parent / "srt" / "server_args.py"
class TestForms(unittest.TestCase):
    def test_other(self):
        self.assertNotIn("sglang_dcp.hooks.inline", SOURCE.read_text().split())
    def test_same(self):
        self.assertTrue(SOURCE.exists())
    def test_fails_alike(self):
        raise ValueError(f"{SOURCE} at {id(self):#x}")
"""


def test_other_outcome_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_forms.py"
    file.write_text(FORMS_DIFFER)
    pristine = patch_trees.linked_copy(tmp_path / "pristine")
    patched = patch_trees.linked_copy(tmp_path / "patched")
    assert cli.main(["apply", "--target", str(patched)]) == 0
    capsys.readouterr()
    forms = {
        "pristine": compare_sglang_tests.Form(pristine.parent),
        "patched": compare_sglang_tests.Form(patched.parent),
    }
    [line] = compare_sglang_tests.compare(file, forms, tmp_path)
    assert line.startswith("patched: test_forms.TestForms::test_other: passed -> fail")
    counts = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert counts[1:] == [
        ["pristine", "1 failure, 2 passed"],
        ["patched", "2 failure, 1 passed"],
    ]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))

"""SGLang's own unit tests on a pristine and on a patched SGLang, outcome by outcome.

    PYTHONPATH=test/srt .venv/bin/python -m helpers.compare_sglang_tests FOLDER

FOLDER holds test files of SGLang's repository, which its wheel does not ship; they must
fit the installed release. Each file runs in a process of its own on links into the
installed SGLang: unpatched, patched with its plugins switched off, and unpatched with our
plugin loaded. A test that cannot pass here has to fail with the same words.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from helpers import patch_trees
from helpers.gloo_ranks import python_path, run_python
from sglang_dcp.patch import cli

# Loads the plugin if asked to, runs pytest, and leaves the names of SGLang's modules.
RUN = """
import json, sys
import pytest
plugin, loaded, *arguments = sys.argv[1:]
if plugin == "plugin":
    from sglang.srt.plugins import load_plugins
    load_plugins()
code = pytest.main(arguments)
with open(loaded, "w") as file:
    json.dump([name for name in sys.modules if name.startswith("sglang.")], file)
sys.exit(code)
"""
VARIABLE = re.compile(r"0x[0-9a-f]+|(?<=\bline )\d+|/\S+/")

Outcomes = dict[str, str]


class Form(NamedTuple):
    """One way to run a file: on which tree, and with which plugins."""

    tree: Path
    plugin: bool = False


def make_forms(folder: Path) -> dict[str, Form]:
    """The three forms, `pristine` first."""
    pristine = patch_trees.linked_copy(folder / "pristine").parent
    patched = patch_trees.linked_copy(folder / "patched").parent
    if cli.main(["apply", "--target", str(patched / "sglang")]):
        raise SystemExit(2)
    return {
        "pristine": Form(pristine),
        "patched": Form(patched),
        "plugin": Form(pristine, plugin=True),
    }


def run_file(file: Path, form: Form, folder: Path) -> tuple[Outcomes, set[str]]:
    """Outcome by test, and the SGLang modules that the run imported."""
    report, loaded = folder / "report.xml", folder / "loaded.json"
    done = run_python(
        *("-c", RUN, "plugin" if form.plugin else "none", str(loaded), str(file)),
        *("-q", "-p", "no:cacheprovider", "--rootdir", str(file.parent)),
        f"--junitxml={report}",
        timeout_s=600,
        PYTHONPATH=python_path(form.tree),
        SGLANG_PLUGINS="sglang_dcp" if form.plugin else "none",
        HF_HUB_OFFLINE="1",
    )
    if not (report.exists() and loaded.exists()):
        raise SystemExit(f"{file}: no report\n{done.stdout}\n{done.stderr[-4000:]}")
    outcomes = read_report(report)
    modules = set(json.loads(loaded.read_text()))
    report.unlink()
    loaded.unlink()
    return outcomes, modules


def read_report(report: Path) -> Outcomes:
    """`passed`, or what else and the first line of why, by test."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        said = [f"{e.tag}: {e.get('message', '')}" for e in case if e.get("message")]
        name = f"{case.get('classname')}::{case.get('name')}"
        # Addresses, line numbers and folders are other ones in another process or tree.
        outcomes[name] = VARIABLE.sub("*", said[0].split("\n")[0]) if said else "passed"
    return outcomes


def count(outcomes: Outcomes) -> str:
    """Like `31 passed, 2 failure`."""
    counts = Counter(said.split(":")[0] for said in outcomes.values())
    return ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))


def differences(before: Outcomes, after: Outcomes) -> list[str]:
    """One line for each test whose outcome is another one."""
    return [
        f"{name}: {before.get(name, 'not run')} -> {after.get(name, 'not run')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def compare(file: Path, forms: dict[str, Form], folder: Path) -> list[str]:
    """Run one file in all forms and print what came out; returns what differs."""
    touched = {
        "sglang." + name.removesuffix(".py").replace("/", ".")
        for name in patch_trees.series().files
    }
    lines: list[str] = []
    before: Outcomes | None = None
    for name, form in forms.items():
        outcomes, modules = run_file(file, form, folder)
        if before is None:
            before = outcomes
            imported = sorted(module[11:] for module in modules & touched)
            print(f"{file.name}: imports {len(imported)} patched files")
        lines += [f"{name}: {line}" for line in differences(before, outcomes)]
        print(f"  {name:9} {count(outcomes)}", flush=True)
    return lines


def main(folder: str) -> int:
    """0 if every test has one outcome in all forms."""
    files = sorted(Path(folder).resolve().rglob("test_*.py"))
    if not files:
        raise SystemExit(f"{folder} holds no test_*.py")
    with tempfile.TemporaryDirectory(prefix="sglang-dcp-") as name:
        forms = make_forms(Path(name))
        lines = [s for file in files for s in compare(file, forms, Path(name))]
    print("\n".join(lines) if lines else "all the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

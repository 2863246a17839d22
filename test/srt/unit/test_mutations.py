"""The patches of the mutation check still fit the code and name tests that exist.

No mutated test runs here: `test/mutations/run.py` does that. Only this file sees, in the
ordinary suite, a patch that a change of the code has left behind.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]


def load_runner() -> ModuleType:
    """Import `run.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location(
        "mutation_runner", REPOSITORY / "test/mutations/run.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run = load_runner()
MUTATIONS = [run.read_mutation(name) for name in run.names()]
each_mutation = pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS]
)


@each_mutation
def test_it_applies_to_the_tree(mutation: Any) -> None:
    for path, text in run.mutated(mutation).items():
        assert text != (REPOSITORY / path).read_text()
        ast.parse(text)


@each_mutation
def test_the_header_names_tests_that_exist(mutation: Any) -> None:
    assert mutation.why.endswith(".")
    for line in mutation.caught_by:
        path, _, test = run.arguments_of(line)[0].partition("::")
        tree = ast.parse((REPOSITORY / path).read_text())
        known = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert test.partition("[")[0] in known if test else " -k " in line


def prose_lines(text: str) -> Iterator[int]:
    """Yield the indices of the lines of docstrings and comments in Python code."""
    for number, line in enumerate(text.split("\n")):
        if line.lstrip().startswith("#"):
            yield number
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield from range(value.lineno - 1, value.end_lineno or value.lineno)


@each_mutation
def test_it_holds_on_to_code_alone(mutation: Any) -> None:
    """Words may change. One line of context on each side is enough."""
    for hunk in mutation.hunks:
        assert hunk.path.endswith(".py")
        text = (REPOSITORY / hunk.path).read_text()
        start = run.place_of(hunk, text.split("\n"))
        assert not set(range(start, start + len(hunk.old))) & set(prose_lines(text))
        assert hunk.context <= 2


PATCH = """Why: It is wrong.
Caught-by: test/a.py::test_a

--- a/a.py
+++ b/a.py
@@ -2,2 +2,2 @@
 b = 1
-c = 1
+c = 2
"""


def test_old_lines_fit_at_one_place_only(tmp_path: Path) -> None:
    mutation = run.parse("m", PATCH)
    file = tmp_path / "a.py"
    file.write_text("x = 1\nx = 1\nb = 1\nc = 1\nd = 1\n")
    assert run.mutated(mutation, tmp_path) == {
        "a.py": "x = 1\nx = 1\nb = 1\nc = 2\nd = 1\n"
    }
    for other in ("", "b = 1\nc = 1 \n", "b = 1\n\nc = 1\n", 2 * "b = 1\nc = 1\n"):
        file.write_text(other)
        with pytest.raises(run.DoesNotApply, match=f"{2 * (len(other) > 20)} places"):
            run.mutated(mutation, tmp_path)
    file.unlink()
    with pytest.raises(run.DoesNotApply, match="there is no a.py"):
        run.mutated(mutation, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param("Why: ", "What: ", "header line 'What", id="field"),
        pytest.param("Caught-by: test/a.py::test_a", "", "one Caught-by", id="no-test"),
        pytest.param("\nCaught", "\nWhy: No.\nCaught", "one Why", id="two-reasons"),
        pytest.param("--- a/a.py\n", "", "no diff", id="no-diff"),
        pytest.param("+c = 2\n", "", "cut at 'end'", id="cut"),
        pytest.param("+c = 2", "+c = 1", "changes nothing", id="no-change"),
        pytest.param("-2,2", "-2,1", "miscounts", id="miscount"),
        pytest.param("+c = 2\n", "+c = 2\n more\n", "diff line ' more'", id="too-long"),
    ],
)
def test_a_malformed_patch_is_named(old: str, new: str, fault: str) -> None:
    with pytest.raises(run.BadPatch, match=f"^m: .*{fault}"):
        run.parse("m", PATCH.replace(old, new, 1))


@pytest.mark.parametrize(
    ("outcome", "result", "reason"),
    [
        pytest.param((1, 3, 1, ""), "caught", "", id="failed"),
        pytest.param((0, 3, 0, ""), "SURVIVED", "", id="passed"),
        pytest.param((0, 0, 0, ""), "tests did not run", "all were sk", id="skipped"),
        pytest.param((2, 0, 1, "E\nbad\n"), "tests did not run", "bad", id="import"),
        pytest.param((4, 0, 0, ""), "tests did not run", "no output", id="no-test"),
        pytest.param((None, 1, 0, ""), "tests did not run", "no end", id="hangs"),
    ],
)
def test_only_a_failed_test_counts(
    outcome: tuple[Any, ...], result: str, reason: str
) -> None:
    found, why = run.judge(run.Outcome(*outcome))
    assert found == result and reason in why and bool(reason) == bool(why)


def test_a_caught_by_line_is_pytests_arguments() -> None:
    assert run.arguments_of("a.py::test_b[x y]") == ["a.py::test_b[x y]"]
    assert run.arguments_of('a.py -k "b and c"') == ["a.py", "-k", "b and c"]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))

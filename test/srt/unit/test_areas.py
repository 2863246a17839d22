"""The order of the package's areas: none imports one above it, also not inside a function.

Only this file sees an import cycle between areas, which imports inside functions hide at run
time, and a command line that needs torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sglang_dcp
from helpers.gloo_ranks import run_python

PACKAGE = Path(sglang_dcp.__file__).parent
NAME = "sglang_dcp"

# From the ground up. Areas of one floor do not import each other; an area may import any
# below it. An area is the longest prefix that is named here.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("", "releases", "ops", "demo"),
    ("patch",),
    ("distributed.topology", "distributed.nodes"),
    ("config",),
    ("context",),
    ("distributed.all_to_all", "distributed.groups"),
    ("distributed.all_to_all_peers",),
    ("distributed.exchange.fallbacks",),
    ("distributed.exchange.base", "distributed.exchange.symm_a2a.nvrtc"),
    ("distributed.exchange",),
    ("layers.backends",),
    ("layers.local_batch_types",),
    ("layers.prefix",),
    ("layers.mla",),
    ("layers",),
    ("support",),
    ("hooks",),
    ("plugin", "__main__"),
)
# The areas of the tree itself, in the order that a reader is told.
TREE = ("ops", "distributed", "layers", "support", "hooks")


def modules() -> dict[str, Path]:
    """Every module of the package but its empty parents, by name below the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """What a file imports of the package, anywhere in it, for type checkers too."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix(f"{NAME}.") in known else base for n in names]
        else:
            continue
        for name in names:
            if name == NAME or name.startswith(f"{NAME}."):
                yield name.removeprefix(NAME).removeprefix(".")


def floor_of(module: str) -> int:
    """Of the longest prefix that `FLOORS` names."""
    areas = {area: i for i, floor in enumerate(FLOORS) for area in floor}
    while module not in areas:
        parent = module.rpartition(".")[0]
        assert parent, f"{module} is in no area"
        module = parent
    return areas[module]


def area_of(module: str) -> str:
    areas = {area for floor in FLOORS for area in floor}
    while module not in areas:
        module = module.rpartition(".")[0]
    return module


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_import_goes_up(name: str) -> None:
    for target in imported(modules()[name]):
        same = area_of(target) == area_of(name)
        assert same or floor_of(target) < floor_of(name), f"{name} imports {target}"


def edges_between(areas: tuple[str, ...]) -> set[tuple[str, str]]:
    found = set()
    for name, path in modules().items():
        for target in imported(path):
            pair = name.partition(".")[0], target.partition(".")[0]
            if pair[0] != pair[1] and set(pair) <= set(areas):
                found.add(pair)
    return found


def test_the_areas_of_the_tree_have_one_order() -> None:
    order = {area: place for place, area in enumerate(TREE)}
    edges = edges_between(TREE)
    assert {(a, b) for a, b in edges if order[a] <= order[b]} == set()
    # Else the walk above would have seen nothing.
    assert ("hooks", "support") in edges and ("layers", "ops") in edges


def test_ops_import_nothing_else_of_the_package() -> None:
    for name, path in modules().items():
        if name.startswith("ops."):
            assert all(target.startswith("ops") for target in imported(path)), name


def test_the_top_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 5


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["sglang"] = None
from sglang_dcp import config, context
from sglang_dcp.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(["--version"], 0, sglang_dcp.__version__, id="version"),
        pytest.param(["--help"], 0, "status", id="help"),
        pytest.param(["patch", "--help"], 0, "revert", id="patch-help"),
        pytest.param(["patch", "apply", "--help"], 0, "--target DIR", id="apply-help"),
        pytest.param(["patch", "lint"], 0, "2 series, 0 faults", id="lint"),
        pytest.param(["no-such"], 2, "invalid choice: 'no-such'", id="error"),
    ],
)
def test_the_command_line_needs_no_torch(
    arguments: list[str], code: int, said: str
) -> None:
    done = run_python("-c", WITHOUT_TORCH, *arguments, timeout_s=30)
    assert done.code == code, done.stderr
    assert said in done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))

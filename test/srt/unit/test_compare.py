"""`python -m sglang_dcp compare` on made-up releases, and on the installed one.

Only this file sees a wrong verdict: a maintainer would trust it, and move a hook to a new
release that means something else there.
"""

from __future__ import annotations

import re
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.gloo_ranks import run_python
from sglang_dcp.__main__ import main
from sglang_dcp.hooks.compare.metadata import pins, server_arguments
from sglang_dcp.hooks.compare.report import argument_lines, hook_lines, pin_lines
from sglang_dcp.hooks.compare.tree import CompareError, SourceTree, open_tree
from sglang_dcp.hooks.compare.verdicts import (
    Finding,
    Verdict,
    compare_file,
    compare_target,
)
from sglang_dcp.hooks.table import Hook, Kind

Files = dict[str, str]


def metadata(version: str, *requires: str) -> str:
    lines = [f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    return "\n".join(["Metadata-Version: 2.4", "Name: sglang", *lines, "", "Read me"])


def write_folder(site: Path, files: Files, about: str = metadata("1.0")) -> Path:
    """Write a site-packages folder with a package of these files."""
    for name, text in {"srt/__init__.py": "", **files}.items():
        path = site / "sglang" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if about:
        info = site / "sglang-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(about)
    return site


def write_wheel(path: Path, files: Files, about: str = metadata("1.0")) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {"srt/__init__.py": "", **files}.items():
            wheel.writestr(f"sglang/{name}", text)
        wheel.writestr("sglang-1.0.dist-info/METADATA", about)
    return path


@pytest.fixture(params=["folder", "wheel"])
def trees(request: pytest.FixtureRequest, tmp_path: Path) -> "Trees":
    return Trees(tmp_path, request.param)


class Trees:
    """Makes an old and a new release from files, in the form that the test asks for."""

    def __init__(self, folder: Path, form: str) -> None:
        self.folder, self.form = folder, form

    def make(self, name: str, files: Files, about: str) -> SourceTree:
        if self.form == "wheel":
            return open_tree(write_wheel(self.folder / f"{name}.whl", files, about))
        return open_tree(write_folder(self.folder / name, files, about))

    def pair(self, old: Files, new: Files) -> tuple[SourceTree, SourceTree]:
        return (
            self.make("old", old, metadata("1.0")),
            self.make("new", new, metadata("1.1")),
        )


def of_file(text: str) -> Files:
    return {"srt/a.py": text}


FUNCTION = "def f(x, y=1):\n    return x\n"
CLASS = "class C:\n    size: int = 1\n    def m(self):\n        return 1\n"
DECORATED = """
BACKENDS = {}
def register_backend(name):
    return lambda found: BACKENDS.setdefault(name, found)
@register_backend("one")
def one(runner):
    return 1
"""
CALLED = """
class R:
    _handlers = {}
def one(x):
    return helper(x)
def helper(x):
    return x
R.register("one", one)
"""
IMPORTED = {
    "srt/a.py": "from sglang.srt.b import f as g",
    "srt/b.py": FUNCTION,
}
RELATIVE = {"srt/a.py": "from .b import f as g", "srt/b.py": FUNCTION}
F, M = "sglang.srt.a.f", "sglang.srt.a.C.m"
ONE, TWO = "sglang.srt.a.BACKENDS[one]", "sglang.srt.a.BACKENDS[two]"
HANDLER = "sglang.srt.a.R._handlers[one]"
MOVED_F = "to srt/b.py:f"

VERDICTS = [
    (F, of_file(FUNCTION), of_file(f"# moved down\n{FUNCTION}"), Verdict.UNCHANGED, ""),
    (F, of_file(FUNCTION), of_file("def f(x: int, y=1): return x"), Verdict.BODY, ""),
    (
        F,
        of_file(FUNCTION),
        of_file("def f(x, *, z, y=1): return x"),
        Verdict.SIGNATURE,
        "(x, y=1) -> (x, *, z, y=1)",
    ),
    (
        F,
        of_file(FUNCTION),
        of_file("async def f(x, y=1): return x"),
        Verdict.SIGNATURE,
        "(x, y=1) -> async (x, y=1)",
    ),
    (
        F,
        of_file(FUNCTION),
        of_file("f = None"),
        Verdict.SIGNATURE,
        "(x, y=1) -> a value",
    ),
    (F, of_file(FUNCTION), of_file(""), Verdict.GONE, ""),
    (F, of_file(FUNCTION), {"srt/b.py": FUNCTION}, Verdict.MOVED, MOVED_F),
    # Copies elsewhere, and functions that were there before, are other functions.
    (F, of_file(FUNCTION), {"test/b.py": FUNCTION}, Verdict.GONE, ""),
    (
        F,
        {"srt/a.py": FUNCTION, "srt/b.py": FUNCTION},
        {"srt/b.py": FUNCTION},
        Verdict.GONE,
        "",
    ),
    (
        F,
        of_file(FUNCTION),
        {"srt/b.py": FUNCTION, "srt/c.py": "class D:\n    def f(self): ..."},
        Verdict.GONE,
        "the name is new in srt/b.py:f, srt/c.py:D.f",
    ),
    # Both branches count.
    (
        F,
        of_file("if 1:\n    def f(): return 1\nelse:\n    def f(): return 2"),
        of_file("if 1:\n    def f(): return 1\nelse:\n    def f(): return 3"),
        Verdict.BODY,
        "",
    ),
    (M, of_file(CLASS), of_file(CLASS.replace("1", "2")), Verdict.BODY, ""),
    (
        M,
        of_file(CLASS),
        of_file(CLASS.replace("    def m", "    @staticmethod\n    def m")),
        Verdict.SIGNATURE,
        "(self) -> @staticmethod (self)",
    ),
    # A class moves with its method; a base class gives the method to the class.
    (M, of_file(CLASS), {"srt/b.py": CLASS}, Verdict.MOVED, "to srt/b.py:C.m"),
    (
        M,
        of_file(CLASS),
        {
            "srt/a.py": "from sglang.srt.b import B\nclass C(B): pass",
            "srt/b.py": CLASS.replace("C", "B"),
        },
        Verdict.UNCHANGED,
        "srt/b.py defines it now",
    ),
    (M, of_file(CLASS), of_file("class C(C): pass"), Verdict.GONE, ""),
    (
        "sglang.srt.a.C",
        of_file(CLASS),
        of_file(f"@dataclass\n{CLASS}"),
        Verdict.SIGNATURE,
        "class() -> @dataclass class()",
    ),
    ("sglang.srt.a.C.size", of_file(CLASS), of_file(CLASS), Verdict.UNCHANGED, ""),
    (
        "sglang.srt.a.C.size",
        of_file(CLASS),
        of_file(CLASS.replace("= 1", "= 2")),
        Verdict.BODY,
        "",
    ),
    ("sglang.srt.a.C.new", of_file(CLASS), of_file(CLASS), Verdict.ABSENT, ""),
    (
        "sglang.srt.a.C.new",
        of_file(CLASS),
        of_file(f"{CLASS}    def new(self): pass"),
        Verdict.ADDED,
        "",
    ),
    (
        "sglang.srt.a.flag",
        of_file("flag, other = g(), 1"),
        of_file("flag = h()"),
        Verdict.BODY,
        "",
    ),
    # An unchanged value may call what changed.
    (
        "sglang.srt.a.flag",
        of_file("flag = g()\ndef g(): return 1"),
        of_file("flag = g()\ndef g(): return 2"),
        Verdict.UNCHANGED,
        "but not g, which it calls",
    ),
    # Names that an import brings.
    ("sglang.srt.a.g", IMPORTED, RELATIVE, Verdict.UNCHANGED, ""),
    (
        "sglang.srt.a.g",
        IMPORTED,
        {**IMPORTED, "srt/b.py": "def f(x, y=1): return y"},
        Verdict.BODY,
        "",
    ),
    (
        "sglang.srt.a.g",
        IMPORTED,
        {"srt/a.py": "from sglang.srt.c import f as g", "srt/c.py": FUNCTION},
        Verdict.UNCHANGED,
        "srt/c.py defines it now",
    ),
    (
        F,
        {"srt/a.py": "from .b import f", "srt/b.py": FUNCTION},
        {"srt/a.py": "", "srt/b.py": FUNCTION},
        Verdict.MOVED,
        MOVED_F,
    ),
    # Not SGLang's, though SGLang has a module of that name.
    (
        F,
        {"srt/a.py": "from srt.b import f", "srt/b.py": "def f(): return 1"},
        {"srt/a.py": "from srt.b import f", "srt/b.py": "def f(): return 2"},
        Verdict.UNCHANGED,
        "",
    ),
    # Entries of registries.
    (ONE, of_file(DECORATED), of_file(DECORATED), Verdict.UNCHANGED, ""),
    (
        ONE,
        of_file(DECORATED),
        of_file(DECORATED.replace("return 1", "return 2")),
        Verdict.BODY,
        "",
    ),
    (
        ONE,
        of_file(DECORATED),
        of_file(DECORATED.replace("one(runner)", "one(runner, dtype)")),
        Verdict.SIGNATURE,
        "(runner) -> (runner, dtype)",
    ),
    (
        ONE,
        of_file(DECORATED),
        of_file(DECORATED.replace('"one"', '"uno"')),
        Verdict.GONE,
        "srt/a.py does not register it",
    ),
    (
        ONE,
        of_file(DECORATED),
        of_file("BACKENDS = {'one': one}\ndef one(runner): ..."),
        Verdict.BODY,
        "",
    ),
    (
        ONE,
        of_file("BACKENDS = {'one': lambda r: 1}"),
        of_file("BACKENDS = {}\nBACKENDS['one'] = lambda r: 1"),
        Verdict.UNCHANGED,
        "",
    ),
    (ONE, of_file(DECORATED), of_file(""), Verdict.GONE, ""),
    (
        TWO,
        of_file(DECORATED),
        of_file(DECORATED),
        Verdict.FILE_UNCHANGED,
        "no registration of the key found in either",
    ),
    (
        TWO,
        of_file(DECORATED),
        of_file(f"{DECORATED}# more\n"),
        Verdict.FILE_CHANGED,
        "no registration of the key found in either",
    ),
    (
        TWO,
        of_file(DECORATED),
        of_file(DECORATED + '@register_backend("two")\ndef two(): ...'),
        Verdict.ADDED,
        "srt/a.py registers it now",
    ),
    (HANDLER, of_file(CALLED), of_file(CALLED), Verdict.UNCHANGED, ""),
    (
        HANDLER,
        of_file(CALLED),
        of_file(CALLED.replace("return x", "return -x")),
        Verdict.UNCHANGED,
        "but not helper, which it calls",
    ),
]


@pytest.mark.parametrize(("target", "old", "new", "verdict", "detail"), VERDICTS)
def test_verdict_on_a_target(
    trees: Trees, target: str, old: Files, new: Files, verdict: Verdict, detail: str
) -> None:
    assert compare_target(*trees.pair(old, new), target) == Finding(verdict, detail)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"srt/x/k.py": "a\nb\n"}, {"srt/x/k.py": "a\r\nb\r\n"}, ("unchanged", "")),
        ({"srt/x/k.py": "a\nb\n"}, {"srt/x/k.py": "a\nc\nd\n"}, ("changed", "+2 -1")),
        ({"srt/x/k.py": "a\n"}, {}, ("gone", "")),
        ({"srt/x/k.py": "a\n"}, {"srt/y/k.py": "a\n"}, ("moved", "to srt/y/k.py")),
        (
            {"srt/x/k.py": "a\n"},
            {"srt/y/k.py": "a\nb\n"},
            ("moved", "to srt/y/k.py +1 -0"),
        ),
        ({"srt/x/k.py": ""}, {"srt/y/k.py": "", "srt/z/k.py": ""}, ("gone", "")),
        ({"srt/x/k.py": "", "srt/y/k.py": ""}, {"srt/y/k.py": ""}, ("gone", "")),
        ({}, {"srt/x/k.py": ""}, ("added", "")),
        ({}, {}, ("absent in both", "")),
    ],
)
def test_verdict_on_a_file(
    trees: Trees, old: Files, new: Files, expected: tuple[str, str]
) -> None:
    found = compare_file(*trees.pair(old, new), "srt/x/k.py")
    assert (found.verdict.value, found.detail) == expected


DATACLASS = """
@dataclasses.dataclass
class ServerArgs:
    CHOICES: ClassVar[list] = []
    model_path: str
    tp_size: A[int, "ranks"] = 1
    old_flag: bool = False
    urls: list = dataclasses.field(default_factory=list)
    _set_by_user: bool = False
class Other:
    field: int = 1
"""
STRUCT = """
class Model(msgspec.Struct):
    _NS_PATH = "model"
    model_path: str
    tp_size: A[int, "ranks"] = None
    new_flag: A[str, "more"] = "x"
    urls: list = msgspec.field(default_factory=list)
    tp_rank = Derived(doc="not an argument")
class Helper:
    field: int = 1
"""


def test_server_arguments_of_both_forms(trees: Trees) -> None:
    old, new = trees.pair(
        {"srt/server_args.py": DATACLASS},
        {
            "srt/server_args.py": "class ServerArgs: ...",
            "srt/arg_groups/fields/model.py": STRUCT,
        },
    )
    assert server_arguments(old)["model_path"] == "required"
    assert list(argument_lines(old, new)) == [
        "gone     old_flag",
        "new      new_flag = 'x'",
        "default  tp_size = 1 -> None",
        "4 -> 4 arguments",
    ]


def test_pins(trees: Trees) -> None:
    old = trees.make(
        "old",
        {},
        metadata(
            "1.0",
            "torch==2.11.0",
            "torch==2.9 ; extra == 'cpu'",
            "torchaudio==2.11.0",
            "flashinfer_python[cu13]==0.6.14",
            'sgl-kernel==0.3; platform_machine == "x86_64"',
            "transformers",
        ),
    )
    new = trees.make("new", {}, metadata("1.1", "torch==2.14.1", "transformers"))
    assert pins(old)["sgl-kernel"] == "==0.3"
    assert list(pin_lines(old, new)) == [
        "flashinfer-python ==0.6.14 -> no pin",
        "sgl-kernel ==0.3 -> no pin",
        "torch ==2.11.0 -> ==2.14.1",
        "transformers any",
    ]
    bare = trees.make("bare", {}, metadata("1.2"))
    assert list(pin_lines(old, bare)) == ["no metadata in or beside one of them"]


def test_a_line_says_that_the_table_ends_a_hook() -> None:
    hook = Hook("h", "sglang.srt.a.f", Kind.AFTER, "m:f", "a test", until="1.1")
    finding = {hook: Finding(Verdict.MOVED, MOVED_F)}
    line, counts = hook_lines(finding, "1.0")
    assert line.split() == f"moved h srt.a.f: {MOVED_F}".split()
    line, counts = hook_lines(finding, "1.1")
    assert line.endswith("srt/b.py:f; the table has no such hook for 1.1")
    assert counts == "1 hooks: 1 moved"


@pytest.mark.parametrize("place", ["sglang", "python/sglang", "lib/python3.12/x"])
def test_every_kind_of_folder(tmp_path: Path, place: str) -> None:
    site = {
        "python/sglang": "python",
        "lib/python3.12/x": "lib/python3.12/site-packages",
    }
    write_folder(tmp_path / site.get(place, ""), of_file(FUNCTION))
    asked = tmp_path / "sglang" if place == "sglang" else tmp_path
    assert open_tree(asked).files == {"srt/__init__.py", "srt/a.py"}
    assert open_tree(asked).version == "1.0"


def test_where_the_version_comes_from(tmp_path: Path) -> None:
    generated = {"_version.py": "__version__ = version = '0.9'\n"}
    assert open_tree(write_folder(tmp_path / "a", generated, "")).version == "0.9"
    assert open_tree(write_folder(tmp_path / "b", generated)).version == "1.0"
    bare = write_folder(tmp_path / "c", {}, "")
    assert open_tree(bare, "0.8").version == "0.8"
    with pytest.raises(CompareError, match="give it with --old-version"):
        open_tree(bare)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such", "no sglang package in"),
        ("empty", "give a wheel file, or a folder"),
        ("text.whl", "is not a wheel"),
        ("other.whl", "give a wheel of SGLang"),
        ("newer", "cannot parse srt/server_args.py of sglang 1.0, line 1;"),
    ],
)
def test_wrong_input_prints_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.whl").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other/a.py", "")
    write_folder(tmp_path / "newer", {"srt/server_args.py": "no python"})
    good = write_folder(tmp_path / "good", {})
    assert main(["compare", str(good), str(tmp_path / name)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith("sglang-dcp: error: ") and said in error


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = "srt/distributed/parallel_state.py"
    forms = ["def graph_capture(): ...", "def graph_capture(): return 1", "x = 1"]
    same, body, gone = (
        str(write_folder(tmp_path / str(i), {group: text}))
        for i, text in enumerate(forms)
    )
    assert main(["compare", same, same]) == 0
    assert main(["compare", same, body]) == 0
    assert main(["compare", same, gone]) == 1
    assert "\ngone               groups-capture " in capsys.readouterr().out
    # What SGLang has of its own now, a hook would replace.
    assert main(["compare", gone, same]) == 1


def test_the_installed_release_is_unchanged_against_itself() -> None:
    """It finds every target without torch and SGLang, but what a hook adds."""
    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None
    site = str(Path(spec.origin).parents[1])
    code = "import sys; sys.modules['torch'] = sys.modules['sglang'] = None; "
    code += "from sglang_dcp.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = run_python("-c", code, "compare", site, site, timeout_s=60)
    assert done.code == 0, done.stderr
    _, hooks, files, arguments, pinned = done.stdout.strip().split("\n\n")
    others = [line for line in hooks.split("\n") if not line.startswith("unchanged ")]
    heading, *added, counts = others
    assert heading == "Hooks" and " hooks: " in counts
    # SGLang itself has no such method (0.5.16) and no such entry.
    assert {re.split("  +", line)[1] for line in added} <= {
        "all-to-all-pynccl",
        "mla-torch-native",
    }
    assert all(line.startswith("unchanged ") for line in files.split("\n")[1:])
    assert len(files.split("\n")) > 30
    before, _, after = arguments.split("\n")[1].removesuffix(" arguments").split()
    assert before == after and int(before) > 300
    assert len(pinned.split("\n")) == 5 and "->" not in pinned


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))

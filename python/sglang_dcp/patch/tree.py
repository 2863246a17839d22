"""An SGLang on disk: where its package is, and the state of each touched file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple, Optional

from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.manifest import (
    Series,
    folder_of,
    load_series,
    sha256,
    versions,
)

PRISTINE, PATCHED, UNKNOWN = "pristine", "patched", "unknown"


class Tree(NamedTuple):
    """The `sglang` package at `root`, compared with one series.

    Attributes
    ----------
    contents : dict
        Bytes of each touched file. A file that does not exist has no entry.
    """

    root: Path
    series: Series
    contents: dict[str, bytes]

    @property
    def states(self) -> dict[str, str]:
        """Return `pristine`, `patched` or `unknown` for each file."""
        return {name: self._state(name) for name in self.series.files}

    def _state(self, name: str) -> str:
        hashes = self.series.files[name]
        found = sha256(self.contents[name]) if name in self.contents else None
        known = {hashes.original: PRISTINE, hashes.patched: PATCHED}
        return known.get(found, UNKNOWN) if found else UNKNOWN

    def named(self, state: str) -> list[str]:
        """List the files in a state."""
        return [name for name, found in self.states.items() if found == state]


def find_package(target: Optional[Path]) -> Path:
    """Find the `sglang` package in `target`, or the one that Python would import.

    Parameters
    ----------
    target : Path, optional
        A checkout, an environment, its site-packages, or the package itself.

    Raises
    ------
    PatchError
        There is none, more than one, or only a link to one.
    """
    roots = [_importable()] if target is None else _below(target)
    if len(roots) != 1:
        found = ", ".join(map(str, roots)) or "none"
        raise PatchError(
            f"looked for one sglang package in {target}, found {found}; pass --target "
            "with a checkout, an environment, its site-packages, or the package"
        )
    root = roots[0]
    if root.is_symlink():
        raise PatchError(
            f"{root} is a link to {root.resolve()}, which others may use too; "
            "pass that folder with --target to change it"
        )
    return root


def _importable() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise PatchError("no sglang is installed here; pass --target DIR")
    return Path(spec.origin).parent


def _below(target: Path) -> list[Path]:
    places = [
        target / "python" / "sglang",
        target / "sglang",
        *target.glob("lib/python3*/site-packages/sglang"),
    ]
    if target.name == "sglang":
        places.append(target)
    return [place for place in places if (place / "srt").is_dir()]


def read_tree(root: Path) -> Tree:
    """Read the touched files below `root`, for the series that knows most of them.

    If no series knows any, it is the newest.

    Raises
    ------
    PatchError
        There is no series, or one that does not match the release's hashes.
    """
    trees = [_read(root, load_series(version)) for version in reversed(versions())]
    if not trees:
        raise PatchError(f"no patch series in {folder_of('')}; reinstall sglang-dcp")
    return max(trees, key=lambda tree: sum(s != UNKNOWN for s in tree.states.values()))


def _read(root: Path, series: Series) -> Tree:
    real = root.resolve()
    contents = {}
    for name in series.files:
        path = root / name
        if not path.is_file():
            continue
        if not path.parent.resolve().is_relative_to(real):
            raise PatchError(
                f"{path.parent} is a link to {path.parent.resolve()}, outside of "
                f"{root}; nothing was changed; patch a copy without such links"
            )
        contents[name] = path.read_bytes()
    return Tree(root, series, contents)


def refuse_unknown(tree: Tree) -> None:
    """Raise unless every touched file is pristine or patched."""
    unknown = tree.named(UNKNOWN)
    if not unknown:
        return
    version = tree.series.version
    raise PatchError(
        f"{tree.root}: {len(unknown)} of {len(tree.series.files)} files are neither those "
        f"of sglang {version} nor those with our patches: {', '.join(unknown)}; "
        f"{_installed_version(tree.root)}nothing was changed; reinstall "
        f"sglang=={version}, undo your own changes, or merge the patches with git am"
    )


def _installed_version(root: Path) -> str:
    found = importlib.metadata.distributions(name="sglang", path=[str(root.parent)])
    return "".join(f"sglang {dist.version} is installed there; " for dist in found)

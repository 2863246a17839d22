"""The source of one SGLang release: a wheel, or a folder with the `sglang` package."""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Optional

PACKAGE = "sglang"


class CompareError(RuntimeError):
    """The input is wrong. The message names the path and what to do."""


@dataclass(frozen=True)
class SourceTree:
    """The Python files of one `sglang` package.

    Attributes
    ----------
    version : str
    requires : tuple of str
        What its metadata require, as written there. Empty without metadata.
    files : frozenset of str
        Paths below the package.
    """

    version: str
    requires: tuple[str, ...]
    files: frozenset[str]
    _read: Callable[[str], bytes]
    _parsed: dict[str, ast.Module] = field(default_factory=dict)

    def text(self, file: str) -> str:
        """Return the content of a file, with `\\n` at the end of each line."""
        text = self._read(file).decode(errors="replace")
        return text.replace("\r\n", "\n")

    def module(self, file: str) -> ast.Module:
        """Return a file's syntax tree.

        Raises
        ------
        CompareError
            This Python cannot parse it.
        """
        if file not in self._parsed:
            try:
                self._parsed[file] = ast.parse(self.text(file))
            except SyntaxError as error:
                python = ".".join(map(str, sys.version_info[:2]))
                raise CompareError(
                    f"Python {python} cannot parse {file} of sglang {self.version}, "
                    f"line {error.lineno}; run this with the Python of that release"
                ) from None
        return self._parsed[file]


def open_tree(path: Path, version: Optional[str] = None) -> SourceTree:
    """Open a wheel, a site-packages, an environment, a checkout, or the package itself.

    Parameters
    ----------
    version : str, optional
        Only needed for a folder that does not tell its version.

    Raises
    ------
    CompareError
        There is no `sglang` package in it, or no version.
    """
    if path.is_file():
        return _open_wheel(path, version)
    places = [path / "python" / PACKAGE, path / PACKAGE, path]
    places += path.glob(f"lib/python3*/site-packages/{PACKAGE}")
    for root in places:
        if (root / "srt").is_dir():
            return _open_folder(root, version)
    raise CompareError(
        f"no {PACKAGE} package in {path}; give a wheel file, or a folder that holds one"
    )


def _open_wheel(path: Path, version: Optional[str]) -> SourceTree:
    try:
        wheel = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise CompareError(f"{path} is not a wheel") from None
    names = wheel.namelist()
    files = _python_files(
        name.removeprefix(f"{PACKAGE}/")
        for name in names
        if name.startswith(f"{PACKAGE}/")
    )
    if not files:
        raise CompareError(f"no {PACKAGE} package in {path}; give a wheel of SGLang")
    metadata = [name for name in names if re.fullmatch(_METADATA, name)]
    return _tree(
        path,
        version,
        wheel.read(metadata[0]).decode() if metadata else "",
        files,
        lambda file: wheel.read(f"{PACKAGE}/{file}"),
    )


_METADATA = rf"{PACKAGE}-[^/]*\.dist-info/METADATA"


def _open_folder(root: Path, version: Optional[str]) -> SourceTree:
    metadata = list(root.parent.glob(f"{PACKAGE}-*.dist-info/METADATA"))
    return _tree(
        root,
        version,
        metadata[0].read_text() if len(metadata) == 1 else "",
        _python_files(path.relative_to(root).as_posix() for path in root.rglob("*.py")),
        lambda file: (root / file).read_bytes(),
    )


def _python_files(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if name.endswith(".py"))


def _tree(
    path: Path,
    version: Optional[str],
    metadata: str,
    files: frozenset[str],
    read: Callable[[str], bytes],
) -> SourceTree:
    headers = HeaderParser().parsestr(metadata)
    version = version or headers["Version"] or _generated_version(files, read)
    if version is None:
        raise CompareError(
            f"nothing in or beside {path} tells SGLang's version; give it with "
            "--old-version or --new-version"
        )
    requires = tuple(headers.get_all("Requires-Dist", []))
    return SourceTree(version, requires, files, read)


def _generated_version(
    files: frozenset[str], read: Callable[[str], bytes]
) -> Optional[str]:
    """Return what the build wrote into the package, where there are no metadata."""
    if "_version.py" not in files:
        return None
    text = read("_version.py").decode()
    found = re.search(r"^__version__ = .*'([^']+)'$", text, re.M)
    return found[1] if found else None

"""Reads the lines of a CSV as NamedTuples, by the types that these say."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Row = TypeVar("Row")


def read_rows(file: Path, kind: Callable[..., Row]) -> list[Row]:
    """Return a `kind`, a NamedTuple of numbers and strings, for each line.

    A column that the file lacks needs a default.
    """
    types = get_type_hints(kind)

    def row(line: dict[str, Any]) -> Row:
        return kind(**{name: types[name](text) for name, text in line.items()})

    with file.open(newline="") as lines:
        return [row(line) for line in csv.DictReader(lines)]

"""Server arguments and pins of one SGLang release."""

from __future__ import annotations

import ast
import re

from sglang_dcp.hooks.compare.tree import SourceTree

_SERVER_ARGS = "srt/server_args.py"
_FIELDS = "srt/arg_groups/fields/"
_PINNED = re.compile(r"torch|triton|flashinfer.*|sg(lang|l)-kernel|transformers")


def server_arguments(tree: SourceTree) -> dict[str, str]:
    """Return the defaults of the fields of `ServerArgs`, as they are written.

    Up to 0.5.19 they are in the class. Later, classes with a namespace hold them.
    """
    files = [file for file in sorted(tree.files) if file.startswith(_FIELDS)]
    found: dict[str, str] = {}
    for file in [_SERVER_ARGS, *files]:
        if file in tree.files:
            for node in tree.module(file).body:
                if isinstance(node, ast.ClassDef) and _holds_arguments(node):
                    found |= _fields(node)
    return found


def _holds_arguments(node: ast.ClassDef) -> bool:
    return node.name == "ServerArgs" or any(
        isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "_NS_PATH"
        for item in node.body
    )


def _fields(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            is_input = "ClassVar" not in ast.unparse(item.annotation)
            if is_input and not item.target.id.startswith("_"):
                found[item.target.id] = _default(item)
    return found


def _default(item: ast.AnnAssign) -> str:
    """Return the default as written. Dataclasses and structs write factories alike."""
    if item.value is None:
        return "required"
    return re.sub(r"^(dataclasses|msgspec)\.field", "field", ast.unparse(item.value))


def pins(tree: SourceTree) -> dict[str, str]:
    """Return what the metadata ask of the packages that our kernels depend on."""
    found = {}
    for requirement in tree.requires:
        text, _, marker = requirement.partition(";")
        match = re.match(r"([\w.-]+)(?:\[.*?\])?\s*(.*)", text)
        if match is None or "extra ==" in marker:
            continue
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        if _PINNED.fullmatch(name):
            found[name] = match[2].strip() or "any"
    return found

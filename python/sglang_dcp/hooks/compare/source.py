"""Where a dotted path of SGLang is defined, by its source. Nothing is imported."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from sglang_dcp.hooks.compare.tree import PACKAGE, SourceTree

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef)
# Decorators that change how a function is called.
_CALLED_OTHERWISE = {"staticmethod", "classmethod", "property", "contextmanager"}
# Imports and base classes to go through. A limit, because a class may extend its namesake.
_HOPS = 6
# Copies of the server's code that no hook means.
_ELSEWHERE = ("multimodal_gen/", "test/")


class Definition(NamedTuple):
    """Where and how a name is defined. A name may be bound in several branches."""

    file: str
    nodes: tuple[ast.AST, ...]

    def signature(self) -> str:
        """Return how it is called, without annotations."""
        return " | ".join(dict.fromkeys(_signature(node) for node in self.nodes))

    def content(self) -> list[str]:
        """Return what it does, without comments and format."""
        return [ast.dump(node) for node in self.nodes]


def _signature(node: ast.AST) -> str:
    if isinstance(node, _FUNCTIONS):
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        kept = [m for m in marks if m.rpartition(".")[2] in _CALLED_OTHERWISE]
        is_async = ["async"] if isinstance(node, ast.AsyncFunctionDef) else []
        return " ".join([*(f"@{m}" for m in kept), *is_async, _parameters(node.args)])
    if isinstance(node, ast.ClassDef):
        marks = [f"@{ast.unparse(mark)}" for mark in node.decorator_list]
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        init = [_signature(found) for found in _bound(node, "__init__")]
        return " ".join([*marks, f"class({bases})", *init])
    if isinstance(node, ast.Lambda):
        return _parameters(node.args)
    return "a value"


def _parameters(arguments: ast.arguments) -> str:
    bare = copy.deepcopy(arguments)
    for node in ast.walk(bare):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"({ast.unparse(bare)})"


def split_path(tree: SourceTree, path: str) -> tuple[Optional[str], list[str]]:
    """Return the file of the longest module in a dotted path, and the rest of the path.

    The file is None for what is not in SGLang.
    """
    package, *parts = path.split(".")
    if package != PACKAGE:
        return None, parts
    for count in range(len(parts), 0, -1):
        stem = "/".join(parts[:count])
        for file in (f"{stem}/__init__.py", f"{stem}.py"):
            if file in tree.files:
                return file, parts[count:]
    return None, parts


def locate(tree: SourceTree, path: str, hops: int = _HOPS) -> Optional[Definition]:
    """Return the definition behind a dotted path, or None."""
    file, names = split_path(tree, path)
    return find(tree, file, names, hops) if file and names else None


def find(
    tree: SourceTree, file: str, names: Sequence[str], hops: int = _HOPS
) -> Optional[Definition]:
    """Return the definition of `names`, as in `("Class", "method")`, seen from a file."""
    return _find_in(tree, file, tree.module(file), names, hops)


def _find_in(
    tree: SourceTree, file: str, scope: ast.AST, names: Sequence[str], hops: int
) -> Optional[Definition]:
    bound = _bound(scope, names[0])
    imports = [node for node in bound if isinstance(node, ast.ImportFrom)]
    # A name that is also defined here, say in another branch, stays here.
    if len(imports) == len(bound) and hops:
        for line in imports:
            path = ".".join([_imported_path(file, line, names[0]), *names[1:]])
            if (found := locate(tree, path, hops - 1)) is not None:
                return found
    if len(names) == 1:
        return Definition(file, tuple(bound)) if bound else None
    for node in bound:
        if isinstance(node, ast.ClassDef):
            found = _find_in(tree, file, node, names[1:], hops)
            return found or _inherited(tree, file, node, names[1:], hops)
    return None


def _inherited(
    tree: SourceTree, file: str, node: ast.ClassDef, names: Sequence[str], hops: int
) -> Optional[Definition]:
    for base in node.bases:
        if isinstance(base, ast.Name) and hops:
            found = find(tree, file, [base.id, *names], hops - 1)
            if found is not None:
                return found
    return None


def _imported_path(file: str, node: ast.ImportFrom, name: str) -> str:
    """Return the full path of what `from ... import ... as name` in a file brings."""
    origin = next(a.name for a in node.names if (a.asname or a.name) == name)
    parents = [PACKAGE, *file.split("/")][: -node.level] if node.level else []
    return ".".join([*parents, *filter(None, [node.module]), origin])


def _bound(scope: ast.AST, name: str) -> list[ast.stmt]:
    return [node for node in _statements(scope) if name in _names(node)]


def _statements(scope: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, also those in branches."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.stmt):
            yield child
        if not isinstance(child, (*_SCOPES, ast.expr)):
            yield from _statements(child)


def _names(node: ast.stmt) -> set[str]:
    """Return the names that a statement binds."""
    if isinstance(node, _SCOPES):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    inner = [t.elts if isinstance(t, (ast.Tuple, ast.List)) else [t] for t in targets]
    return {t.id for some in inner for t in some if isinstance(t, ast.Name)}


def registered(
    tree: SourceTree, mapping: Definition, name: str, key: str
) -> Optional[Definition]:
    """Return what the mapping's file enters into it under `key`, or None.

    It sees a dict literal, `mapping[key] = ...`, and calls and decorators whose names
    have `register` in them and whose first argument is the key.
    """
    values = [v for node in mapping.nodes for v in _in_literal(node, key)]
    for node in ast.walk(tree.module(mapping.file)):
        values += _entered(node, name, key)
    if not values:
        return None
    if isinstance(values[-1], ast.Name):
        found = find(tree, mapping.file, [values[-1].id])
        if found is not None:
            return found
    return Definition(mapping.file, (values[-1],))


def _in_literal(node: ast.AST, key: str) -> list[ast.AST]:
    literal = getattr(node, "value", None)
    if not isinstance(literal, ast.Dict):
        return []
    pairs = zip(literal.keys, literal.values)
    return [value for found, value in pairs if _is_constant(found, key)]


def _entered(node: ast.AST, name: str, key: str) -> Sequence[ast.AST]:
    if isinstance(node, _SCOPES):
        return [node] if any(_registers(d, key) for d in node.decorator_list) else []
    if isinstance(node, ast.Call) and _registers(node, key):
        return node.args[1:2]
    if isinstance(node, ast.Assign):
        return [node.value] if any(_is_item(t, name, key) for t in node.targets) else []
    return []


def _registers(node: ast.expr, key: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and "register" in ast.unparse(node.func).rpartition(".")[2]
        and bool(node.args)
        and _is_constant(node.args[0], key)
    )


def _is_item(node: ast.expr, name: str, key: str) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and ast.unparse(node.value).rpartition(".")[2] == name
        and _is_constant(node.slice, key)
    )


def _is_constant(node: Optional[ast.expr], value: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def homes(tree: SourceTree, name: str) -> Iterator[tuple[str, str]]:
    """Yield file and dotted name of every function, class and value of that name."""
    pattern = re.compile(
        rf"^[ \t]*(async +)?(def|class) +{re.escape(name)}\b|^{re.escape(name)} *[:=]",
        re.MULTILINE,
    )
    for file in sorted(tree.files):
        if file.startswith(_ELSEWHERE):
            continue
        text = tree.text(file)
        if name in text and pattern.search(text):
            for found in _dotted_names(tree.module(file), name):
                yield file, found


def _dotted_names(module: ast.Module, name: str) -> Iterator[str]:
    if any(not isinstance(n, ast.ImportFrom) for n in _bound(module, name)):
        yield name
    for node in _statements(module):
        if isinstance(node, ast.ClassDef) and _bound(node, name):
            yield f"{node.name}.{name}"

"""Lists what functions of SGLang read of an object, by their source.

A read is an attribute path that begins at that object (`runner.page_size`), or at what a
`get_*()` of SGLang returns, as settings (`get_parallel().attn_tp_size`). A call ends in
`()`, and what it returns is not followed. An assignment ends in ` =`.

Variables, attributes, parameters, functions of the same file and methods of the objects
that these build are followed. Other functions are not: if one gets an object that may
hide further reads, that is a read too, as in `mambaish_config(runner.model_config)`.

Nothing is imported, because attention backends want a GPU.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple, Optional, Union


class Source:
    """One file: its functions, its classes, and what it imports of SGLang."""

    def __init__(self, path: Path) -> None:
        tree = ast.parse(path.read_text())
        self.functions = _functions(tree.body)
        self.classes = {
            node.name: _functions(node.body)
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
        self._imported = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            if (node.module or "").startswith("sglang.")
            for alias in node.names
        }

    def getter(self, name: str) -> Optional[str]:
        """What SGLang calls `name`, if that is a function that gets something."""
        original = self._imported.get(name, "")
        return original if original.startswith("get_") else None


def _functions(body: Iterable[ast.stmt]) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


class Instance:
    """An object of a class that is followed, and what its attributes may be."""

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.methods = source, source.classes[name]
        self.attributes: dict[str, set[Value]] = {}


class Method(NamedTuple):
    """A bound method of an `Instance`."""

    owner: Instance
    name: str


# What an expression may be: a path, or an object that is followed.
Value = Union[str, Instance, Method]
Names = dict[str, set[Value]]


class Walk:
    """Goes through functions and notes reads.

    Parameters
    ----------
    source : Source
    name : str
        The class of `source` that other files build, too.
    holders : collection of str
        Paths of objects that may hide further reads.

    Attributes
    ----------
    reads : set of str
    built : list of Instance
        In order.
    """

    def __init__(self, source: Source, name: str, holders: Collection[str]) -> None:
        self._source, self._name = source, name
        self.holders = holders
        self.reads: set[str] = set()
        self.built: list[Instance] = []
        self._done: set[tuple[ast.FunctionDef, frozenset[object]]] = set()

    def run(self, source: Source, function: ast.FunctionDef, names: Names) -> None:
        """Go through a function, once for each meaning of its parameters."""
        key = function, frozenset((k, v) for k in names for v in names[k])
        if key not in self._done:
            self._done.add(key)
            scope = Scope(self, source, names)
            for statement in function.body:
                scope.visit(statement)

    def call(self, method: Method, given: Names) -> None:
        """Go through a method, unless the class inherits it."""
        owner, function = method.owner, method.owner.methods.get(method.name)
        if function is not None:
            own: Names = {}
            if not _is_static(function):
                own = {_parameters(function)[0]: {owner}}
            self.run(owner.source, function, {**own, **given})

    def build(self, name: str, source: Source) -> Optional[Instance]:
        """Make an object of the named class, or of one in its file."""
        is_here = source is self._source and name in source.classes
        if name != self._name and not is_here:
            return None
        self.built.append(Instance(self._source, name))
        return self.built[-1]


def _parameters(function: ast.FunctionDef) -> list[str]:
    return [arg.arg for arg in function.args.args]


def _is_static(function: ast.FunctionDef) -> bool:
    return "staticmethod" in map(ast.unparse, function.decorator_list)


class Scope(ast.NodeVisitor):
    """One function, and what its names mean."""

    def __init__(self, walk: Walk, source: Source, names: Names) -> None:
        self._walk, self._source = walk, source
        self._names = {name: set(values) for name, values in names.items()}
        self._built: dict[ast.Call, Instance] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self._assign(node.target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        values = self.values(value)
        if isinstance(target, ast.Name):
            self._names[target.id] = values
        elif isinstance(target, ast.Attribute):
            for owner in self.values(target.value):
                if isinstance(owner, Instance):
                    owner.attributes.setdefault(target.attr, set()).update(values)
                elif isinstance(owner, str):
                    self._walk.reads.add(f"{owner}.{target.attr} =")
        else:
            self.visit(target)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._note(node):
            self._visit_given(node)
        else:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if not self._note(node):
            self._follow(node)
            self.visit(node.func)
        self._visit_given(node)

    def _visit_given(self, node: ast.expr) -> None:
        """Visit what calls in a chain of attributes and calls are given."""
        while isinstance(node, (ast.Attribute, ast.Call)):
            if isinstance(node, ast.Call):
                for argument in _arguments(node):
                    self.visit(argument)
            node = node.func if isinstance(node, ast.Call) else node.value

    def _note(self, node: ast.expr) -> bool:
        """Note the paths that an expression may be. Return whether there are any."""
        paths = {value for value in self.values(node) if isinstance(value, str)}
        self._walk.reads |= {path for path in paths if "." in path}
        return bool(paths)

    def values(self, node: ast.expr) -> set[Value]:
        """What an expression may be, as far as that matters here."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return self._attribute(node.value, node.attr)
        if isinstance(node, ast.Call):
            return self._result(node)
        return set()

    def _attribute(self, node: ast.expr, name: str) -> set[Value]:
        found: set[Value] = set()
        for value in self.values(node):
            if isinstance(value, str):
                found.add(value if _has_ended(value) else f"{value}.{name}")
            elif isinstance(value, Instance):
                method = {Method(value, name)} if name in value.methods else set()
                found |= value.attributes.get(name, method)
        return found

    def _result(self, node: ast.Call) -> set[Value]:
        if not isinstance(node.func, ast.Name):
            paths = (path for path in self.values(node.func) if isinstance(path, str))
            return {path if _has_ended(path) else f"{path}()" for path in paths}
        name, given = node.func.id, node.args
        if name in ("getattr", "hasattr") and isinstance(given[1], ast.Constant):
            return self._attribute(given[0], str(given[1].value))
        if not given and (getter := self._source.getter(name)):
            return {f"{getter}()"}
        return self._object(node, name)

    def _object(self, node: ast.Call, name: str) -> set[Value]:
        if node not in self._built:
            built = self._walk.build(name, self._source)
            if built is None:
                return set()
            self._built[node] = built
            given = self._given(node, built.methods.get("__init__"), skipped=1)
            self._walk.call(Method(built, "__init__"), given)
        return {self._built[node]}

    def _follow(self, node: ast.Call) -> None:
        """Go into the function that is called, or note what it gets."""
        methods = [v for v in self.values(node.func) if isinstance(v, Method)]
        for method in methods:
            function = method.owner.methods[method.name]
            skipped = 0 if _is_static(function) else 1
            self._walk.call(method, self._given(node, function, skipped))
        name = ast.unparse(node.func)
        if name in self._source.functions:
            function = self._source.functions[name]
            self._walk.run(self._source, function, self._given(node, function, 0))
        elif not methods and not self.values(node) and not hasattr(builtins, name):
            self._note_gifts(node, name)

    def _note_gifts(self, node: ast.Call, name: str) -> None:
        for argument in _arguments(node):
            for value in self.values(argument):
                if value in self._walk.holders:
                    self._walk.reads.add(f"{name}({value})")

    def _given(
        self, node: ast.Call, function: Optional[ast.FunctionDef], skipped: int
    ) -> Names:
        """What the parameters of a function mean, without the first `skipped`."""
        if function is None:
            return {}
        given = dict(zip(_parameters(function)[skipped:], node.args))
        given |= {named.arg: named.value for named in node.keywords if named.arg}
        return {name: values for name, v in given.items() if (values := self.values(v))}


def _arguments(node: ast.Call) -> list[ast.expr]:
    return [*node.args, *(named.value for named in node.keywords)]


def _has_ended(path: str) -> bool:
    """Whether a path names the result of a call. Only what a getter returns is followed."""
    return path.endswith("()") and "." in path

"""What Transformers' source says about attention: what a module hands to the interface, what a base function reads."""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

DISPATCH = "ALL_ATTENTION_FUNCTIONS"
_SHAPE_ONLY = ("shape", "dtype", "device")


@dataclass(frozen=True)
class AttentionSource:
    """The function of a module class that looks up the AttentionInterface.

    `scope` are the names of its file, `named` the keywords it hands to the attention function by name, `own_mask`
    tells that it works on the mask it was given: a selection of its own.
    """

    cls: Any
    function: types.FunctionType
    named: frozenset[str]
    own_mask: bool

    @property
    def scope(self) -> dict[str, Any]:
        """The names of the file that defines the module."""
        return self.function.__globals__

    def __reduce__(self) -> Any:
        return _source, (self.cls,)


def attention_source(module: nn.Module) -> AttentionSource | None:
    """What the module's class says about its attention call; None if it does not use the AttentionInterface."""
    cls: Any = type(module)
    return _source(cls)


@cache
def _source(cls: Any) -> AttentionSource | None:
    function = dispatching(cls)
    if function is None:
        return None
    tree = parsed(function)
    if tree is None:
        names = frozenset(c for c in function.__code__.co_consts if isinstance(c, str))
        return AttentionSource(cls, function, names, False)
    calls = list(attention_calls(tree))
    named = frozenset(k.arg for c in calls for k in c.keywords if k.arg)
    return AttentionSource(cls, function, named, any(_own_mask(tree, c) for c in calls))


@cache
def dispatching(cls: Any) -> types.FunctionType | None:
    """The function of a class that looks up the AttentionInterface, if any."""
    return next((fn for fn in _functions(cls) if DISPATCH in fn.__code__.co_names), None)


def _functions(cls: Any) -> Iterator[types.FunctionType]:
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        for value in vars(base).values():
            fn = inspect.unwrap(value) if callable(value) else None
            if isinstance(fn, types.FunctionType):
                yield fn


def parsed(function: Any) -> ast.FunctionDef | None:
    """The function's syntax tree; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)), None)


def takes_interface(node: ast.AST) -> bool:
    """Whether an expression looks up an attention function."""
    return any(isinstance(n, ast.Attribute) and n.attr == "get_interface" for n in ast.walk(node))


def attention_calls(tree: ast.FunctionDef) -> Iterator[ast.Call]:
    """The calls of the attention function within a function."""
    callers = {"attention_interface"}
    for n in ast.walk(tree):
        if isinstance(n, (ast.Assign, ast.AnnAssign)) and n.value is not None and takes_interface(n.value):
            targets = n.targets if isinstance(n, ast.Assign) else [n.target]
            callers.update(t.id for t in targets if isinstance(t, ast.Name))
    for n in ast.walk(tree):
        if not isinstance(n, ast.Call):
            continue
        named = isinstance(n.func, ast.Name) and n.func.id in callers
        if named or (isinstance(n.func, ast.Call) and takes_interface(n.func.func)):
            yield n


def _own_mask(tree: ast.FunctionDef, call: ast.Call) -> bool:
    """Whether the mask of the call depends on more than the masks the function was given, on shapes and conditions."""
    by_name = next((k.value for k in call.keywords if k.arg == "attention_mask"), None)
    mask = call.args[4] if len(call.args) > 4 else by_name
    if not isinstance(mask, ast.Name):
        return False
    given = {a.arg for a in [*tree.args.args, *tree.args.kwonlyargs]}
    made: dict[str, set[str]] = {}
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign):
            names = [x.id for t in n.targets for x in ast.walk(t) if isinstance(x, ast.Name)]
            for name in names:
                made.setdefault(name, set()).update(_used(n.value))
    sources, reached = [mask.id], set()
    while sources:
        name = sources.pop()
        if name not in reached:
            reached.add(name)
            sources.extend(made.get(name, ()))
    return any(name in given and "mask" not in name for name in reached)


def _used(node: ast.AST) -> Iterator[str]:
    """Names whose values an expression depends on."""
    if isinstance(node, ast.Attribute) and node.attr in _SHAPE_ONLY:
        return
    if isinstance(node, ast.Name):
        yield node.id
    parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else ast.iter_child_nodes(node)
    for part in parts:
        yield from _used(part)


@cache
def keywords_read(function: Any) -> frozenset[str] | None:
    """The keywords an attention function looks at, itself or through what it hands them to; None: perhaps any.

    Where it is not to be told what it hands them to, that is taken to be any function of its file.
    """
    fn = inspect.unwrap(function)
    tree = parsed(fn)
    if tree is None or not isinstance(fn, types.FunctionType):
        return None
    read = _parameters(fn)
    if tree.args.kwarg is None:
        return read
    rest = tree.args.kwarg.arg
    for n in ast.walk(tree):
        if isinstance(n, ast.Subscript) and _is_name(n.value, rest):
            read |= _constant(n.slice, fn)
        elif isinstance(n, ast.Compare) and any(_is_name(c, rest) for c in n.comparators):
            read |= _constant(n.left, fn)
        elif isinstance(n, ast.Call):
            if isinstance(n.func, ast.Attribute) and _is_name(n.func.value, rest):
                read |= _constant(n.args[0] if n.args else None, fn)
            if any(_is_name(a, rest) for a in n.args):
                read |= _of_file(fn)
            if any(k.arg is None and _is_name(k.value, rest) for k in n.keywords):
                called = fn.__globals__.get(n.func.id) if isinstance(n.func, ast.Name) else None
                plain = isinstance(called, types.FunctionType) and called is not fn
                further = keywords_read(called) if plain else None
                read |= _of_file(fn) if further is None else further
    return read


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _constant(node: ast.AST | None, fn: types.FunctionType) -> frozenset[str]:
    """The keyword a constant names, or all of the file where it is no constant."""
    return frozenset([str(node.value)]) if isinstance(node, ast.Constant) else _of_file(fn)


def _parameters(fn: types.FunctionType) -> frozenset[str]:
    code = fn.__code__
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _of_file(fn: types.FunctionType) -> frozenset[str]:
    """The parameters of all functions that the function's file defines."""
    mine = (f for f in fn.__globals__.values() if isinstance(f, types.FunctionType) and f.__module__ == fn.__module__)
    return frozenset[str]().union(*map(_parameters, mine))

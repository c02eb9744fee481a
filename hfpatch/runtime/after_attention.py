"""What an attention module does between its attention function and its output projection, read from its source."""

import ast
import types
from collections.abc import Iterator, Sequence
from functools import cache

from torch import nn

from ..errors import UnsupportedModelError
from .attention_source import attention_source, parsed, takes_interface
from .survey import survey

SHAPE_ONLY = frozenset(
    {
        *("view", "reshape", "contiguous", "transpose", "permute", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("to", "type_as", "float"),
    }
)
SQUASHING = ("sigmoid", "softplus", "silu", "gate")
PROJECTIONS = frozenset(["dense", "wo", "Wo", "o", "out_lin", "linear_out"])


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for s in body:
        yield s
        for field in ("body", "orelse"):
            yield from _statements(getattr(s, field, []))


class _Reader:
    """Follows the attention output through the statements after the call."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        self.callers = {"attention_interface"}
        self.carriers: set[str] = set()
        self.calls = 0
        self.found: list[str] = []
        self.gates: list[str] = []
        self.projected = False

    def read(self) -> "tuple[list[str], list[str]]":
        """(native gates, other operations) on the attention output before the output projection."""
        for s in _statements(self.function.body):
            if isinstance(s, (ast.Assign, ast.AnnAssign)) and s.value is not None:
                targets = s.targets if isinstance(s, ast.Assign) else [s.target]
                self._assign(targets[0], s.value)
            elif isinstance(s, ast.Return) and s.value is not None and not self.projected:
                value = s.value.elts[0] if isinstance(s.value, ast.Tuple) else s.value
                self._step(value)
            elif isinstance(s, ast.AugAssign) and not self.projected and self._carries(s.target):
                self._other(s, isinstance(s.op, ast.Mult))
        if self.calls > 1:
            self.found.append("several attention calls")
        return self.gates, self.found

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(value, ast.Call) and self._is_attention(value.func):
            self.calls += 1
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            self.carriers.add(ast.unparse(first))
        elif takes_interface(value) and isinstance(target, ast.Name):
            self.callers.add(target.id)
        elif not self.projected and self._carries(value) and self._step(value):
            self.carriers.update(n.id for n in ast.walk(target) if isinstance(n, ast.Name))

    def _is_attention(self, func: ast.expr) -> bool:
        direct = isinstance(func, ast.Call) and takes_interface(func.func)
        return direct or (isinstance(func, ast.Name) and func.id in self.callers)

    def _carries(self, node: ast.AST) -> bool:
        """Whether the value depends on the attention output by more than its shape or dtype."""
        if isinstance(node, ast.Attribute) and node.attr in ("shape", "dtype", "device"):
            return False
        if isinstance(node, ast.Name):
            return node.id in self.carriers
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("size", "dim"):
                return False
            if node.func.attr in ("to", "view_as", "type_as", "reshape_as"):
                return self._carries(node.func.value)
        return any(self._carries(n) for n in ast.iter_child_nodes(node))

    def _step(self, node: ast.expr) -> bool:
        """Follow one expression; False once the output projection has been reached."""
        if not self._carries(node) or isinstance(node, ast.Name):
            return True
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript):
            return self._step(node.value)
        if isinstance(node, ast.IfExp):
            return self._step(node.body) and self._step(node.orelse)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            inner = node.left if self._carries(node.left) else node.right
            other = node.right if inner is node.left else node.left
            self._other(other, not self._carries(other))
            return self._step(inner)
        self._other(node, False)
        return True

    def _call(self, node: ast.Call) -> bool:
        func = node.func
        name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
        if isinstance(func, ast.Attribute) and name in SHAPE_ONLY and self._carries(func.value):
            return self._step(func.value)
        if "drop" in name or name in ("reshape", "flatten"):
            return self._step(node.args[0])
        if name in PROJECTIONS or "proj" in name:
            self._step(node.args[0])
            if len(node.args) > 1:
                self._other(node, False)
            self.projected = True
            return False
        self._other(node, False)
        return True

    def _other(self, node: ast.AST, factor: bool) -> None:
        text = ast.unparse(node)
        gate = factor and any(word in text for word in SQUASHING)
        (self.gates if gate else self.found).append(text)


def after_attention(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(native gates, other operations) between attention and output projection of an attention module, as source.

    Both empty for a module that only reshapes. One whose source cannot be read has one unknown operation.
    """
    source = attention_source(module)
    return read_after(source.function if source is not None else None)


@cache
def read_after(function: types.FunctionType | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`after_attention` of the function that calls the attention interface."""
    tree = parsed(function)
    if tree is None:
        return (), ("source code that cannot be read",)
    gates, found = _Reader(tree).read()
    return tuple(gates), tuple(found)


def refuse_unless_free(model: nn.Module, layers: Sequence[int], method: str, *, native_gate_ok: bool) -> None:
    """Raise UnsupportedModelError if head outputs of `layers` do not go straight into the output projection."""
    for layer in survey(model).layers:
        if layer.index not in layers:
            continue
        gates, found = after_attention(layer.module)
        name = type(layer.module).__name__
        if gates and not native_gate_ok:
            raise UnsupportedModelError(
                f"{method} would gate {name} twice: it has a gate of its own (`{gates[0]:.80}`). Load it as it "
                "is; every other method works on top of its gate."
            )
        if found:
            raise UnsupportedModelError(
                f"{method} cannot act on {name}: between attention and output projection it computes "
                f"`{found[0]:.80}`, so head outputs are not what the projection sees. Choose another model."
            )

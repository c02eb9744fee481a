"""Tensors on the pretended GPU, and one operation on them: counted, then computed on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from . import kernels
from .log import log

GPU = torch.device("cuda:0")
FREE = frozenset(
    {
        *("detach", "alias", "lift_fresh", "lift", "empty", "new_empty", "empty_like", "empty_strided"),
        *("new_empty_strided", "_unsafe_view", "_reshape_alias", "sym_size", "sym_stride", "is_same_size", "set_"),
        *("resolve_conj", "resolve_neg", "_has_same_storage_numel", "view", "unbind", "split", "split_with_sizes"),
        *("chunk", "unsafe_split", "_local_scalar_dense", "_fused_sdp_choice"),
    }
)  # no kernel: views and allocations
WAITING = frozenset(
    {
        *("nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive", "bincount"),
        *("equal", "argwhere", "is_nonzero"),
    }
)  # their result's size is read from the GPU
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
MOVING = frozenset({"_to_copy", "copy_", "_copy_from", "to"})


class OnGpu(Tensor):
    """A CPU tensor `held` that says it is on the GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device=GPU, requires_grad=False,
        )  # fmt: skip
        made.held = real
        return made

    def tolist(self) -> Any:
        log.now.wait("tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("numpy() of a GPU tensor")

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def held(x: Any) -> Any:
    """The CPU tensor of a tensor on the pretended GPU; anything else as it is."""
    return x.held if isinstance(x, OnGpu) else x


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Count one operation of the dispatcher and compute it."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, OnGpu)]
    asked = kwargs.get("device")
    target = torch.device(asked).type == "cuda" if asked is not None else bool(ours)
    if name == "copy_":
        target = isinstance(args[0], OnGpu)
    _count(func, name, args, kwargs, tensors, ours, target)
    real_args, real_kwargs = tree_map_only(OnGpu, held, (args, kwargs))
    if asked is not None:
        real_kwargs = {**real_kwargs, "device": torch.device("cpu")}
    real_kwargs.pop("pin_memory", None)
    if name in kernels.KERNELS and ours:
        out = kernels.KERNELS[name](*real_args, **real_kwargs)
    elif name == "histc" and not real_args[0].is_floating_point():  # CUDA has it for whole numbers too
        out = func(real_args[0].float(), *real_args[1:], **real_kwargs).to(real_args[0].dtype)
    else:
        out = func(*real_args, **real_kwargs)
        out = out.clone() if name == "_to_copy" and target != bool(ours) else out
    same = {id(t.held): t for t in ours}
    leaves, spec = tree_flatten(out)
    if target:
        leaves = [same.get(id(x), x) if isinstance(x, Tensor) else x for x in leaves]
        leaves = [OnGpu(x) if isinstance(x, Tensor) and not isinstance(x, OnGpu) else x for x in leaves]
    return tree_unflatten(leaves, spec)


def _count(func: Any, name: str, args: Any, kwargs: Any, tensors: Any, ours: Any, target: bool) -> None:
    if name in MOVING:
        if (name == "copy_" and isinstance(args[1], OnGpu) != target) or (name == "_to_copy" and target != bool(ours)):
            log.now.wait("copy to the GPU" if target else "copy to the CPU")
    elif ours:
        _mixed(name, args, tensors)
        _waiting(name, args, kwargs, tensors)
    if (ours or target) and name not in FREE and not getattr(func, "is_view", False):
        log.now.op(name)


def _mixed(name: str, args: Any, tensors: Any) -> None:
    """A GPU operation takes numbers from the CPU, and copies an index from there; anything else raises."""
    mixed = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
    if name in INDEXING and mixed:
        index = [t for t in args[1] if t is not None]
        if any(t is i for t in mixed for i in index):
            log.now.wait("index copied to the GPU")
        mixed = [t for t in mixed if not any(t is i for i in index)]
    if mixed:
        log.now.fault(f"{name} of GPU and CPU tensors")


def _waiting(name: str, args: Any, kwargs: Any, tensors: Any) -> None:
    if name == "_local_scalar_dense":
        log.now.wait("item")
    elif name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        log.now.wait(name)
    elif name in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        log.now.wait("boolean index")

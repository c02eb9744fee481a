"""The pretended GPU as a place to run a patched model: everything inside `pretending` is counted."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from hfpatch.ops import triton_boundaries, triton_chunks, triton_kernels
from hfpatch.runtime.pipeline import LayerRuntime

from .tensors import OnGpu, held, log, run

FILLING = torch.empty, Tensor.new_empty, torch.empty_like  # as they are before a test poisons them
MODULES = triton_kernels, triton_chunks, triton_boundaries
KERNELS = [(module, name) for module in MODULES for name in vars(module) if name.endswith("_kernel")]


class Operations(TorchDispatchMode):
    """Sends every operation to `run`. It takes FakeTensorMode's place, which spares torch the look for a driver."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.shape_env, self.allow_non_fake_inputs, self.static_shapes = None, True, True

    def __enter__(self) -> Any:
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Scaled dot-product attention is one operation, whichever kernel a driver would pick."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention or not isinstance(args[0], OnGpu):
            return func(*args, **kwargs)
        log.now.op("scaled_dot_product_attention")
        args, kwargs = tree_map_only(OnGpu, held, (args, kwargs))
        with _disable_current_modes():
            return OnGpu(func(*args, **kwargs))


class Launch:
    """A Triton kernel in the interpreter, on the CPU tensors."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            log.now.op("triton kernel")
            if any(isinstance(a, Tensor) and not isinstance(a, OnGpu) for a in args):
                log.now.fault("Triton kernel given a CPU tensor")
            with _disable_current_modes():
                self.kernel[grid](*map(held, args), **kwargs)

        return launch


class Device:
    """Stands in for `torch.cuda.device`."""

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


class Properties:
    """Of a Hopper card."""

    multi_processor_count, major, minor, total_memory, name = 132, 9, 0, 80 << 30, "pretended"


@contextmanager
def lent_guard() -> Iterator[None]:
    """Let C++ code that asks for CUDA's device guard find that of "meta", which does nothing: a CPU build has none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    before, table[cuda] = table[cuda], table[meta]
    try:
        yield
    finally:
        table[cuda] = before


def _scoped(original: Any) -> Any:
    def scoped(self: LayerRuntime, raw: Any) -> Any:
        log.enter(self.place.layer)
        try:
            return original(self, raw)
        finally:
            log.leave()

    return scoped


@contextmanager
def pretending() -> Iterator[None]:
    """Count what patched layers do with tensors on the pretended GPU."""
    with ExitStack() as stack:
        stack.enter_context(lent_guard())
        stack.enter_context(patch.object(LayerRuntime, "run", _scoped(LayerRuntime.run)))
        for module, name in KERNELS:
            stack.enter_context(patch.object(module, name, Launch(getattr(module, name))))
        for name, new in (
            ("device", Device), ("get_device_properties", lambda *a: Properties), ("current_device", lambda: 0),
            ("synchronize", lambda *a: None),
        ):  # fmt: skip
            stack.enter_context(patch.object(torch.cuda, name, new))
        for place, name, plain in zip(
            (torch, Tensor, torch), ("empty", "new_empty", "empty_like"), FILLING, strict=True
        ):
            stack.enter_context(patch.object(place, name, plain))
        stack.enter_context(torch.no_grad())
        stack.enter_context(Functions())
        stack.enter_context(Operations())
        yield


def move(model: nn.Module) -> None:
    """Put every parameter and buffer of the model on the pretended GPU."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(OnGpu(p.detach()), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = OnGpu(b.detach())

"""Router tensors as the paper's code names them, turned into ours."""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import InputError, reason
from .router import router_shapes

_NAME = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.self_attn\.mask_allocator\.(\w+)\.(\d+)\.(weight|bias)$")
_PROJECTION = re.compile(r"self_attn\.[qkv]_proj\.weight$")
_PARTS = {"cls_feat_extractor": "encoder", "cls_router_head_agnostic": "head"}


def our_name(name: str) -> str | None:
    """`layer.N.part.I.weight` for the name of a router tensor in the paper's code, None for any other tensor."""
    match = _NAME.search(name)
    if match is None or match[2] not in _PARTS:
        return None
    return f"layer.{match[1]}.{_PARTS[match[2]]}.{match[3]}.{match[4]}"


def convert_routers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The routers of a checkpoint's tensors under our names, in float32. Raises InputError.

    Untested on real checkpoints: written from the names and shapes in the paper's code. Early versions of that code
    had a smaller context encoder or a single logit; these are refused.
    """
    routers = {new: t.float() for name, t in tensors.items() if (new := our_name(name)) is not None}
    if not routers:
        raise InputError(
            "No router was found; expected tensors named ...layers.N.self_attn.mask_allocator.cls_feat_extractor... "
            "and ...cls_router_head_agnostic..., as the paper's code saves them."
        )
    layers = sorted({int(name.split(".")[1]) for name in routers})
    first = routers.get(f"layer.{layers[0]}.encoder.0.weight")
    dim = 1 if first is None or first.ndim != 2 else first.shape[-1]
    want = {f"layer.{n}.{name}": shape for n in layers for name, shape in router_shapes(dim).items()}
    wrong = sorted(set(routers) ^ set(want)) + [n for n in routers if n in want and tuple(routers[n].shape) != want[n]]
    if wrong:
        shape = list(routers[wrong[0]].shape) if wrong[0] in routers else "missing"
        raise InputError(
            f"The routers have another form than D-8D-2D and 2D-4D-D-2 ({wrong[0]}: {shape}); hfpatch cannot use them."
        )
    return routers


def read_published(folder: Path) -> dict[str, Tensor]:
    """Router tensors from the safetensors files of a downloaded checkpoint. Raises InputError."""
    named: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                named |= {name: tensors.get_tensor(name) for name in tensors.keys() if our_name(name)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is not a readable safetensors file ({reason(error)}).") from error
    return convert_routers(named)


def projection_difference(folder: Path, model: nn.Module) -> float:
    """Largest relative difference between the q, k and v projections of a checkpoint and a model's.

    The published training script trained these too; routers belong to a base model only where this is zero.
    """
    own = dict(model.named_parameters())
    largest = 0.0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in (n for n in tensors.keys() if _PROJECTION.search(n) and n in own):  # noqa: SIM118
                ours = own[name].detach().float().cpu()
                difference = tensors.get_tensor(name).float() - ours
                largest = max(largest, float(difference.norm() / ours.norm()))
    return largest

"""When the torch executor decodes faster than Transformers' own sdpa."""

import torch

from ..core.call import AttentionCall

LONG = 1024


def beats_sdpa(call: AttentionCall) -> bool:
    """Whether reading keys once, not once per query head as Transformers' sdpa has it on a CPU, saves time."""
    q, k, v = call.q, call.k, call.v
    (b, hq, lq, d), (_, hkv, lk, _) = q.shape, k.shape
    if lq != 1 or lk < LONG or hq == hkv or b * hkv < torch.get_num_threads() or q.device.type != "cpu":
        return False
    if call.softcap is not None or call.sinks is not None or call.bias is not None or d != v.shape[3]:
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))

"""Dense attention of one query in one kernel call, for decode steps in which every further operation counts."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..core.call import AttentionCall
from ..core.reweight import Columns

LONG = 1024
MASKED = 1 << 14


def serves(call: AttentionCall, columns: list[Columns]) -> bool:
    """Whether `one_query` can run the call: no columns, or a factor on the first key where a mask is cheaper."""
    q, k, v = call.q, call.k, call.v
    if q.shape[2] != 1 or q.device.type != "cpu" or q.dtype == torch.float64 or q.shape[3] != v.shape[3]:
        return False
    if call.softcap is not None or call.sinks is not None or call.bias is not None or torch.compiler.is_compiling():
        return False
    if columns and (len(columns) > 1 or not columns[0].first or k.shape[2] > MASKED):
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))


def beats_sdpa(call: AttentionCall) -> bool:
    """Whether reading keys once, not once per query head as Transformers' sdpa has it on a CPU, saves time."""
    (b, hq, _, _), (_, hkv, lk, _) = call.q.shape, call.k.shape
    return lk >= LONG and hq > hkv and b * hkv >= torch.get_num_threads() and serves(call, [])


def one_query(call: AttentionCall, columns: list[Columns]) -> Tensor:
    """Out `[B, 1, Hq, Dv]` of dense attention with `columns` worked in, where it `serves`.

    Query heads that share keys are rows of one block. A factor on the first key is its log added to that key's logit.
    """
    (b, hq, _, d), (_, hkv, lk, _) = call.q.shape, call.k.shape
    k, v, g, mask = call.k, call.v, hq // hkv, None
    if columns:
        mask = columns[0].log(lk)
    if b == 1:  # heads as the batch: the output then lies as the model wants it
        if mask is not None and mask.shape[0] > 1:
            mask = mask.view(hkv, 1, g, lk)
        q, k, v = call.q.reshape(hkv, 1, g, d), k.transpose(0, 1), v.transpose(0, 1)
    else:
        if mask is not None and mask.shape[0] > 1:
            mask = mask.view(1, hkv, g, lk)
        q = call.q.reshape(b, hkv, g, d)
    return scaled_dot_product_attention(q, k, v, mask, scale=call.scale).reshape(b, 1, hq, d)

"""Dense attention of one query in one kernel call, for decode steps in which every further operation counts."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import Causal
from hfpatch.ops.call import Problem

LONG = 1024


def one_query(problem: Problem) -> Tensor | None:
    """Out `[B, 1, Hq, Dv]` of a decode step on a CPU without its lse; None where that does not serve.

    Query heads that share keys are rows of one block; in a batch of one, heads stand in for the batch, so that the
    output lies as the model wants it.
    """
    q, k, v, bias = problem.q, problem.k, problem.v, problem.bias
    if q.shape[2] != 1 or q.device.type != "cpu" or not isinstance(problem.selection, Causal):
        return None
    if problem.softcap is not None or problem.sinks is not None or q.dtype == torch.float64:
        return None
    if q.shape[3] != v.shape[3] or problem.needs_grad:
        return None
    (b, hq, _, d), (_, hkv, lk, _), g = q.shape, k.shape, problem.groups
    if bias is not None:
        bias = bias[0] if bias.shape[:2] == (1, 1) else bias.expand(-1, hq, -1).reshape(-1, hkv, g, lk)
    if b == 1:
        q, k, v = q.reshape(hkv, 1, g, d), k.transpose(0, 1), v.transpose(0, 1)
        bias = bias if bias is None or bias.dim() == 2 else bias.transpose(0, 1)
    else:
        q = q.reshape(b, hkv, g, d)
    return scaled_dot_product_attention(q, k, v, bias, scale=problem.scale).reshape(b, 1, hq, d)


def beats_sdpa(call: AttentionCall) -> bool:
    """Whether reading keys once, not once per query head as Transformers' sdpa has it on a CPU, saves time."""
    q, k, v = call.q, call.k, call.v
    (b, hq, lq, d), (_, hkv, lk, _) = q.shape, k.shape
    if lq != 1 or lk < LONG or hq == hkv or b * hkv < torch.get_num_threads() or q.device.type != "cpu":
        return False
    if call.softcap is not None or call.sinks is not None or call.bias is not None or d != v.shape[3]:
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))

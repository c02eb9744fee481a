"""Dense attention of a few queries of a call, in float32."""

import torch
from torch import Tensor

from .call import AttentionCall

CHUNK_ELEMENTS = 1 << 24  # logits at a time


def dense_rows(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Dense `out [B, Hq, R, Dv]` and `lse [B, Hq, R]` of the queries `rows [R]` of a call."""
    outs, lses = [], []
    v = call.v.float()
    for some in rows.split(max(1, CHUNK_ELEMENTS // (call.B * call.Hq * call.Lk))):
        logits = row_logits(call, some)
        lse = with_sinks(call, logits.logsumexp(-1))
        weights = torch.exp(logits - lse[..., None])
        outs.append(_by_query_head(call, _by_kv_head(call, weights) @ v))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def row_logits(call: AttentionCall, rows: Tensor) -> Tensor:
    """Logits `[B, Hq, R, Lk]` of the queries `rows [R]`, -inf for later keys."""
    q = _by_kv_head(call, call.q[:, :, rows].float() * call.scale)
    logits = _by_query_head(call, q @ call.k.float().mT)
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if call.bias is not None:
        logits = logits + call.bias.float()[:, :, None]
    return logits.masked_fill(call.k_pos > (call.off + rows)[:, None], -torch.inf)


def with_sinks(call: AttentionCall, lse: Tensor) -> Tensor:
    """The log-sum-exp `[B, Hq, R]` of keys and of the sink logits, if there are any."""
    return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.float()[:, None])


def _by_kv_head(call: AttentionCall, x: Tensor) -> Tensor:
    """`[B, Hq, R, n]` as `[B, Hkv, groups * R, n]`: one product serves all queries that share keys."""
    return x.unflatten(1, (call.Hkv, call.groups)).flatten(2, 3)


def _by_query_head(call: AttentionCall, x: Tensor) -> Tensor:
    """`[B, Hkv, groups * R, n]` as `[B, Hq, R, n]`."""
    return x.unflatten(2, (call.groups, -1)).flatten(1, 2)

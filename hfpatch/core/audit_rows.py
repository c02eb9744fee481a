"""Dense attention of a few queries of a call, in float32."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import AttentionCall

CHUNK_ELEMENTS = 1 << 24  # logits at a time
CPU_ELEMENTS = 1 << 20  # what stays in a CPU's cache from one step to the next


def dense_rows(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Dense `out [B, Hq, R, Dv]` and `lse [B, Hq, R]` of the queries `rows [R]` of a call."""
    outs, lses, v = [], [], call.v.float()
    for logits in row_logits(call, rows):
        lse = with_sinks(call, logits.logsumexp(-1))
        weights = torch.exp(logits - lse[..., None])
        outs.append(_by_query_head(call, _by_kv_head(call, weights) @ v))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def row_logits(call: AttentionCall, rows: Tensor) -> Iterator[Tensor]:
    """Logits `[B, Hq, some, Lk]` of the queries `rows [R]`, some at a time, -inf for later keys."""
    k = call.k.float().mT
    many = CPU_ELEMENTS if rows.device.type == "cpu" else CHUNK_ELEMENTS
    for some in rows.split(max(1, many // (call.B * call.Hq * call.Lk))):
        logits = _by_query_head(call, _by_kv_head(call, call.q[:, :, some].float() * call.scale) @ k)
        if call.softcap is not None:
            logits = torch.tanh(logits / call.softcap) * call.softcap
        if call.bias is not None:
            logits = logits + call.bias.float()[:, :, None]
        yield logits.masked_fill_(call.k_pos > (call.off + some)[:, None], -torch.inf)


def with_sinks(call: AttentionCall, lse: Tensor) -> Tensor:
    """The log-sum-exp `[B, Hq, R]` of keys and of the sink logits, if there are any."""
    return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.float()[:, None])


def _by_kv_head(call: AttentionCall, x: Tensor) -> Tensor:
    """`[B, Hq, R, n]` as `[B, Hkv, groups * R, n]`: one product serves all queries that share keys."""
    return x.unflatten(1, (call.Hkv, call.groups)).flatten(2, 3)


def _by_query_head(call: AttentionCall, x: Tensor) -> Tensor:
    """`[B, Hkv, groups * R, n]` as `[B, Hq, R, n]`."""
    return x.unflatten(2, (call.groups, -1)).flatten(1, 2)

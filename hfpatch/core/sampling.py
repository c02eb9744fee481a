"""Attention of a few real queries of every tile: what a tile looks for, without averaging its queries."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import block_means
from .call import AttentionCall
from .logits import logits

CHUNK_ELEMENTS = 1 << 22


def sampled_weights(
    call: AttentionCall, start: int, stop: int, tile: int, queries: int, pool: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Attention weights of `queries` evenly spaced queries of each tile of `tile` queries between `start` and `stop`.

    Some tiles at a time: the number of the first, and `[B, Hq, tiles, n, seen]` in float32 over the keys up to their
    last query. The last query of a tile is among them. With `pool` they look at means of so many keys, those whose
    last key they see, and all is 0 where there is none.
    """
    n, device, tiles = min(queries, tile), call.q.device, -(-(stop - start) // tile)
    k = call.k[:, :, : call.off + stop]
    exact = k.dtype if stop - start == 1 else torch.float32  # a copy of all keys would cost a decode step most
    keys = k.to(exact) if pool == 1 else block_means(k, pool)  # [B, Hkv, m, D]
    bias = call.bias if pool == 1 else None
    if stop - start == pool == 1:  # a decode step, whose query sees every key
        some, q = None if bias is None else bias[..., : k.shape[2]], call.q[:, :, start:stop]
        one = logits(q, keys, scale=call.scale, softcap=call.softcap, bias=some).float()
        yield 0, one.softmax(-1).nan_to_num_(0.0)[:, :, None]
        return
    begins = start + torch.arange(tiles, device=device)[:, None] * tile
    sizes = (begins + tile).clamp(max=stop) - begins
    picks = begins + (torch.arange(1, n + 1, device=device) * sizes // n - 1).clamp_min(0)  # the last of each n-th
    step = max(1, CHUNK_ELEMENTS // (call.B * call.Hq * n * keys.shape[2]))
    for a in range(0, tiles, step):
        z = min(a + step, tiles)
        rows = picks[a:z].flatten()  # [tiles n]
        sure = (call.off + start + a * tile) // pool  # all of them see the keys before
        seen = -(-(call.off + min(start + z * tile, stop)) // pool)
        some = None if bias is None else bias[..., :seen]
        scored = logits(
            call.q[:, :, rows].to(keys.dtype), keys[:, :, :seen], scale=call.scale, softcap=call.softcap, bias=some
        ).float()
        last = torch.arange(sure + 1, seen + 1, device=device) * pool - 1  # of the keys in a mean
        scored[..., sure:].masked_fill_(last > (call.off + rows)[:, None], -torch.inf)
        yield a, scored.softmax(-1).nan_to_num_(0.0).unflatten(2, (-1, n))

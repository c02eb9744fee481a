"""Would compiled flex_attention beat the torch executor on a CPU? Both on the same block lists, flex without a lse.

PYTHONPATH=. python benchmarks/ops/flex_cpu.py bfloat16 16384     # seconds of one thread, taken in turns
"""

import sys
import time
from argparse import Namespace

import torch
import torch.nn.functional as F
from bench import Shape, inputs, selection
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hfpatch.ops import attend, flex_executor
from hfpatch.ops.call import Problem


def widened(mask: BlockMask, columns: int) -> BlockMask:
    """The same mask with index rows as long as the CPU's kernel demands: one entry per key block."""

    def wide(t: Tensor) -> Tensor:
        return F.pad(t, (0, columns - t.shape[-1]))

    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks, wide(mask.kv_indices), mask.full_kv_num_blocks, wide(mask.full_kv_indices),
        BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod, seq_lengths=mask.seq_lengths, compute_q_blocks=False,
    )  # fmt: skip


def main() -> None:
    """8/2 heads of 64, 1024 keys kept in blocks of 64."""
    dtype, length = sys.argv[1], int(sys.argv[2])
    args = Namespace(batch=1, heads=8, kv_heads=2, dim=64, keys=1024, block=64, sink=4, dtype=dtype, device="cpu")
    torch.set_num_threads(1)
    q, k, v = inputs(length, length, args)
    sel = selection(Shape("prefill", "blocks", length), length, args)
    mask = widened(flex_executor.block_mask(Problem(q, k, v, sel, 0.125)), -(-length // 64))
    calls = {
        "flex": lambda: flex_executor.compiled()(q, k, v, block_mask=mask, scale=0.125, enable_gqa=True).transpose(
            1, 2
        ),
        "torch": lambda: attend(q, k, v, selection=sel, scale=0.125, executor="torch").out,
    }
    flex, ours = (call().float() for call in calls.values())
    print(f"relative difference {((flex - ours).norm() / ours.norm()).item():.1e}")
    for _ in range(5):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            print(f"{name:<6}{time.thread_time() - start:.3f} s", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()

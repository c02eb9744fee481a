"""Several processes working on one run, as `accelerate launch` starts them."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from .results import JOURNAL, Journal

WAIT = timedelta(days=2)


@dataclass(frozen=True)
class Shard:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Shard":
        """As set by accelerate or torchrun; one process otherwise."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def device(self) -> str | None:
        """The accelerator this process uses; None on a CPU and for a single process."""
        import torch

        if self.world == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=WAIT)
        dist.barrier()

    def leave(self) -> None:
        """Tell the others that this process is about to end."""
        import torch.distributed as dist

        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def journal(self, out: Path, run: dict[str, Any]) -> Journal:
        """The journal this process writes to."""
        name = JOURNAL if self.world == 1 else f"cells.{self.rank}.jsonl"
        return Journal(out / name, run)


def merge_journals(main: Journal) -> None:
    """Take over what the journals of several processes hold, and remove them."""
    for path in sorted(main.path.parent.glob("cells.*.jsonl")):
        part = Journal(path, main.run).open()
        for key, line in part.done.items():
            if key not in main.done:
                main.add(key, {k: v for k, v in line.items() if k != "cell"})
        path.unlink()

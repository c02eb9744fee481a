"""Several processes working on one run, as `accelerate launch` starts them."""

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hfpatch.launch import launched, meet

from ..errors import EvaluationError
from .journal import JOURNAL, Journal

WAIT = timedelta(days=2)


@dataclass(frozen=True)
class Shard:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Shard":
        """As set by accelerate or torchrun; one process otherwise. Raises ConfigError."""
        found = launched()
        return cls(found.rank, found.world)

    @property
    def device(self) -> str | None:
        """The accelerator this process uses; None on a CPU and for a single process."""
        import torch

        if self.world == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{launched().local % torch.cuda.device_count()}"

    def barrier(self) -> None:
        """Wait until all processes are here. Raises ConfigError, EvaluationError when one of them has ended."""
        if self.world == 1:
            return
        import torch.distributed as dist

        meet(WAIT)
        try:
            dist.barrier()
        except RuntimeError as error:
            raise EvaluationError("Another process of this launch has ended; see what it said.") from error

    def leave(self) -> None:
        """Tell the others that this process is about to end."""
        import torch.distributed as dist

        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def journal(self, out: Path, run: dict[str, Any]) -> Journal:
        """The journal this process writes to."""
        name = JOURNAL if self.world == 1 else f"cells.{self.rank}.jsonl"
        return Journal(out / name, run)


def shard_journals(out: Path) -> list[Path]:
    """Journals that the processes of a launch have left."""
    return sorted(p for p in out.glob("cells.*.jsonl") if re.fullmatch(r"cells\.[0-9]+\.jsonl", p.name))


def merge_journals(main: Journal) -> None:
    """Take over what the journals of several processes hold, and remove them."""
    for path in shard_journals(main.path.parent):
        part = Journal(path, main.run).open()
        for key, line in part.done.items():
            if key not in main.done:
                main.add(key, {k: v for k, v in line.items() if k != "cell"})
        part.remove()

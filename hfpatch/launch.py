"""Which process of a launch this is, as accelerate and torchrun tell it in the environment."""

import os
from dataclasses import dataclass
from datetime import timedelta

from .errors import ConfigError

UNSET = ("", "-1")  # what some launchers write for a single process


@dataclass(frozen=True)
class Launch:
    """This process is number `rank` of `world`, and number `local` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def launched() -> Launch:
    """What the environment says; one process when it says nothing. Raises ConfigError."""
    found = Launch(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0))
    if found.rank >= found.world:
        raise ConfigError(
            f"The environment says RANK={found.rank} of WORLD_SIZE={found.world}, counted from 0; unset both, or "
            "start with accelerate launch or torchrun."
        )
    return found


def meet(wait: timedelta | None = None) -> None:
    """Join the other processes of the launch, over gloo. Raises ConfigError."""
    from torch import distributed

    if distributed.is_initialized():
        return
    try:
        distributed.init_process_group("gloo", timeout=wait)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"The processes of this launch cannot reach each other ({reason:.200}); start them with accelerate launch "
            "or torchrun, or unset RANK and WORLD_SIZE."
        ) from error


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if text in UNSET:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < (name == "WORLD_SIZE"):
        raise ConfigError(f"{name}={text!r:.60} in the environment is not the number of a process; unset it.")
    return int(text)

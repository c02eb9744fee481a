"""Timing one `generate` call: seconds to the first token and per further token."""

import gc
import time

import torch

from .generation import generate_tokens
from .models import Loaded


class Stopwatch:
    """A streamer that notes when each token has reached the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token, already copied to the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def time_once(loaded: Loaded, ids: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds to the first token and per further token, of one `generate` call on `ids [1, L]`."""
    gc.collect()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    watch = Stopwatch()
    start = time.perf_counter()
    generate_tokens(loaded, ids, decode_tokens + 1, watch)
    _, first, *rest = watch.times
    return first - start, (rest[-1] - first) / len(rest)

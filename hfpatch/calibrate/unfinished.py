"""What an interrupted calibration goes on from: one safetensors file beside its results, replaced as a whole."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..cli.console import FIRST, errors
from ..errors import ConfigError, reason
from ..files.json_text import load_json
from ..files.output import own_folder, write_bytes
from ..version import __version__

STATE_FILE = "unfinished.safetensors"
SECONDS = 60.0  # of work that a killed process loses at most, give or take a step
SAMPLED = 64  # numbers of every weight that go into the mark of a model
Part = tuple[dict[str, Any], dict[str, Tensor]]


@contextmanager
def calibration_folder(out: Path, files: Sequence[str]) -> Iterator[None]:
    """A block that has `out` to itself and writes `files` there; Ctrl-C says what of it was kept, and how to go on."""
    try:
        with own_folder(out, (*files, STATE_FILE)):
            yield
    except KeyboardInterrupt as end:
        if FIRST:
            there = f"{out} still holds what an earlier start has kept; the same command goes on from there."
            nothing = there if (out / STATE_FILE).is_file() else "the work had not begun, so nothing was kept."
            told = end.__dict__.get("__notes__", [nothing])[-1]
            errors.print(f"hfpatch: interrupted; {told}", soft_wrap=True)
        raise


class Unfinished:
    """The state of one run in `folder`; without a folder nothing is read or written.

    `run` is all that its outcome depends on, as plain data; a state of another run is refused. `of` says in words what
    is counted, such as "steps".
    """

    def __init__(
        self, folder: str | Path | None, run: Mapping[str, Any], of: str, total: int, writes: bool = True
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.of, self.total, self.writes = of, total, writes
        self.run = json.loads(json.dumps({"hfpatch": __version__, **run}))
        self.done = self.saved = 0
        self._whole, self._last = True, time.monotonic()
        self._part: Callable[[], Part] | None = None

    def load(self) -> Part | None:
        """Data and tensors of an earlier start of this run; None if there is none.

        Raises ConfigError when the file cannot be read or belongs to another run.
        """
        file = self.folder and self.folder / STATE_FILE
        if not file or not file.exists():
            return None
        if not file.is_file():  # reading a device or a pipe may never end
            raise ConfigError(f"{file} is not a file; use another folder.")
        data, tensors = _read(file)
        theirs, done = data.get("run"), data.get("done")
        if not isinstance(theirs, dict) or not isinstance(done, int) or not isinstance(data.get("part"), dict):
            raise ConfigError(f"{file} was not written by a calibration; use another folder, or --fresh.")
        if theirs != self.run:
            other = ", ".join(sorted(k for k in {*theirs, *self.run} if theirs.get(k) != self.run.get(k)))
            raise ConfigError(
                f"{self.folder} holds an unfinished run with other settings ({other:.300}); use another folder, or "
                "--fresh."
            )
        if not 0 < done <= self.total:
            raise ConfigError(f"{file} is damaged (it counts {done} of {self.total}); begin anew with --fresh.")
        self.done = self.saved = done
        return data["part"], tensors

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """A block that takes a state over. Raises ConfigError where it does not fit."""
        try:
            yield
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.folder} holds a state that does not fit this model; use another folder, or --fresh."
            ) from error

    @contextmanager
    def keeping(self, part: Callable[[], Part]) -> Iterator[None]:
        """A block of steps, whose state `part` is written now and then, and when the block is left by an exception.

        The exception gets a note that says what was kept.
        """
        self._part, self._last = part, time.monotonic()
        try:
            yield
        except BaseException as end:
            end.__dict__.setdefault("__notes__", []).append(self._kept())  # add_note, which Python 3.10 has not
            raise

    @contextmanager
    def step(self) -> Iterator[None]:
        """A block that changes the state: all of it is one step, nothing is written in its midst."""
        self._whole = False
        yield
        self.done += 1
        self._whole = True
        if time.monotonic() - self._last >= SECONDS:
            self.save()

    def save(self) -> None:
        """Write the state, so that a reader finds the old one or the new one."""
        if self.folder is None or not self.writes or self._part is None or self.done == self.saved:
            return
        done = self.done
        data, tensors = self._part()
        text = json.dumps({"run": self.run, "done": done, "part": data})
        own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        write_bytes(self.folder / STATE_FILE, save(own, {"state": text}))
        self.saved, self._last = done, time.monotonic()

    def _kept(self) -> str:
        try:
            if self._whole:
                self.save()
        except OSError as error:
            return f"what was done since step {self.saved} could not be kept ({reason(error)})."
        if not self.saved:
            return f"it was before the first of {self.total} {self.of}, so nothing was kept."
        return (
            f"{self.saved} of {self.total} {self.of} are kept in {self.folder}; the same command goes on from there."
        )


def finish(folder: Path) -> None:
    """Remove the state of a run whose results have been written."""
    (folder / STATE_FILE).unlink(missing_ok=True)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as held:
            data = load_json((held.metadata() or {})["state"])
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # whatever a damaged file makes of the library
        raise ConfigError(f"{file} is damaged ({type(error).__name__}); begin anew with --fresh.") from error
    return data if isinstance(data, dict) else {}, tensors


def model_mark(model: nn.Module) -> str:
    """A digest of every weight's name, shape, dtype and a few of its numbers."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        if isinstance(t, Tensor):
            digest.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
            if not t.is_meta and t.numel():
                flat = t.detach().reshape(-1)
                digest.update(_bytes(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].cpu().double()))
    return digest.hexdigest()


def data_mark(tensors: Iterable[Tensor], words: Any = None) -> str:
    """A digest of tensors in their order, and of plain data."""
    digest = hashlib.sha256(json.dumps(words).encode())
    for t in tensors:
        digest.update(f"{tuple(t.shape)} {t.dtype}\n".encode())
        digest.update(_bytes(t))
    return digest.hexdigest()


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().numpy().tobytes()


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names that begin with `prefix`."""
    return {prefix + name: t for name, t in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of every parameter, as `<number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{name}": torch.as_tensor(t) for n, own in state.items() for name, t in own.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what `optimizer_tensors` gave. Raises ValueError where it is not of these parameters."""
    sizes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        number, _, name = key.partition(".")
        if t.dim() and t.shape != sizes[int(number)]:
            raise ValueError(f"{key} is of another shape")
        state.setdefault(int(number), {})[name] = t
    if any(set(own) != {"step", "exp_avg", "exp_avg_sq"} for own in state.values()):
        raise ValueError("this is not what Adam remembers")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

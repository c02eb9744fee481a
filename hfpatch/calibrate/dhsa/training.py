"""Trains the boundary predictor of `dhsa` on a model's own attention."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...api import patched
from ...config.patch_config import PatchConfig
from ...core.call import AttentionCall
from ...core.selection import Selection
from ...errors import ConfigError
from ...methods.dhsa.labels import mass_ratio, sentence_starts, targets
from ...methods.dhsa.method import Dhsa, DhsaConfig
from ...methods.dhsa.predictor import BoundaryPredictor
from ..training_state import STATE_FILE, load_state, of_this_model, save_state

STATE = ("step", "samples", "recipe", "layers", "predictor", "optimizer")
GRID = torch.arange(-30, 31) / 10
LABELS = ("sentences", "mass")
Advance = Callable[[], None]
Sample = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Recipe:
    """How to train: texts of `length` tokens, `validation` share of them kept aside, every layer in every step.

    `labels` are where sentences and lines begin, or ("mass") where the attention-mass ratio is at least beta, the
    paper's. Focal loss (gamma, positive_weight) and Adam are the paper's code's; its learning rate of 1e-4 is for
    10,000 texts, a few hundred want more.
    """

    labels: str = "sentences"
    length: int = 2048
    epochs: int = 2
    rate: float = 1e-3
    window: int = 4
    width: int | None = 64
    heads: int = 4
    hidden: int = 256
    beta: float = 2.0
    gamma: float = 2.0
    positive_weight: float = 1.3
    validation: float = 0.1
    save_every: int = 50
    seed: int = 42


@dataclass(frozen=True)
class Quality:
    """Exact-position score of the predictor on the texts kept aside, at the logit `threshold` with the best F1."""

    threshold: float
    precision: float
    recall: float
    f1: float
    positives: float

    def __str__(self) -> str:
        return (
            f"F1 {self.f1:.3f} (precision {self.precision:.3f}, recall {self.recall:.3f}) at logit "
            f"{self.threshold:.2f}; {self.positives:.1%} of positions are boundaries"
        )


def focal_loss(logits: Tensor, wanted: Tensor, gamma: float = 2.0, positive_weight: float = 1.3) -> Tensor:
    """Mean focal binary cross-entropy of `logits [...]` against `wanted [...]`, whose nan entries do not count."""
    valid = ~wanted.isnan() & logits.isfinite()
    x, y = logits[valid], wanted[valid]
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none", pos_weight=x.new_tensor(positive_weight))
    p = torch.sigmoid(x)
    return (loss * (1 - torch.where(y > 0.5, p, 1 - p)) ** gamma).mean()


def layer_calls(model: nn.Module, ids: Tensor, use: Callable[[AttentionCall], None], layers: Any = None) -> None:
    """Run the model on `ids [1, L]` and show `use` every full-attention call, layer by layer, unchanged and dense."""
    config = DhsaConfig(boundaries="fixed", budget=1.0, layers=layers)

    def watch(call: AttentionCall, selection: Selection | None) -> None:
        use(call)

    with patched(model, config) as patch, torch.no_grad():
        for method in patch.methods:
            if isinstance(method, Dhsa):
                method.watch = watch
        model(ids, use_cache=False)


def calibrate_dhsa(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    layers: int | str | list[int] | None = None,
    resume: bool = True,
    advance: Advance | None = None,
) -> Quality:
    """Train a boundary predictor for `model` on `texts` and write it to the folder `out` as a patch config.

    Continues an interrupted run of the same recipe when `resume`. To use it, patch with
    `PatchConfig.from_pretrained(out)`, or "dhsa" with boundaries="predictor" and predictor=out. Raises ConfigError.
    """
    r, out = recipe or Recipe(), Path(out)
    if r.labels not in LABELS:
        raise ConfigError(f"There are no labels {r.labels!r}; choose one of {', '.join(LABELS)}.")
    samples = _tokenise(tokenizer, texts, r, next(model.parameters()).device)
    aside = max(1, round(len(samples) * r.validation))
    training, validation = samples[aside:], samples[:aside]
    if not training:
        raise ConfigError(f"{len(samples)} of the texts have {8 * r.window} tokens or more; give at least two.")
    run = _Run(model, r, layers, out)
    done = run.load(len(training)) if resume else 0
    for step, sample in enumerate(_schedule(training, r)):
        if step >= done:
            run.step(sample)
            if (step + 1) % r.save_every == 0:
                run.save(step + 1, len(training))
        if advance is not None:
            advance()
    quality = run.validate(validation)
    config = DhsaConfig(boundaries="predictor", threshold=quality.threshold, boundary_window=r.window, layers=layers)
    tensors = {f"0.{name}": t for name, t in run.predictor.tensors().items()}
    name = getattr(getattr(model, "config", None), "name_or_path", None) or None
    PatchConfig([config], name, tensors).save_pretrained(out)
    (out / STATE_FILE).unlink(missing_ok=True)
    return quality


def _tokenise(tokenizer: Any, texts: Sequence[str], r: Recipe, device: torch.device) -> list[Sample]:
    """Token ids `[1, L]` of the texts and, unless the model's attention makes them, their labels `[L]`."""
    asked: dict[str, Any] = {"return_tensors": "pt", "truncation": True, "max_length": r.length}
    if r.labels == "sentences":
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError("This tokenizer does not say where its tokens stand in the text; use labels 'mass'.")
        asked["return_offsets_mapping"] = True
    found: list[Sample] = []
    for text in texts:
        made = tokenizer(text, **asked)
        if made.input_ids.shape[1] >= 8 * r.window:
            wanted = None
            if r.labels == "sentences":
                wanted = sentence_starts(text, made.offset_mapping[0, :, 0].tolist()).to(device)
            found.append((made.input_ids.to(device), wanted))
    return found


def _schedule(samples: list[Sample], r: Recipe) -> Iterator[Sample]:
    """The samples of all epochs, each in an order of its own; the same in a resumed run."""
    for epoch in range(r.epochs):
        order = list(range(len(samples)))
        random.Random(r.seed + epoch).shuffle(order)
        yield from (samples[n] for n in order)


class _Run:
    """Predictor, optimiser and where they are saved."""

    def __init__(self, model: nn.Module, recipe: Recipe, layers: Any, out: Path) -> None:
        self.model, self.recipe, self.layers, self.out = model, recipe, layers, out
        self._predictor: BoundaryPredictor | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def predictor(self) -> BoundaryPredictor:
        """The predictor; made at the first call, when the width of the keys is known."""
        if self._predictor is None:
            raise ConfigError("No call reached a full-attention layer; choose other `layers`.")
        return self._predictor

    def _build(self, call: AttentionCall) -> None:
        r = self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(r.seed)
            made = BoundaryPredictor(
                call.Hkv * call.k.shape[3], window=r.window, width=r.width, heads=r.heads, hidden=r.hidden
            )
        self._predictor = made.to(call.k.device)
        self._optimizer = torch.optim.Adam(made.parameters(), lr=r.rate)
        if self._restored is not None:
            with of_this_model(self.out):
                made.load_state_dict(self._restored["predictor"])
                self._optimizer.load_state_dict(self._restored["optimizer"])

    def step(self, sample: Sample) -> None:
        """One optimiser step on one text, the mean loss over all layers."""
        calls = 0

        def learn(call: AttentionCall) -> None:
            nonlocal calls
            calls += 1
            pair = self._logits_and_targets(call, sample[1])
            focal_loss(*pair, self.recipe.gamma, self.recipe.positive_weight).backward()

        self._each_call(sample[0], learn, train=True)
        for p in self.predictor.parameters():
            if p.grad is not None:
                p.grad /= max(1, calls)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _logits_and_targets(self, call: AttentionCall, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        if wanted is None:
            wanted = targets(mass_ratio(call, self.recipe.window), self.recipe.beta)[0].to(torch.float32)
        return self.predictor.score(call.k.detach())[0], wanted

    def _each_call(self, ids: Tensor, use: Callable[[AttentionCall], None], *, train: bool) -> None:
        def seen(call: AttentionCall) -> None:
            if self._predictor is None:
                self._build(call)
            with torch.enable_grad() if train else nullcontext():
                use(call)

        layer_calls(self.model, ids, seen, self.layers)

    @torch.no_grad()
    def validate(self, samples: list[Sample]) -> Quality:
        """Precision, recall and F1 over all layers of the texts kept aside."""
        counts = torch.zeros(3, len(GRID), dtype=torch.float64)
        total = 0

        def count(call: AttentionCall, wanted: Tensor | None) -> None:
            nonlocal total
            logits, labels = (t.cpu() for t in self._logits_and_targets(call, wanted))
            valid = ~labels.isnan() & logits.isfinite()
            x, y = logits[valid], labels[valid] > 0.5
            found = x[None] > GRID[:, None]
            counts.add_(torch.stack([(found & y).sum(1), found.sum(1), y.sum().expand(len(GRID))]))
            total += len(x)

        for ids, wanted in samples:
            self._each_call(ids, partial(count, wanted=wanted), train=False)
        hit, found, real = counts
        precision, recall = hit / found.clamp_min(1), hit / real.clamp_min(1)
        f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        n = int(f1.argmax())
        share = real / max(1, total)
        return Quality(*(round(float(t[n]), 4) for t in (GRID, precision, recall, f1, share)))

    def save(self, step: int, samples: int) -> None:
        """Write what a resumed run needs."""
        data = {
            "step": step, "samples": samples, "recipe": vars(self.recipe), "layers": self.layers,
            "predictor": self.predictor.state_dict(), "optimizer": self._optimizer.state_dict(),
        }  # fmt: skip
        save_state(self.out, data)

    def load(self, samples: int) -> int:
        """Steps done by an interrupted run in this folder; 0 if there is none. Raises ConfigError if it differs."""
        data = load_state(self.out, STATE)
        if data is None:
            return 0
        if (data["recipe"], data["samples"], data["layers"]) != (vars(self.recipe), samples, self.layers):
            raise ConfigError(
                f"{self.out} holds an unfinished run with other settings; use another folder or --fresh."
            )
        self._restored = data
        return int(data["step"])


def haystack_texts(source: str, count: int, tokens: int, tokenizer: Any, seed: int = 0) -> list[str]:
    """Texts of nearly `tokens` tokens from `source` (grammar, prose, a file) with hidden facts and their questions."""
    from ...text.grammar import TASKS
    from ...text.sources import sentences

    def size(words: str) -> int:
        return len(tokenizer(words).input_ids)

    found = []
    for n in range(count):
        rng = random.Random(f"dhsa-{seed}-{n}")
        kinds = rng.sample(sorted(set(TASKS) - {"fewshot"}), 3)
        tasks = [TASKS[kind](rng) for kind in kinds]
        turns = "\n".join(prompt + answer for task in tasks for prompt, answer in task.turns)
        room = tokens - size(" ".join(fact for task in tasks for fact in task.facts)) - size(turns)
        stream, body = sentences(source, rng), []
        while room > 0:
            body.append(next(stream))
            room -= size(" " + body[-1])
        body = body[:-1]
        for task in tasks:
            for at, fact in zip(sorted(rng.randint(0, len(body)) for _ in task.facts), task.facts, strict=True):
                body.insert(at, fact)
        found.append(" ".join(body) + "\n" + turns)
    return found

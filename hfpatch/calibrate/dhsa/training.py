"""Trains the boundary predictor of `dhsa` on a model's own attention."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...api import patched
from ...config.patch_config import PatchConfig
from ...core.call import AttentionCall
from ...core.selection import Selection
from ...errors import ConfigError, NothingLearnedError
from ...methods.dhsa.labels import mass_ratio, sentence_starts, targets
from ...methods.dhsa.method import Dhsa, DhsaConfig
from ...methods.dhsa.predictor import BoundaryPredictor
from ..unfinished import (
    Part,
    Unfinished,
    data_mark,
    finish,
    model_mark,
    optimizer_tensors,
    restore_optimizer,
    under,
    with_prefix,
)
from .quality import FEWEST, LEAST, Counts, Quality

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
    seed: int = 42


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
    force: bool = False,
    advance: Advance = lambda: None,
) -> Quality:
    """Train a boundary predictor for `model` on `texts` and write it to the folder `out` as a patch config.

    Continues an interrupted run of the same model, texts and recipe when `resume`. To use it, patch with
    `PatchConfig.from_pretrained(out)`, or "dhsa" with boundaries="predictor" and predictor=out. Raises ConfigError,
    and NothingLearnedError when it is no better than a constant, unless `force`.
    """
    r, out = recipe or Recipe(), Path(out)
    training, validation = _parted(tokenizer, texts, r, next(model.parameters()).device)
    run = _Run(model, r, layers, out, training, validation)
    before = run.load() if resume else 0
    for _ in range(before):
        advance()
    with run.kept.keeping(run.part):
        for step, sample in enumerate(_schedule(training, r)):
            if step >= before:
                run.step(sample)
                advance()
        quality = run.validate(validation)
        if not quality.learned and not force:
            run.kept.save()
            raise NothingLearnedError(
                f"Nothing was saved, for the predictor learned next to nothing: {quality}. All of that interval has "
                f"to lie above {LEAST:.0%}, from {FEWEST} blocks or more; give more texts, more epochs or another "
                "rate with --fresh, or repeat the command with --force to save this one."
            )
        config = DhsaConfig(
            boundaries="predictor", threshold=quality.threshold, boundary_window=r.window, layers=layers
        )
        tensors = with_prefix("0.", run.predictor.tensors())
        name = getattr(getattr(model, "config", None), "name_or_path", None) or None
        PatchConfig([config], name, tensors).save_pretrained(out)
    finish(out)
    return quality


def training_steps(tokenizer: Any, texts: Sequence[str], recipe: Recipe) -> int:
    """How often `calibrate_dhsa` advances on these texts."""
    return recipe.epochs * len(_parted(tokenizer, texts, recipe, torch.device("cpu"))[0])


def _parted(
    tokenizer: Any, texts: Sequence[str], r: Recipe, device: torch.device
) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and those kept aside. Raises ConfigError."""
    if r.labels not in LABELS:
        raise ConfigError(f"There are no labels {r.labels!r}; choose one of {', '.join(LABELS)}.")
    samples = _tokenise(tokenizer, texts, r, device)
    aside = max(1, round(len(samples) * r.validation))
    if len(samples) <= aside:
        raise ConfigError(f"{len(samples)} of the texts have {8 * r.window} tokens or more; give at least two.")
    return samples[aside:], samples[:aside]


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

    def __init__(
        self, model: nn.Module, recipe: Recipe, layers: Any, out: Path, training: list[Sample], aside: list[Sample]
    ) -> None:
        self.model, self.recipe, self.layers = model, recipe, layers
        self._predictor: BoundaryPredictor | None = None
        self._restored: dict[str, Tensor] | None = None
        every = [t for sample in (*training, *aside) for t in sample if t is not None]
        what = {"calibration": "dhsa", "recipe": vars(recipe), "layers": layers}
        marks = {"model": model_mark(model), "texts": data_mark(every)}
        self.kept = Unfinished(out, {**what, **marks}, "steps", recipe.epochs * len(training))

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
            with self.kept.fitting():
                made.load_state_dict(under("predictor.", self._restored))
                restore_optimizer(self._optimizer, under("optimizer.", self._restored))

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
        with self.kept.step():
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
        counts = Counts()
        for ids, wanted in samples:

            def count(call: AttentionCall, wanted: Tensor | None = wanted) -> None:
                logits, labels = self._logits_and_targets(call, wanted)
                counts.add(call.layer, logits.cpu(), labels.cpu())

            counts.text(ids.shape[1])
            self._each_call(ids, count, train=False)
        return counts.quality()

    def part(self) -> Part:
        """What a resumed run needs."""
        found = with_prefix("predictor.", self.predictor.state_dict())
        return {}, {**found, **with_prefix("optimizer.", optimizer_tensors(self._optimizer))}

    def load(self) -> int:
        """Steps done by an interrupted run in the folder; 0 if there is none. Raises ConfigError if it is another."""
        found = self.kept.load()
        if found is not None:
            self._restored = found[1]
        return self.kept.done


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

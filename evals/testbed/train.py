"""Train the embedded model: `python -m hfpatch.evals.testbed.train --out DIR --minutes N --books DIR`."""

import argparse
import json
import random
import signal
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from . import init
from .curriculum import REPLAYED_ONLY, STAGES
from .data import Batch, Sampler, read_books
from .tokenizer import build

EAGER_LENGTH = 512
LM_SHARE, LM_WEIGHT = 0.08, 0.3


@dataclass
class State:
    """What a resumed run continues from, besides weights and optimizer state."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)


def hidden_states(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Final hidden states (batch, length, width) with plain causal attention whatever the positions.

    The model's own forward takes a jump in the positions for the start of another packed sequence.
    """
    core, length = model.model, batch.ids.shape[1]
    states = core.embed_tokens(batch.ids)
    rotary = core.rotary_emb(states, batch.positions)
    eager = length <= EAGER_LENGTH and not batch.ids.is_cuda
    model.config._attn_implementation = "eager" if eager else "sdpa"
    mask = None
    if eager or batch.key_bias is not None:
        mask = torch.full((length, length), -1e9, device=batch.ids.device).triu(1)[None, None]
        if batch.key_bias is not None:
            mask = mask + batch.key_bias[:, None, None, :]
        mask = mask.to(torch.bfloat16) if not eager else mask
    for layer in core.layers:
        states = layer(states, attention_mask=mask, position_embeddings=rotary, position_ids=batch.positions)
    return core.norm(states)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(hidden, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)]


class Trainer:
    """One run: state, model, data, log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        self.work = self.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        books = read_books(Path(options.books)) if options.books else []
        self.tokenizer = self._tokenizer(books)
        self.model = init.create(len(self.tokenizer), options.seed).to(options.device)
        self.optimizers = optimizers(self.model)
        self.state = State()
        if options.resume and (self.work / "state.json").exists():
            self._load()
        seed = options.seed + self.state.step
        self.sampler, self.rng = Sampler(self.tokenizer, books, seed), random.Random(seed)
        torch.manual_seed(seed)
        self.recent: dict[str, list[float]] = defaultdict(list)
        self.trivial = torch.zeros(len(self.tokenizer), dtype=torch.bool, device=options.device)
        self.trivial[[self.sampler.encode(mark)[0] for mark in (" ", ".", ";", " =")]] = True
        if options.stage is not None:
            self.state.stage, self.state.stage_step = options.stage, self.state.step

    def _tokenizer(self, books: list[str]) -> PreTrainedTokenizerBase:
        if not (self.options.resume and (self.out / "tokenizer.json").exists()):
            return build(book[20_000:220_000] for book in books)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.out, local_files_only=True)
        for trace in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(trace, None)
        return tokenizer

    def _load(self) -> None:
        weights = load_file(self.work / "weights.safetensors", device=self.options.device)
        self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()
        self.state = State(**json.loads((self.work / "state.json").read_text()))
        if not self.options.fresh_optimizer:
            saved = torch.load(self.work / "optimizer.pt", weights_only=True)
            for optimizer, values in zip(self.optimizers, saved, strict=True):
                optimizer.load_state_dict(values)

    def save(self) -> None:
        """Checkpoint to resume from, and a bf16 export to load."""
        weights = {k: v.contiguous() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        save_file(weights, self.work / "weights.safetensors")
        torch.save([o.state_dict() for o in self.optimizers], self.work / "optimizer.pt")
        (self.work / "state.json").write_text(json.dumps(asdict(self.state)))
        export = LlamaForCausalLM(init.config(len(self.tokenizer))).bfloat16()
        export.load_state_dict(self.model.state_dict())
        export.save_pretrained(self.out)
        self.tokenizer.save_pretrained(self.out)

    def rate(self) -> float:
        """Warm-up, constant, then linear decay over the last part of the time."""
        done = self.state.seconds / 60 / self.options.minutes
        decay = min(1.0, max(0.02, (1 - done) / self.options.decay))
        return self.options.lr * decay * min(1.0, (self.state.step + 1) / 50)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, float, float]:
        """Answer loss on all answer tokens plus language modelling on a share of the other positions."""
        batch = batch.to(self.options.device)
        ids = batch.ids
        with torch.autocast(torch.device(self.options.device).type, torch.bfloat16):
            states = hidden_states(self.model, batch)[:, :-1]
            targets, answers = ids[:, 1:], batch.labels[:, 1:] >= 0
            plain = (
                (torch.rand(targets.shape, device=ids.device) < LM_SHARE) & ~answers & (targets != self.sampler.pad)
            )
            logits = self.model.lm_head(states[answers]).float()
            lm_logits = self.model.lm_head(states[plain]).float()
        answer_loss = torch.nn.functional.cross_entropy(logits, targets[answers])
        lm_loss = torch.nn.functional.cross_entropy(lm_logits, targets[plain])
        scored = ~self.trivial[targets[answers]]
        accuracy = (logits.argmax(-1) == targets[answers])[scored].float().mean().item()
        return answer_loss + LM_WEIGHT * lm_loss, accuracy, answer_loss.item()

    def step(self) -> None:
        """One update; now and then on an earlier stage, so that nothing is forgotten."""
        stage = STAGES[self.state.stage]
        if self.state.stage and self.rng.random() < self.options.replay:
            stage = self.rng.choice((*STAGES[: self.state.stage], *REPLAYED_ONLY))
        batch = self.sampler.batch(stage)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
        loss, accuracy, answer_loss = self._loss(batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.state.step += 1
        self.state.tokens += batch.ids.numel()
        for name, value in ((f"acc{stage.length}", accuracy), (f"loss{stage.length}", answer_loss)):
            self.recent[name] = [*self.recent[name][-39:], value]

    def _advance(self) -> None:
        key = f"acc{STAGES[self.state.stage].length}"
        fresh = self.state.step - self.state.stage_step >= 100 and len(self.recent[key]) >= 40
        last = self.state.stage >= min(len(STAGES) - 1, self.options.last_stage)
        if fresh and not last and sum(self.recent[key]) / 40 > self.options.bar:
            self.state.stage, self.state.stage_step = self.state.stage + 1, self.state.step

    def _log(self) -> None:
        means = {name: round(sum(v) / len(v), 4) for name, v in sorted(self.recent.items()) if v}
        self.state.accuracy = {k: v for k, v in means.items() if k.startswith("acc")}
        row = {**asdict(self.state), **means, "lr": self.rate()}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        minutes, millions = self.state.seconds / 60, self.state.tokens / 1e6
        print(f"{self.state.step} {minutes:.1f}m {millions:.2f}M stage {self.state.stage} {shown}", flush=True)

    def run(self) -> None:
        """Train until the time is used; gaps in which the process was stopped do not count."""
        usual, saved = 2.0, self.state.seconds
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
        while self.state.seconds < self.options.minutes * 60 and not stopped:
            start = time.monotonic()
            self.step()
            spent = time.monotonic() - start
            self.state.seconds += min(spent, 5 * usual)
            usual = 0.9 * usual + 0.1 * min(spent, 5 * usual)
            if self.state.step % self.options.log_every == 0:
                self._log()
                self._advance()
            if self.state.seconds - saved > 180:
                self.save()
                saved = self.state.seconds
        self._log()
        self.save()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--books", help="folder of .txt novels; grammar only without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fresh-optimizer", action="store_true")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.4, help="last part of the time, with a falling rate")
    parser.add_argument("--bar", type=float, default=0.9, help="answer accuracy that opens the next stage")
    parser.add_argument("--replay", type=float, default=0.4, help="share of batches from earlier stages")
    parser.add_argument("--stage", type=int, help="start at this stage")
    parser.add_argument("--last-stage", type=int, default=len(STAGES) - 1)
    parser.add_argument("--log-every", type=int, default=50)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    Trainer(options).run()


if __name__ == "__main__":
    main()

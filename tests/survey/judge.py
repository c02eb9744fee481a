"""Whether hfpatch is right on a type: the patched model against the unpatched one under the oracle's masks."""

from __future__ import annotations

import re
import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hfpatch

from .build import build
from .kinds import kinds
from .oracle import Oracle, UnjudgedError, interface
from .outcome import Outcome, outcome
from .patterns import METHODS
from .record import Recorder
from .scenario import Scenario, fitted, long, others, pads_are_seen, prefill, relative, rows_alone
from .sizes import ELSEWHERE
from .trace import changed, tree
from .verdict import NOT_BUILT, REFUSED, RIGHT, WRONG, Verdict, short

TOLERANCE, AGREES, EFFECT = 2e-5, 1e-3, 1e-3
PADDED, STATIC = "left padding", "static cache"
_FOREIGN = re.compile(r"vision|visual|image|audio|speech|video")


def judge(name: str) -> Verdict:
    """Build a tiny model of that type, patch it, and compare."""
    verdict = Verdict(name, reason=ELSEWHERE.get(name, ""))
    if verdict.reason:
        return verdict
    start = time.process_time()
    try:
        model = build(name)
        verdict.verdict = WRONG  # whatever is raised from here on
        Judge(model, verdict).run()
    except Exception as error:
        verdict.reason = short(error)
    verdict.seconds = time.process_time() - start
    return verdict


class Judge:
    """The comparison of one model, and what it finds."""

    def __init__(self, model: PreTrainedModel, verdict: Verdict) -> None:
        self.model, self.verdict = model, verdict
        self.names = {module: name for name, module in model.named_modules()}
        self.patched: list[nn.Module] = []
        self.scenarios: dict[str, tuple[Scenario, float]] = {"prefill": (prefill(), 0.0)}
        self.faults: list[str] = []
        self.full = torch.zeros(0)

    def run(self) -> None:
        """Fill in the verdict."""
        first, seen, stopped = self.scenarios["prefill"][0], Recorder(), ""
        try:
            with interface(seen.wrap):
                self.full = first.run(self.model, seen)
        except Exception as error:
            stopped = f"does not run on text alone: {short(error)}"
        before = tree(self.model)
        self.verdict.kinds = kinds(self.model, seen.calls)
        try:
            hfpatch.patch_model(self.model, "streaming", **METHODS["streaming"].settings)
        except hfpatch.HfpatchError as error:
            self._refused(str(error), stopped, seen, not changed(before, tree(self.model)))
            return
        if stopped:
            self.verdict.verdict, self.verdict.reason = NOT_BUILT, stopped
            return
        self._look(seen)
        hfpatch.unpatch_model(self.model)
        traces = changed(before, tree(self.model))
        self._look_at_the_rest(seen)
        self._find_scenarios()
        settled, steady = tree(self.model), torch.equal(first.run(self.model), self.full)
        for method in METHODS:
            self._compare(method)
        traces |= changed(settled, tree(self.model)) - changed(before, settled)  # some keep things between calls
        if traces or (steady and not torch.equal(first.run(self.model), self.full)):
            self.faults.append("after unpatching the model is not what it was")
        self.verdict.verdict = WRONG if self.faults else RIGHT
        self.verdict.reason = "; ".join(self.faults)

    def _refused(self, reason: str, stopped: str, seen: Recorder, untouched: bool) -> None:
        """hfpatch takes the type not at all: then no layer should be one it could take."""
        self.verdict.verdict, self.verdict.reason = REFUSED, re.split(r"; |\. Use", reason)[0].rstrip(".")
        plain = [] if stopped else self._plain(seen)
        if stopped:
            self.verdict.notes.append(stopped)
        if plain:
            self._wrong(f"refused ({self.verdict.reason}), but {len(plain)} layers are plain causal attention")
        if not untouched:
            self._wrong("refused, but the model is not what it was")

    def _wrong(self, reason: str) -> None:
        self.verdict.verdict, self.verdict.reason = WRONG, reason

    def _plain(self, seen: Recorder) -> list[nn.Module]:
        """Modules whose calls were plain causal attention, in one pass and token by token."""
        again = Recorder()
        try:
            with interface(again.wrap):
                long().run(self.model, again)
        except Exception:
            return seen.plain
        return [module for module in seen.plain if module in again.plain]

    def _look(self, seen: Recorder) -> None:
        """Which modules carry the patch, and whether these are the ones that should."""
        self.patched = [m for m in self.names if _implementation(m) == "hfpatch"]
        report = hfpatch.get_patch(self.model).report()
        self.verdict.patched, self.verdict.layers = report.patched, report.num_layers
        if report.patched != len(self.patched):
            self.faults.append(f"the report counts {report.patched} patched modules, not {len(self.patched)}")
        called = {call.module for call in seen.calls}
        for what, modules in (
            ("patched, but not of the text decoder", [m for m in self.patched if _FOREIGN.search(self.names[m])]),
            ("patched, but never called on text", [m for m in self.patched if m not in called]),
        ):
            self._name(what, modules)

    def _look_at_the_rest(self, seen: Recorder) -> None:
        """Whether modules were left alone that the patch could have taken."""
        if set(seen.plain) - set(self.patched):
            left = [m for m in self._plain(seen) if m not in self.patched]
            self._name("left alone, but plain causal attention", left)

    def _name(self, what: str, modules: list[nn.Module]) -> None:
        if modules:
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            self.faults.append(f"{what}: {self.names[modules[0]]}{more}")

    def _find_scenarios(self) -> None:
        """The scenarios that the unpatched model can do, each with its distance from one pass."""
        for scenario in others():
            name = scenario.name
            try:
                want = self.full if scenario.mask is None else rows_alone(self.model, self.scenarios["prefill"][0])
                fit, error = fitted(self.model, scenario, want)
                seen = error > AGREES and fit.mask is not None and pads_are_seen(self.model, fit)
            except Exception as failure:
                self.verdict.notes.append(f"unpatched: no {name} ({short(failure, 60)})")
                continue
            if seen:
                self.verdict.notes.append("unpatched: real tokens see the padding")
                continue
            if error > AGREES:
                self.verdict.notes.append(f"unpatched: {name} differs from one pass")
            self.scenarios[name] = fit, error

    def _compare(self, method: str) -> None:
        """All scenarios under that method, against the oracle."""
        outcomes: dict[str, Outcome] = {}
        wanted: dict[str, Tensor] = {}
        alone: Tensor | None = None
        chosen = [name for name in self.scenarios if method == "streaming" or name != STATIC]
        with hfpatch.patched(self.model, method, **METHODS[method].settings) as patch:
            for name in chosen:
                outcomes[name] = outcome(self.model, patch, self.scenarios[name][0])
            if PADDED in chosen and method == "streaming":
                alone = rows_alone(self.model, self.scenarios["prefill"][0])
        for name, got in outcomes.items():
            what = name if method == "streaming" else f"{method}, {name}"
            if got.error:
                self.faults.append(f"{what}: {got.error}")
                continue
            if got.empty:
                self.faults.append(f"{what}: {got.empty} layers report calls and no keys")
            self._check_acts(method, name, what, got)
            wanted |= self._check_oracle(method, name, what, got)
            if method == "streaming" and self.scenarios[name][1] < AGREES and not got.dense and name != "prefill":
                if name == PADDED:
                    self._equal(f"{what}, rows alone", got.logits, alone, name)
                    continue
                known = name in wanted and "prefill" in wanted
                own = relative(wanted[name], wanted["prefill"]) if known else 0.0
                self._equal(f"{what}, one pass", got.logits, outcomes["prefill"].logits, name, own)

    def _check_acts(self, method: str, name: str, what: str, got: Outcome) -> None:
        """Sparse in every patched layer: always dense in prompts, or always in decode steps, is never right."""
        if name not in ("prefill", "decode") or name not in METHODS[method].phases:
            if got.dense:
                self.verdict.notes.append(f"{what}: dense ({got.reasons})")
            return
        stuck = {module for module, phase in got.dense if phase == name}
        density = got.density[name]
        if stuck:
            self.faults.append(f"{what}: {len(stuck)} of {len(self.patched)} layers never act ({got.reasons})")
        elif not density < 1.0:
            self.faults.append(f"{what}: the report says density {density:.2f}")

    def _check_oracle(self, method: str, name: str, what: str, got: Outcome) -> dict[str, Tensor]:
        """The same logits as the oracle, which are given back, and the density it counts."""
        if got.partly:
            self.verdict.notes.append(f"{what}: not compared, some calls run dense and some do not")
            return {}
        oracle = Oracle(self.patched, METHODS[method], got.dense)
        try:
            with interface(oracle.wrap):
                want = self.scenarios[name][0].run(self.model, oracle)
        except UnjudgedError as unjudged:
            self.faults.append(f"{what}: {unjudged}")
            return {}
        self._equal(what, got.logits, want, name)
        if what != "prefill" or got.dense:
            return {name: want}
        if (effect := relative(want, self.full)) < EFFECT:
            self.verdict.notes.append(f"the pattern moves the logits by {effect:.0e} only")
        counted = oracle.kept / oracle.visible
        if abs(counted - got.density["prefill"]) > 1e-6:
            self.faults.append(f"the report says density {got.density['prefill']:.4f}, but it is {counted:.4f}")
        return {name: want}

    def _equal(self, what: str, got: Tensor | None, want: Tensor | None, scenario: str, oracle: float = 0.0) -> None:
        """A fault when two results are further apart than rounding, or the same without a patch, explains."""
        assert got is not None and want is not None
        error, own = relative(got, want), max(self.scenarios[scenario][1], oracle)
        self.verdict.errors[what] = error
        if error <= max(TOLERANCE, 4 * own if own < AGREES else 0.0):
            return
        if own > AGREES:
            self.verdict.notes.append(f"{what}: not judged, explicit masks alone are off by {own:.0e}")
        else:
            self.faults.append(f"{what}: off by {error:.1e}")


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)

"""What a search for `zerotuning` found, on examples it has not seen, beside its controls."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .asked import EXAMPLES, Asked
from .classification import Answers, Questions, measures
from .intervals import bootstrap, paired, wilson

if TYPE_CHECKING:
    from .zerotuning import Calibration, Outcome, Search

UNSEEN, BLANKS = "unseen", "blanks"  # examples to report on only, and their prompts with texts that mean nothing


def held_out(runs: Asked, s: "Search", o: "Outcome", rows: Tensor, searched: Tensor, heads: int) -> dict[str, Any]:
    """Held-out measures before and after, the paired differences, and the controls."""
    q, before, after = runs.questions[EXAMPLES], runs(), runs(o.gamma, o.heads)
    out: dict[str, Any] = {"n": len(rows), "before": measures(q, before, rows), "after": measures(q, after, rows)}
    change = paired(after.entropy[rows], before.entropy[rows])
    out["entropy_change"] = change
    if not q.supervised:
        return out
    for name, a in (("before", before), ("after", after)):
        out[name]["interval"] = wilson(q.right_now(a)[rows])
        corrected = q.right_among_labels(a, q.prior(a, searched))[rows]
        out[name]["prior_corrected"] = float(corrected.float().mean())
        out[name]["prior_corrected_interval"] = wilson(corrected)
    out["accuracy_change"] = paired(q.right_now(after)[rows], q.right_now(before)[rows])
    if o.heads:
        drawn = _random_heads(o, heads, s.random_draws)
        out["random_heads"] = [{"heads": d, **measures(q, runs(o.gamma, d), rows)} for d in drawn]
    return out


def _random_heads(o: "Outcome", heads: int, draws: int) -> list[list[int]]:
    rng = random.Random(o.seed)
    tries = [sorted(rng.sample(range(heads), len(o.heads))) for _ in range(10 * draws)]
    return list({tuple(t): t for t in tries if t != o.heads}.values())[:draws]


def on_unseen(runs: Asked, s: "Search", outcomes: Sequence["Outcome"], heads: int) -> list[dict[str, Any]]:
    """Unseen examples under dense attention, one factor for all heads, what was chosen, and random heads.

    The factor for all heads is searched where the others were. Priors are those of the same setting: `mean_corrected`
    by the searched examples without their answers, `content_free` by the unseen prompts' blanks, if they have some
    (arXiv 2102.09690). Differences are to dense attention, paired.
    """
    q, known, blanks = runs.questions[UNSEEN], runs.questions[EXAMPLES], runs.questions.get(BLANKS)
    rows: list[dict[str, Any]] = []
    base: dict[str, Tensor] = {}
    for name, (gamma, some) in _variants(runs, s, outcomes, heads).items():
        a, before = runs(gamma, some, UNSEEN), runs(gamma, some)
        right = {
            "accuracy": q.right_now(a),
            "valid": q.valid(a),
            "among_labels": q.right_among_labels(a),
            "mean_corrected": q.right_among_labels(a, known.prior(before, _all(known))),
        }
        if blanks is not None:
            right["content_free"] = q.right_among_labels(a, blank_prior(q, blanks, runs(gamma, some, BLANKS)))
        base = base or right
        row = {"name": name, "gamma": gamma, "heads": list(some), "n": len(q), **measures(q, a, _all(q))}
        for what, hits in right.items():
            row[what] = float(hits.float().mean())
            row[f"{what}_interval"] = wilson(hits)
            row[f"{what}_change"] = paired(hits, base[what])
        row["change_by"] = change_by(base["accuracy"], base["valid"], right["accuracy"], right["valid"])
        corrected = "content_free" if blanks is not None else "mean_corrected"
        row["accuracy_over_corrected_dense"] = paired(right["accuracy"], base[corrected])
        rows.append(row)
    return rows


def _variants(
    runs: Asked, s: "Search", outcomes: Sequence["Outcome"], heads: int
) -> dict[str, tuple[float, tuple[int, ...]]]:
    every, q = tuple(range(heads)), runs.questions[EXAMPLES]

    def score(gamma: float) -> tuple[float, float]:
        found = measures(q, runs(gamma, every), _all(q))
        return found["accuracy"], found["log_likelihood"]

    found = {"dense": (1.0, ()), "all heads": (max(s.gammas, key=score), every)}
    for o in outcomes:
        found[o.objective] = (o.gamma, tuple(o.heads))
    first = next(iter(outcomes), None)
    if first is not None and first.heads:
        for n, some in enumerate(_random_heads(first, heads, s.random_draws)):
            found[f"random heads {n}"] = (first.gamma, tuple(some))
    return found


def _all(q: Questions) -> Tensor:
    return torch.arange(len(q))


def blank_prior(q: Questions, blanks: Questions, a: Answers) -> Tensor:
    """Log of every label's mean probability `[N, C]` among an example's labels after its prompt's blanks."""
    at = {e.prompt: n for n, e in enumerate(blanks.examples)}
    rows = []
    for e, allowed in zip(q.examples, q.allowed, strict=True):
        own = a.labels[[at[b] for b in e.blanks]].masked_fill(~allowed, -torch.inf).softmax(-1)
        rows.append(own.mean(0).log())
    return torch.stack(rows).masked_fill(~q.allowed, 0.0)


def change_by(right0: Tensor, valid0: Tensor, right1: Tensor, valid1: Tensor) -> dict[str, list[float]]:
    """The change of accuracy as a sum, with 95 % bootstrap intervals: by more valid answers, and by better ones.

    Accuracy is validity times accuracy among valid answers; each factor's change is weighed by the other's mean.
    Where nothing is valid, its accuracy counts as that of the other side.
    """
    sums = bootstrap(torch.stack([right0, valid0, right1, valid1], -1).double())
    r0, v0, r1, v1 = sums.unbind(-1)
    known0, known1 = torch.where(v0 > 0, r0 / v0, r1 / v1), torch.where(v1 > 0, r1 / v1, r0 / v0)
    good0, good1 = known0.nan_to_num(), known1.nan_to_num()
    parts = {"validity": (v1 - v0) * (good0 + good1) / 2, "accuracy_of_valid": (good1 - good0) * (v0 + v1) / 2}
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: [float(x[0]), *torch.quantile(x[1:], tails).tolist()] for name, x in parts.items()}


def summary(c: "Calibration") -> list[str]:
    """One line per objective and seed and one per setting on unseen examples, for people."""
    return [*([] if c.unseen else [_told(o) for o in c.outcomes]), *_told_unseen(c)]


def _told(o: "Outcome") -> str:
    h = o.held_out
    line = f"{o.objective}, split {o.seed}: {_what(o)}; "
    if "accuracy_change" in h:
        b, a, (mean, low, high) = h["before"], h["after"], h["accuracy_change"]
        return line + (
            f"held-out accuracy {b['accuracy']:.3f} -> {a['accuracy']:.3f} ({mean:+.3f}, 95 % {low:+.3f} to "
            f"{high:+.3f}), invalid answers {b['invalid']:.3f} -> {a['invalid']:.3f}; prior-corrected control "
            f"{b['prior_corrected']:.3f} -> {a['prior_corrected']:.3f}"
        )
    mean, low, high = h["entropy_change"]
    return line + f"held-out entropy {h['before']['entropy']:.3f} ({mean:+.3f}, 95 % {low:+.3f} to {high:+.3f})"


def _what(o: "Outcome") -> str:
    what = f"gamma {o.gamma:g} on heads {o.heads}" if o.heads else "no head helps: gamma 1"
    if o.objective == "accuracy" and o.heads and o.rise == 0:
        what += " (for the right label's probability; no setting has higher accuracy)"
    return what


def _told_unseen(c: "Calibration") -> list[str]:
    lines = [f"{o.objective}: {_what(o)}" for o in c.outcomes] if c.unseen else []
    for row in c.unseen:
        of_valid = row["accuracy_of_valid"]
        corrected = "content_free" if "content_free" in row else "mean_corrected"
        mean, low, high = row["accuracy_change"]
        change = f" ({mean:+.3f}, 95 % {low:+.3f} to {high:+.3f})" if row is not c.unseen[0] else ""
        lines.append(
            f"{row['name']}: accuracy {row['accuracy']:.3f}{change} of {row['n']}, valid {row['valid']:.3f}, "
            f"accuracy of valid {'-' if of_valid is None else f'{of_valid:.3f}'}, prior-corrected {row[corrected]:.3f}"
        )
    return lines

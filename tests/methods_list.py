"""The one list of methods every invariant runs over; a new method adds one line."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodCase:
    """A method with settings that make it sparse on tiny prompts, and settings at which it must equal dense.

    `causality` is what it declares at `settings`; `sliding` says that it acts on sliding-window layers too;
    `one_phase` that it leaves prefill or decode steps dense; `tile` is the number of queries that share a choice;
    `refused` are the architectures it must not touch.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    keep_all: dict[str, Any] = field(default_factory=dict)
    causality: str = "yes"
    sliding: bool = False
    label: str = ""
    one_phase: bool = False
    refused: tuple[str, ...] = ()

    @property
    def tile(self) -> int:
        """Queries that share a choice of keys, from the first on."""
        return self.settings.get("block_q", 1)

    def __str__(self) -> str:
        return self.label or self.name


DHSA = {
    "boundaries": "novelty", "budget": 24, "sink": 2, "local": 4, "block_q": 4, "chunk": 4, "radius": 2,
    "boundary_window": 2, "question_tokens": 0, "score": "mass",
}  # fmt: skip

METHODS = [
    MethodCase("dense", sliding=True),
    MethodCase("infiniretri"),
    MethodCase(
        "flux",
        {"router": "static", "sparse_layers": "1-", "sparse_settings": {"sink": 2, "window": 8}},
        {"sparse_layers": None},
    ),
    MethodCase("streaming", {"sink": 2, "window": 8}, {"window": 1 << 20}),
    MethodCase(
        "streaming", {"sink": 2, "window": 8, "question_tokens": 5}, {"window": 1 << 20}, "tile", label="tri-shape"
    ),
    MethodCase(
        "block_topk",
        {"min_length": 0, "block_q": 16, "block_k": 8, "budget": 24, "window_blocks": 1},
        {"budget": 1.0},
        "tile",
    ),
    MethodCase(
        "block_topk",
        {"min_length": 0, "block_q": 8, "block_k": 8, "top_p": 0.6, "window_blocks": 1, "bands": True},
        {"top_p": 1.0},
        "no",
        label="prism",
    ),
    MethodCase(
        "flash_prefill",
        {
            "min_length": 0,
            "block_q": 8,
            "block_k": 8,
            "alpha": 0.6,
            "sink_blocks": 1,
            "window_blocks": 1,
            "last_blocks": 1,
        },
        {"alpha": 0.0},
        "tile",
    ),
    MethodCase("pattern", {"block": 4, "window_blocks": 2}, {"window_blocks": 1 << 20}),
    MethodCase(
        "pattern", {"pattern": "power", "block": 4, "window_blocks": 1}, {"window_blocks": 1 << 20}, label="power"
    ),
    MethodCase(
        "pattern",
        {"pattern": "s2", "block": 4, "window_blocks": 2, "stride": 2},
        {"window_blocks": 1 << 20},
        label="s2",
    ),
    MethodCase("quest", {"min_length": 0, "budget": 16, "page": 4}, {"budget": 1.0}, one_phase=True),
    MethodCase("dhsa", DHSA, {"budget": 1 << 20}, "no"),
    MethodCase(
        "dhsa", {**DHSA, "boundaries": "fixed", "question_tokens": 5}, {"budget": 1.0}, "tile", label="dhsa-fixed"
    ),
    MethodCase(
        "dhsa",
        {**DHSA, "budget": 32, "align": 4, "score": "mean", "head_sharing": "all", "layer_sharing": "boundaries"},
        {"budget": 1 << 20},
        "no",
        label="dhsa-aligned",
    ),
    MethodCase(
        "dhsa",
        {**DHSA, "boundaries": "fixed", "score": "queries", "queries": 2},
        {"budget": 1.0},
        "tile",
        label="dhsa-queries",
    ),
    MethodCase("zerotuning", {"gamma": 3.0}, {"gamma": 1.0}),
    MethodCase("gated", {"form": "sigmoid", "start_bias": 1.0}, {"form": "double"}, refused=("qwen3_next",)),
    MethodCase("head_scale", {"heads": [[1, 0], [1, 3]], "factor": 0.3}, {"factor": 1.0}),
    MethodCase("act", {"beta": 0.3, "threshold": 0.04}, {"beta": 1.0}, "no"),
    MethodCase(
        "vertical_slash",
        {"min_length": 0, "block_q": 8, "block_k": 4, "vertical": 8, "slash": 12, "sink": 2, "local": 4},
        {"vertical": 1.0},
        "no",
    ),
    MethodCase(
        "xattention",
        {"min_length": 0, "stride": 4, "block_q": 8, "block_k": 8, "top_p": 0.6},
        {"top_p": 1.0},
        "tile",
    ),
    MethodCase(
        "sampled",
        {
            "min_length": 0,
            "block_q": 8,
            "block_k": 8,
            "queries": 2,
            "top_p": 0.6,
            "floor": 8,
            "sink_blocks": 1,
            "window_blocks": 1,
        },
        {"top_p": 1.0},
        "tile",
    ),
    MethodCase(
        "sampled",
        {
            "min_length": 0,
            "block_q": 8,
            "block_k": 8,
            "queries": 8,
            "budget": 0.3,
            "floor": 0,
            "sink_blocks": 1,
            "window_blocks": 1,
            "question_tokens": 5,
        },
        {"budget": 1.0, "top_p": 1.0},
        "tile",
        label="sampled-question",
    ),
    MethodCase(
        "skip_softmax",
        {"min_length": 0, "block_q": 8, "block_k": 8, "prefill": 0.3, "decode": 0.3, "head_sharing": "group"},
        {"prefill": 0.0, "decode": 0.0},
        "tile",
    ),
]

_KEEP = {"budget": 12, "sink": 2, "window": 5, "interval": 4}
EVICTING = [  # methods that drop keys, and so have tests of their own: tests/test_eviction.py
    MethodCase("snapkv", {**_KEEP, "evict": "both", "kernel": 3}, {"budget": 1.0}),
    MethodCase("keydiff", {**_KEEP, "layers_budget": "pyramid"}, {"budget": 1.0}),
    MethodCase(
        "expected",
        {**_KEEP, "evict": "both", "queries": 6},
        {"budget": 1.0},
        refused=("gpt2", "gpt_neox", "gptj", "codegen", "phi3", "deepseek_v3", "qwen2_vl"),
    ),
]

ALWAYS = {"dense", "streaming", "block_topk", "quest", "zerotuning"}  # a block, a stateful, a reweighting method


def sample(turn: int) -> list[MethodCase]:
    """A sample of the list: a method of each kind, and every fifth of the others, which change with `turn`."""
    others = [case for case in METHODS if str(case) not in ALWAYS]
    return [case for case in METHODS if str(case) in ALWAYS or (others.index(case) + turn) % 5 == 0]

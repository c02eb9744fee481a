"""Stages of the curriculum, from dense recall of short lists to single needles in thousands of tokens.

A stage opens the next one at the accuracy bar; `REPLAYED_ONLY` holds what comes up beside every stage.
"""

from .data import Stage

_MIX = {
    "single": 5.0, "multikey": 0.8, "multiquery": 0.8, "multineedle": 1.2, "passkey": 0.5, "kvlist": 0.4,
    "tracking": 0.8, "fewshot": 0.8,
}  # fmt: skip
_EARLY = {"single": 5.0, "multineedle": 0.3, "passkey": 0.4, "kvlist": 0.2, "tracking": 0.3, "fewshot": 1.0}

STAGES: tuple[Stage, ...] = (
    Stage(96, 32, induction=0.4, short=0.9),
    Stage(160, 20, per_sample=(3, 5), induction=0.2, short=0.5, tasks=_EARLY),
    Stage(256, 16, fill=0.7, per_sample=(2, 5), induction=0.1, short=0.3, tasks=_EARLY, reach=1024),
    Stage(512, 8, fill=1.0, per_sample=(2, 8), induction=0.05, short=0.2, tasks=_MIX, reach=8192),
    Stage(1024, 4, fill=1.0, per_sample=(1, 10), short=0.1, tasks=_MIX, reach=32768),
    Stage(768, 4, fill=1.0, per_sample=(1, 10), short=0.1, tasks=_MIX, reach=16384, dilute=True),
    Stage(1280, 3, fill=1.0, per_sample=(1, 12), short=0.1, tasks=_MIX, reach=24576, dilute=True),
    Stage(2048, 2, fill=1.0, per_sample=(1, 16), short=0.1, tasks=_MIX, reach=32768, dilute=True),
    Stage(4096, 1, fill=1.0, per_sample=(4, 20), short=0.1, tasks=_MIX, reach=32768),
)

REPLAYED_ONLY = (Stage(192, 16, fill=0.2, per_sample=(1, 1), tasks={"fewshot": 1.0}),) * 3

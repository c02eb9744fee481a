"""Places in the prompts, told to the patch, reach the methods row by row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo

from hfpatch import AttentionCall, Causal, Method, MethodConfig
from hfpatch.api import patched_with


@dataclass(kw_only=True)
class ReadingConfig(MethodConfig):
    method: ClassVar[str] = "toy-reading"


class Reading(Method):
    """Notes the spans of every row it is given."""

    config_class = ReadingConfig

    def select(self, call: AttentionCall) -> Causal:
        for row, place in zip(call.rows, (call.spans or {}).get("question", ()), strict=True):
            seen.setdefault(row, set()).add(place)
        return Causal()


seen: dict[int, set[Any]] = {}


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@torch.no_grad()
def test_the_beams_of_a_prompt_share_its_span(padded: bool) -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, 20), [20, 12 if padded else 20])
    seen.clear()
    with patched_with(model, [Reading(ReadingConfig())]) as patch, patch.spans(question=[(3, 9), None]):
        model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == {row: {(3, 9)} if row < 3 else {None} for row in range(6)}

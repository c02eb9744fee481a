"""Patches on real models, in float32 on prompts of some hundred tokens: `make test-real REAL=FOLDER`.

HFPATCH_REAL_MODELS names a folder with a Transformers folder per model, as `make real-models` fetches them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hfpatch.evals.jobs.niah import NiahJob
from hfpatch.evals.run.answer_nll import answer_nll
from hfpatch.evals.run.generation import pad_id, pad_left, text_ids
from hfpatch.evals.run.models import Loaded, load_model
from methods_list import METHODS, MethodCase
from torch import Tensor

from hfpatch import patch_model, patched, unpatch_model

pytestmark = pytest.mark.real
FOLDER = "HFPATCH_REAL_MODELS"
NAMES = ("smollm2", "qwen05")
LENGTH = 600
QUARTER = {
    "dhsa": {"budget": 0.14, "question_tokens": 0, "sink": 8, "local": 32},
    "sampled": {"budget": 0.25, "top_p": 1.0, "floor": 0, "min_length": 0, "sink_blocks": 1, "window_blocks": 1},
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    folder = os.environ.get(FOLDER)
    if not folder:
        pytest.skip(f"{FOLDER} names no folder of real models; `make real-models` fetches them")
    path = Path(folder) / request.param
    if not (path / "config.json").is_file():
        pytest.skip(f"there is no {request.param} in the folder that {FOLDER} names")
    torch.set_num_threads(1)  # as every test does: what module fixtures compute must have the tests' bits
    yield load_model(str(path), "float32")


@torch.inference_mode()
def logits(loaded: Loaded, ids: Tensor, steps: int = 2) -> Tensor:
    """Logits `[B, N, V]` of the last tokens of a prefill and of some decode steps after it."""
    out = loaded.model(ids[:, :-steps], use_cache=True, logits_to_keep=64)
    found, cache = [out.logits], out.past_key_values
    for n in range(ids.shape[1] - steps, ids.shape[1]):
        out = loaded.model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.fixture(scope="module")
def prose(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """A prompt `[1, L]` and what the dense model makes of it."""
    ids = text_ids(loaded, LENGTH)
    return ids, logits(loaded, ids)


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_settings_that_keep_everything_equal_dense(
    loaded: Loaded, prose: tuple[Tensor, Tensor], case: MethodCase
) -> None:
    ids, want = prose
    with patched(loaded.model, case.name, **{**case.settings, **case.keep_all}):
        got = logits(loaded, ids)
    assert float((got - want).abs().max()) < 1e-3 * float(want.abs().max())


@pytest.mark.parametrize("name", QUARTER)
def test_unpatching_gives_the_same_bits(loaded: Loaded, prose: tuple[Tensor, Tensor], name: str) -> None:
    ids, want = prose
    patch_model(loaded.model, name, **QUARTER[name])
    try:
        assert not torch.equal(logits(loaded, ids), want)
    finally:
        unpatch_model(loaded.model)
    assert torch.equal(logits(loaded, ids), want)


@pytest.mark.parametrize("name", QUARTER)
@torch.inference_mode()
def test_a_padded_row_equals_the_row_alone(loaded: Loaded, prose: tuple[Tensor, Tensor], name: str) -> None:
    ids = prose[0][0].tolist()
    rows = [ids[: LENGTH - 150], ids]
    batch, mask = pad_left(rows, pad_id(loaded.model, loaded.tokenizer))
    with patched(loaded.model, name, **QUARTER[name]):
        both = loaded.model(batch, attention_mask=mask, use_cache=False, logits_to_keep=64).logits
        for n, row in enumerate(rows):
            alone = loaded.model(torch.tensor([row]), use_cache=False, logits_to_keep=64).logits[0]
            assert float((both[n] - alone).abs().max()) < 1e-3 * float(alone.abs().max())


def test_a_needle_is_as_likely_at_a_quarter_of_the_keys(loaded: Loaded) -> None:
    (sample,) = NiahJob([900], (50,), 1, haystack="prose").build(loaded, 900, 0)
    found = {}
    for name, settings in {"dense": {}, **QUARTER}.items():
        with patched(loaded.model, name, **settings):
            found[name] = answer_nll(loaded.model, loaded.tokenizer, sample.prompt, sample.continuation)
    print({name: round(nll, 3) for name, nll in found.items()})
    assert found["dense"] < 0.5, "the needle is none for this model"
    for name in QUARTER:
        assert found[name] < found["dense"] + 0.5

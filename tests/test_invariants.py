"""What every method must keep on every architecture."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase, sample
from torch import Tensor, nn
from transformers import PreTrainedModel

import hfpatch
from hfpatch import get_patch, patch_model, patched, unpatch_model
from hfpatch.api import HANDLE
from hfpatch.ops import Problem, watched

TOLERANCE = 1e-5
LENGTH = 63
LENGTHS = [63, 40, 25]


def acts_on(tiny: zoo.TinyModel, case: MethodCase) -> bool:
    return (case.sliding or not tiny.all_sliding) and tiny.name not in case.refused


def sample_of(tiny: zoo.TinyModel) -> list[MethodCase]:
    """The cases an architecture runs by default: all, or of a near twin a sample, each time another."""
    twins = list(zoo.NEAR_TWINS)
    return sample(twins.index(tiny.name)) if tiny.name in twins else METHODS


def pairs_of(cases: list[MethodCase]) -> pytest.MarkDecorator:
    """Parametrize over the cases on every architecture with a layer they act on; near twins run a sample of them."""
    found = [(tiny, case) for tiny in zoo.SUPPORTED.values() for case in cases if acts_on(tiny, case)]
    slow = {True: (), False: (pytest.mark.slow,)}
    params = [pytest.param(t, c, id=f"{t.name}-{c}", marks=slow[c in sample_of(t)]) for t, c in found]
    return pytest.mark.parametrize("tiny,case", params)


pairs = pairs_of(METHODS)
STEPWISE = [case for case in METHODS if case.causality == "yes" and not case.one_phase]
architectures = pytest.mark.parametrize("tiny", zoo.SUPPORTED.values(), ids=lambda t: t.name)


@cache
def built(name: str) -> PreTrainedModel:
    return zoo.SUPPORTED[name].build()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def assert_close(what: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    error = relative(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def tree(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, tensors and configs by identity, hook tables by content."""
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            out[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else id(value)
    return out


@pairs
def test_keep_all_equals_dense(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 3, LENGTH)
    want = logits(model, ids)
    with patched(model, case.name, **{**case.settings, **case.keep_all}):
        assert_close("logits", logits(model, ids), want)


@pairs
def test_unpatch_leaves_no_trace(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 1, LENGTH)
    before, want = tree(model), logits(model, ids)
    assert patch_model(model, case.name, **case.settings) is model
    logits(model, ids)
    assert unpatch_model(model) is model
    assert tree(model) == before
    assert torch.equal(logits(model, ids), want)


@pairs
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_row_equals_row_alone(tiny: zoo.TinyModel, case: MethodCase, side: str) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, len(LENGTHS), LENGTH)
    batch, mask = (zoo.left_pad if side == "left" else zoo.right_pad)(ids, LENGTHS)
    extra = {"position_ids": zoo.positions(mask)} if tiny.learned_positions else {}
    with patched(model, case.name, **case.settings) as patch:
        together = logits(model, batch, attention_mask=mask, **extra)
        for row, n in enumerate(LENGTHS):
            alone = logits(model, ids[row : row + 1, :n])
            assert_close(f"row {row}", together[row][mask[row].bool()], alone[0])
        assert not patch.report().fallbacks()


@pairs_of([case for case in METHODS if case not in STEPWISE])
def test_a_prompt_with_a_cache_equals_one_without(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 3, LENGTH)
    with patched(model, case.name, **case.settings):
        assert_close("prefill", logits(model, ids, use_cache=True), logits(model, ids, use_cache=False))


@pairs_of(STEPWISE)
def test_prefill_and_decode_equal_one_shot(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 3, LENGTH)
    mid, end = LENGTH - 13, LENGTH - 6
    with patched(model, case.name, **case.settings):
        want = logits(model, ids)
        with torch.no_grad():
            out = model(ids[:, :mid], use_cache=True)
            assert_close("prefill", out.logits, want[:, :mid])
            cache = out.past_key_values
            if not tiny.hybrid:
                out = model(ids[:, mid:end], past_key_values=cache)
                assert_close("chunk", out.logits, want[:, mid:end])
            start = mid if tiny.hybrid else end
            for n in range(start, LENGTH):
                out = model(ids[:, n : n + 1], past_key_values=cache)
                assert_close(f"decode {n}", out.logits[:, 0], want[:, n])


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_causality_is_declared_as_the_list_has_it(case: MethodCase) -> None:
    with patched(built("llama"), case.name, **case.settings) as patch:
        assert {m.causality for m in patch.methods} == {case.causality}


@pairs_of([case for case in METHODS if case.causality != "no"])
def test_later_tokens_move_no_logit_before_their_tile(tiny: zoo.TinyModel, case: MethodCase) -> None:
    """Tiles are single queries for causality "yes", else `block_q` queries, counted from the first."""
    model = built(tiny.name)
    ids, fresh = zoo.prompt(model, 1, LENGTH), zoo.prompt(model, 1, LENGTH, seed=1)
    tile = case.tile if case.causality == "tile" else 1
    last = case.settings.get("question_tokens", 0)
    with patched(model, case.name, **case.settings):
        want = logits(model, ids)
        for start in (LENGTH // 3, LENGTH - 19, LENGTH - 2):
            other = torch.cat([ids[:, :start], fresh[:, start:]], 1)
            first = min(start // tile * tile, LENGTH - last if start >= LENGTH - last else start)
            assert_close(f"logits before {first}", logits(model, other)[:, :first], want[:, :first])


@pairs
def test_reported_density_is_the_counted_one(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = built(tiny.name)
    counted: list[int] = []

    def count(problem: Problem, out: Tensor, executor: str) -> None:
        at = problem.at
        counted.append(int(problem.selection.mask(at).expand(at.B, at.Hq, at.Lq, at.Lk).sum()))

    with patched(model, case.name, **case.settings) as patch, watched(count):
        logits(model, zoo.prompt(model, 3, LENGTH))
        report = patch.report()
    assert all(line.stats.calls == 1 for line in report.lines)
    base = [line.stats for line in report.lines if set(line.stats.executors) == {model.config._attn_implementation}]
    assert all(int(stats.attended) == stats.visible for stats in base)
    attended = sum(int(line.stats.attended) for line in report.lines) - sum(s.visible for s in base)
    assert attended == sum(counted)


@pytest.mark.parametrize("tiny", [t for t in zoo.SUPPORTED.values() if not t.all_sliding], ids=lambda t: t.name)
def test_streaming_equals_the_model_with_that_mask(tiny: zoo.TinyModel) -> None:
    """The oracle: the unpatched model given sink + window as an explicit 4-D mask."""
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, LENGTH)
    dtype = model.dtype
    at = hfpatch.core.selection.Layout(2, 1, 1, LENGTH, LENGTH, ids.device)

    def additive(keep: Tensor) -> Tensor:
        return torch.where(keep, 0.0, torch.finfo(dtype).min).expand(2, 1, LENGTH, LENGTH)

    full = additive(hfpatch.core.selection.SinkWindow(2, 8).mask(at))
    window = additive(hfpatch.core.selection.SinkWindow(0, zoo.WINDOW).mask(at))
    mask: Any = {"full_attention": full, "sliding_attention": window} if tiny.sliding else full
    try:
        want = logits(model, ids, attention_mask=mask, use_cache=False)
    except (AttributeError, ValueError, RuntimeError, TypeError, KeyError):
        if zoo.RELEASE >= (5, 24):
            raise
        pytest.skip("this release of Transformers takes no 4-D mask for the model")
    with patched(model, "streaming", sink=2, window=8):
        assert_close("logits", logits(model, ids), want)


@architectures
def test_second_model_is_untouched(tiny: zoo.TinyModel) -> None:
    first = built(tiny.name)
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    ids = zoo.prompt(first, 1, LENGTH)
    before, want = tree(second), logits(second, ids)
    method = "dense" if tiny.all_sliding else "streaming"
    with patched(first, method) as patch:
        assert HANDLE not in vars(second)
        assert tree(second) == before
        assert torch.equal(logits(second, ids), want)
        assert all(not line.stats.calls for line in patch.report().lines)


@pytest.mark.parametrize("tiny", zoo.REFUSED.values(), ids=lambda t: t.name)
def test_refused_before_anything_changes(tiny: zoo.TinyModel) -> None:
    model = tiny.build()
    before = tree(model)
    with pytest.raises(hfpatch.UnsupportedModelError, match=r"cannot be patched.*Use a model"):
        patch_model(model, "streaming")
    assert tree(model) == before


@pytest.mark.parametrize(
    "tiny,case", [pytest.param(zoo.SUPPORTED[n], case, id=f"{n}-{case}") for case in METHODS for n in case.refused]
)
def test_a_method_refuses_what_it_would_make_wrong(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = built(tiny.name)
    before = tree(model)
    with pytest.raises(hfpatch.UnsupportedModelError, match=r"twice.*\. [A-Z]"):
        patch_model(model, case.name, **case.settings)
    assert tree(model) == before


def test_all_sliding_raises_and_says_so() -> None:
    model = built("mistral")
    before = tree(model)
    with pytest.raises(hfpatch.NothingPatchedError, match="3 x sliding attention"):
        patch_model(model, "streaming")
    assert tree(model) == before


def test_vision_tower_is_left_alone() -> None:
    for tiny in zoo.SUPPORTED.values():
        if tiny.vision:
            model = built(tiny.name)
            with patched(model, "dense") as patch:
                names = [x.name for x, _ in patch._plan]
                assert names and all("vision" not in n and "visual" not in n for n in names)


LOADER = """
import sys, torch, zoo
from pathlib import Path
from hfpatch import PatchConfig, patched
model = zoo.SUPPORTED["llama"].build()
ids = zoo.prompt(model, 2, 63)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    with patched(model, PatchConfig.from_pretrained(folder)), torch.no_grad():
        torch.save(model(ids).logits, folder / "logits.pt")
"""


def test_saved_patch_gives_the_same_logits_in_a_new_process(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, LENGTH)
    want = {}
    for case in METHODS:
        with patched(model, case.name, **case.settings) as patch:
            want[str(case)] = logits(model, ids)
            patch.save_pretrained(tmp_path / str(case))
    env_path = str(Path(zoo.__file__).parent)
    code = f"import sys; sys.path.insert(0, {env_path!r})\n" + LOADER
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    for name, logits_ in want.items():
        assert_close(name, torch.load(tmp_path / name / "logits.pt", weights_only=True), logits_)


def test_report_names_layers_and_says_when_nothing_ran() -> None:
    model = built("gemma2")
    with patched(model, "streaming", sink=2, window=8) as patch:
        assert "no call has reached" in str(patch.report())
        logits(model, zoo.prompt(model, 1, LENGTH))
        text = str(get_patch(model).report())
    assert "2 of 4 layers patched" in text and "left alone: model.layers.0.self_attn (sliding attention)" in text

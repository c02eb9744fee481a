"""A boundary predictor that learned nothing is told from one that did, and is not saved."""

import sys
from pathlib import Path

import pytest
import torch
import zoo
from tiny_llama import save_tiny
from tiny_tokenizer import byte_tokenizer
from torch import Tensor

from hfpatch import PatchConfig, cli
from hfpatch.calibrate.dhsa import training
from hfpatch.calibrate.dhsa.quality import BLOCK, GRID, Counts, Quality, best_constant
from hfpatch.calibrate.unfinished import STATE_FILE
from hfpatch.errors import NothingLearnedError


def judged(logits: list[Tensor], labels: list[Tensor], layers: int = 1) -> Quality:
    counts = Counts()
    for x, y in zip(logits, labels, strict=True):
        counts.text(len(y))
        for layer in range(layers):
            counts.add(layer, x, y)
    return counts.quality()


def drawn(texts: int, length: int, share: float, signal: float) -> Quality:
    """Labels at random, logits of noise that moves by `signal` at boundaries."""
    labels = [(torch.rand(length) < share).float() for _ in range(texts)]
    return judged([torch.randn(length) + signal * y for y in labels], labels)


def test_scores_by_hand() -> None:
    labels = torch.tensor([1.0, 0, 0, 1, 0, torch.nan, 1, 0])
    logits = torch.tensor([2.0, 2, -4, 2, -4, 9, -4, -torch.inf])
    found = judged([logits.repeat(80)], [labels.repeat(80)], layers=2)
    assert (found.precision, found.recall, found.f1, found.positives) == (0.6667, 0.6667, 0.6667, 0.5)
    assert found.constant == 0.6667 and found.blocks == 80 * 8 // BLOCK
    assert found.threshold == pytest.approx(-3.0) and abs(found.gain[0]) < 1e-9 and not found.learned


def test_the_best_constant_by_trying_all() -> None:
    """Which layers to say yes to is found among all choices."""
    for _ in range(50):
        total = torch.randint(1, 100, (5,)).double()
        real = (torch.rand(5) * total).floor()
        tried = []
        for choice in range(1, 32):
            yes = torch.tensor([bool(choice >> n & 1) for n in range(5)])
            tried.append(2 * real[yes].sum() / (total[yes].sum() + real.sum()).clamp_min(1))
        assert torch.allclose(best_constant(torch.stack([real, total], -1)), torch.stack(tried).max())


def test_knowing_the_layer_is_not_knowing_the_text() -> None:
    """What says yes in the layer with most boundaries beats a constant over all layers, and has learned nothing."""
    counts = Counts()
    for _ in range(4):
        counts.text(1024)
        for layer, share in enumerate((0.6, 0.05, 0.05)):
            counts.add(layer, torch.full((1024,), 1.0 if layer == 0 else -1.0), (torch.rand(1024) < share).float())
    found = counts.quality()
    assert found.f1 > 2 * found.positives / (1 + found.positives) + 0.2
    assert found.f1 == found.constant and not found.learned


@pytest.mark.parametrize("share", [0.02, 0.06, 0.4, 0.9])
def test_noise_is_never_taken_for_learning(share: float) -> None:
    """Even where the best of 61 thresholds is taken on the same texts."""
    found = [drawn(2, 512, share, 0.0) for _ in range(100)]
    assert not any(q.learned for q in found)
    assert all(q.f1 >= q.constant - 0.02 for q in found), "everything is among the thresholds' choices, or nearly"


@pytest.mark.parametrize("share", [0.02, 0.06, 0.4, 0.9])
def test_what_was_learned_is_seen(share: float) -> None:
    assert sum(drawn(2, 512, share, 3.5).learned for _ in range(50)) == 50


def test_the_interval_holds_what_more_text_would_show() -> None:
    """Of 200 intervals at least 180 hold the gain on fifty times as much text."""
    want = drawn(400, 512, 0.1, 2.0).gain[0]
    found = [drawn(8, 512, 0.1, 2.0).gain for _ in range(200)]
    assert sum(low <= want <= high for _, low, high in found) >= 180


def test_too_little_text_shows_nothing() -> None:
    labels = torch.zeros(BLOCK * 7)
    labels[::9] = 1
    found = judged([labels * 4 - 2], [labels])
    assert found.f1 == 1 and found.blocks == 7 and not found.learned
    assert not judged([torch.zeros(900)], [torch.zeros(900)]).learned, "no boundary at all"
    assert float(GRID[0]) == -3


RECIPE = training.Recipe(length=400, epochs=1, rate=1e-6, width=None, heads=2, hidden=32)


def test_a_predictor_that_learned_nothing_is_not_saved(tmp_path: Path) -> None:
    model, tokenizer = zoo.SUPPORTED["llama"].build(vocab_size=300), byte_tokenizer()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    data = training.haystack_texts("grammar", 20, 400, tokenizer)
    out = tmp_path / "out"
    PatchConfig.from_pretrained(Path(training.__file__).parents[2] / "methods/dhsa/embedded").save_pretrained(out)
    old = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(NothingLearnedError, match=r"F1 0\.\d+ .*best constant has F1 0\.\d+.*--force") as raised:
        training.calibrate_dhsa(model, tokenizer, data, out, RECIPE)
    assert "\n" not in str(raised.value)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != STATE_FILE} == old
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not hasattr(model, "_hfpatch_patch")
    steps: list[int] = []
    quality = training.calibrate_dhsa(
        model, tokenizer, data, out, RECIPE, force=True, advance=lambda: steps.append(1)
    )  # fmt: skip
    assert not quality.learned and len(steps) == 18 and not (out / STATE_FILE).exists()
    assert {p.name: p.read_bytes() for p in out.iterdir()} != old
    assert PatchConfig.from_pretrained(out).methods[0].boundaries == "predictor"  # type: ignore[attr-defined]


def test_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(str(tmp_path / "model"))
    capsys.readouterr()

    def run(*words: str) -> tuple[int, str]:
        out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
        options = ["--texts", "10", "--length", "600", "--text", "grammar", "--rate", "0", "--epochs", "1"]
        monkeypatch.setattr(
            sys, "argv", ["hfpatch", "calibrate", "dhsa", str(tmp_path / "model"), *options, *out, *words]
        )
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), "".join(capsys.readouterr())

    code, told = run()
    assert code == 2 and told.count("\n") == 1 and "learned next to nothing: F1" in told
    assert [p.name for p in (tmp_path / "out").iterdir()] == [STATE_FILE]
    code, told = run("--force")
    assert code == 0 and "written to" in told and STATE_FILE not in [p.name for p in (tmp_path / "out").iterdir()]

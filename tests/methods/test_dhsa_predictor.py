"""DHSA's predictor: labels against direct sums, windows, training, saving, refusals, drawing."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from tiny_tokenizer import byte_tokenizer
from torch import Tensor

from hfpatch import ConfigError, PatchConfig, patched
from hfpatch.calibrate.dhsa import training as calibrate
from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import Layout, SinkWindow
from hfpatch.draw import draw_layer, kept_map, look
from hfpatch.methods.dhsa import DhsaConfig, labels
from hfpatch.methods.dhsa.predictor import BoundaryPredictor, load_predictor

SMALL: dict[str, Any] = {"budget": 24, "sink": 2, "local": 4, "block_q": 4, "chunk": 4, "radius": 2}


def prefill(length: int = 63, heads: tuple[int, int] = (8, 2), **more: Any) -> AttentionCall:
    q, k = torch.randn(2, heads[0], length, 16), torch.randn(2, heads[1], length, 16)
    return AttentionCall(0, 1, "prefill", q, k, k, 0.5, rows=(0, 1), **more)


def full_map(c: AttentionCall) -> Tensor:
    logits = c.scale * c.q.double() @ c.k.double().repeat_interleave(c.groups, 1).mT
    if c.softcap:
        logits = c.softcap * torch.tanh(logits / c.softcap)
    logits = logits.masked_fill(~torch.ones(c.Lq, c.Lk, dtype=torch.bool).tril(), -torch.inf)
    if c.sinks is not None:
        logits = torch.cat([logits, c.sinks.double().view(1, -1, 1, 1).expand(c.B, -1, c.Lq, 1)], -1)
    return logits.softmax(-1)[..., : c.Lk].mean(1)


@pytest.mark.parametrize("w,sliding", [(4, None), (2, None), (3, 12)])
@pytest.mark.parametrize("more", [{}, {"softcap": 3.0}, {"sinks": torch.linspace(-1, 1, 8)}], ids=str)
def test_labels_equal_direct_sums(w: int, sliding: int | None, more: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "CHUNK_ELEMENTS", 8 * 63 * 2 * 10)
    c = prefill(**more)
    got, a = labels.mass_ratio(c, w, sliding), full_map(c)
    for b in range(2):
        for i in range(63):
            p = i + 1
            if i < 2 * w - 1 or i >= 63 - 2 * w:
                assert p >= 63 or math.isnan(got[b, p])
                continue
            end = 63 if sliding is None else min(63, i + w + sliding)
            past = sum(float(a[b, r, j]) for r in range(i + w, end) for j in range(i - w + 1, i + 1))
            future = sum(float(a[b, r, j]) for r in range(i + w, end) for j in range(i + 1, i + w + 1))
            want = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
            assert abs(float(got[b, p]) / want - 1) < 1e-4
    marks = labels.targets(got)
    assert torch.equal(marks == 1, got >= 2) and torch.equal(marks.isnan(), got.isnan())


def test_predictor_reads_each_window_alone() -> None:
    """The windows computed side by side equal the network applied to one window at a time."""
    net = BoundaryPredictor(32, window=3, width=16, heads=2, hidden=24)
    x = torch.randn(2, 50, 32)
    got = net(x)
    assert got.shape == (2, 45)
    for n in (0, 7, 44):
        torch.testing.assert_close(net(x[:, n : n + 6])[:, 0], got[:, n])
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    attention.load_state_dict({
        "in_proj_weight": net.qkv.weight, "in_proj_bias": net.qkv.bias,
        "out_proj.weight": net.out.weight, "out_proj.bias": net.out.bias,
    })  # fmt: skip
    window = net.reduce(x[:, 5:11])
    seen = net.norm(attention(window, window, window)[0])
    left, right = seen[:, :3].mean(1), seen[:, 3:].mean(1)
    sim = torch.cosine_similarity(left, right)[:, None]
    want = net.mlp(torch.cat([left, right, (left - right).abs(), left * right, sim], -1))[:, 0]
    torch.testing.assert_close(got[:, 5], want)


def test_predictor_scores_stand_before_their_token() -> None:
    net = BoundaryPredictor(32, window=3, width=None, heads=4, hidden=8)
    k = torch.randn(2, 2, 40, 16)
    got = net.score(k)
    assert got[:, :3].isneginf().all() and got[:, 38:].isneginf().all() and got[:, 3:38].isfinite().all()
    assert net.score(k[:, :, :5]).isneginf().all()
    torch.testing.assert_close(got[:, 10], net(k.transpose(1, 2).flatten(2)[:, 7:13])[:, 0])


def test_sizes_and_heads_come_back_with_the_weights() -> None:
    net = BoundaryPredictor(32, window=3, width=16, heads=2, hidden=24)
    again = BoundaryPredictor.of(net.tensors())
    assert (again.window, again.width, again.heads) == (3, 16, 2)
    x = torch.randn(1, 20, 32)
    assert torch.equal(again(x), net(x))
    assert BoundaryPredictor.of({}) is None


def test_focal_loss() -> None:
    x, y = torch.tensor([2.0, -1.0, 0.5, 9.0]), torch.tensor([1.0, 0.0, 1.0, torch.nan])
    p = torch.sigmoid(x[:3])
    want = torch.stack([
        1.3 * -p[0].log() * (1 - p[0]) ** 2, -(1 - p[1]).log() * p[1] ** 2, 1.3 * -p[2].log() * (1 - p[2]) ** 2
    ])  # fmt: skip
    torch.testing.assert_close(calibrate.focal_loss(x, y), want.mean())


class Tokens:
    """A tokenizer whose texts are numbers."""

    def __call__(self, text: str, max_length: int = 1 << 30, **kwargs: Any) -> Any:
        ids = torch.tensor([[int(t) for t in text.split()][:max_length]])
        return type("Encoding", (), {"input_ids": ids})


def texts(count: int, length: int = 63) -> list[str]:
    return [" ".join(map(str, row)) for row in torch.randint(8, zoo.VOCAB, (count, length)).tolist()]


RECIPE = calibrate.Recipe(labels="mass", length=63, epochs=2, width=8, heads=2, hidden=16)


def test_training_saves_a_patch_that_loads(tmp_path: Path) -> None:
    model, steps = zoo.SUPPORTED["llama"].build(), []
    data = texts(6)
    quality = calibrate.calibrate_dhsa(
        model, Tokens(), data, tmp_path, RECIPE, force=True, advance=lambda: steps.append(1)
    )
    assert len(steps) == 10 and 0 <= quality.f1 <= 1 and "F1" in str(quality)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hfpatch_config.json", "hfpatch_model.safetensors"]
    ids = zoo.prompt(model, 2, 63)
    settings = {**SMALL, "boundaries": "predictor", "predictor": str(tmp_path)}
    with patched(model, "dhsa", **settings) as patch, torch.no_grad():
        want = model(ids).logits
        patch.save_pretrained(tmp_path / "again")
    config = PatchConfig.from_pretrained(tmp_path / "again")
    config.methods[0].predictor = None
    with patched(model, config), torch.no_grad():
        assert torch.equal(model(ids).logits, want)
    with patched(model, PatchConfig.from_pretrained(tmp_path)) as patch:
        assert "0.predictor.sizes" in patch.config.tensors


def test_an_interrupted_run_ends_where_it_would_have(tmp_path: Path) -> None:
    model, data = zoo.SUPPORTED["llama"].build(), texts(6)

    class Stop(Exception):
        pass

    steps = []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 5:
            raise Stop

    whole = calibrate.calibrate_dhsa(model, Tokens(), data, tmp_path / "whole", RECIPE, force=True)
    with pytest.raises(Stop):
        calibrate.calibrate_dhsa(model, Tokens(), data, tmp_path / "cut", RECIPE, advance=stop)
    with pytest.raises(ConfigError, match="other settings"):
        calibrate.calibrate_dhsa(model, Tokens(), data[:5], tmp_path / "cut", RECIPE)
    assert calibrate.calibrate_dhsa(model, Tokens(), data, tmp_path / "cut", RECIPE, force=True) == whole
    a, b = (load_predictor(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_sentences_and_lines_begin_where_they_do() -> None:
    parts = ['He said: "No, 3.14!" ', "Then he left. ", "Did he\n\n", "- yes\n", "\u662f\u3002", "so it goes"]
    text = "".join(parts)
    want = [sum(map(len, parts[:n])) for n in range(1, len(parts))]
    by_character = labels.sentence_starts(text, range(len(text))).nonzero()[:, 0].tolist()
    assert [n + (text[n] == " ") for n in by_character] == want
    tokens = [m.span() for m in re.finditer(r" ?\w+|\S\n*|\s", text)]
    found = labels.sentence_starts(text, [a for a, _ in tokens]).nonzero()[:, 0].tolist()
    assert [text[slice(*tokens[n])].strip() for n in found] == ["Then", "Did", "-", "\u662f", "so"]


def test_sentence_ends_are_learned_from_text(tmp_path: Path) -> None:
    model, tokenizer = zoo.SUPPORTED["llama"].build(vocab_size=300), byte_tokenizer()
    recipe = calibrate.Recipe(length=400, epochs=10, rate=5e-3, width=None, heads=2, hidden=32)
    data = calibrate.haystack_texts("grammar", 20, 400, tokenizer)
    quality = calibrate.calibrate_dhsa(model, tokenizer, data, tmp_path, recipe, layers=[0])
    assert quality.f1 > 0.5 and quality.positives < 0.1, quality
    with pytest.raises(ConfigError, match="does not say where its tokens stand"):
        calibrate.calibrate_dhsa(model, Tokens(), data, tmp_path, recipe)
    with pytest.raises(ConfigError, match="choose one of sentences, mass"):
        calibrate.calibrate_dhsa(model, tokenizer, data, tmp_path, replace(recipe, labels="none"))


def test_training_learns_what_keys_show() -> None:
    """A boundary written into the keys is found after a few steps."""
    torch.manual_seed(0)
    net = BoundaryPredictor(16, width=None, heads=2, hidden=32)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        y = torch.zeros(1, 257)
        y[:, torch.randint(5, 15, (40,)).cumsum(0).clamp(max=256)] = 1
        k = torch.nn.functional.one_hot(y.cumsum(1).long() % 16, 16)[:, None] + 0.1 * torch.randn(1, 1, 257, 16)
        loss = calibrate.focal_loss(net.score(k.float()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    score = net.score(k.float())
    assert float(((score > 0) == y.bool())[score.isfinite()].float().mean()) > 0.97


def test_too_few_texts() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        calibrate.calibrate_dhsa(zoo.SUPPORTED["llama"].build(), Tokens(), texts(1), "unused", RECIPE)


def test_a_predictor_of_another_model_is_refused(tmp_path: Path) -> None:
    net = BoundaryPredictor(48, width=8, heads=2, hidden=8)
    tensors = {f"0.{k}": t for k, t in net.tensors().items()}
    PatchConfig([DhsaConfig(boundaries="predictor")], tensors=tensors).save_pretrained(tmp_path)
    model = zoo.SUPPORTED["llama"].build()
    with (
        pytest.raises(ConfigError, match=r"reads 48 key channels, this model has 32 \(2 KV heads of 16\)"),
        patched(model, "dhsa", boundaries="predictor", predictor=str(tmp_path)),
    ):
        pass
    with pytest.raises(ConfigError, match="this model has 32"):
        net.score(torch.randn(1, 2, 20, 16))
    PatchConfig([DhsaConfig()]).save_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no boundary predictor"):
        load_predictor(tmp_path / "none")
    with pytest.raises(ConfigError, match="hfpatch calibrate dhsa"), patched(model, "dhsa-paper"):
        pass


def test_shipped_predictor_loads_and_is_small() -> None:
    net = load_predictor("embedded")
    assert sum(t.numel() * t.element_size() for t in net.tensors().values()) < 1 << 20
    assert net.score(torch.randn(1, 2, 40, net.channels // 2)).shape == (1, 40)


@pytest.mark.parametrize("boundaries", ["predictor", "oracle"])
@torch.no_grad()
def test_chunked_prefill_and_decode_with_every_finder(boundaries: str, tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    net = BoundaryPredictor(32, width=8, heads=2, hidden=8)
    PatchConfig([DhsaConfig()], tensors={f"0.{k}": t for k, t in net.tensors().items()}).save_pretrained(tmp_path)
    ids = zoo.prompt(model, 3, 63)
    with patched(model, "dhsa", **SMALL, boundaries=boundaries, predictor=str(tmp_path)) as patch:
        out = model(ids[:, :40], use_cache=True)
        out = model(ids[:, 40:60], past_key_values=out.past_key_values)
        for n in range(60, 63):
            out = model(ids[:, n : n + 1], past_key_values=out.past_key_values)
        assert out.logits.isfinite().all() and patch.report().density() < 1
        assert not patch.report().fallbacks()


def test_drawing_shows_chunks_and_kept_keys(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, 63)
    config = DhsaConfig(**SMALL, question_tokens=5)
    seen = look(model, ids, config, 1)
    assert seen.length == 63 and seen.kept.shape[-2:] == (63, 63) and int(seen.starts[0]) == 0
    assert (seen.kept[0, -1] > 0).all() and not (seen.kept[0, 50] > 0).all()
    drawn = draw_layer(model, ids, config, 1, tmp_path / "layer.png")
    assert (tmp_path / "layer.png").read_bytes()[:4] == b"\x89PNG" and drawn.density == seen.density
    with patched(model, config) as patch, torch.no_grad():
        model(ids)
        line = next(x for x in patch.report().lines if x.layer == 1)
        assert line.stats.attended / line.stats.visible == pytest.approx(seen.density)
    with pytest.raises(ConfigError, match="not patched"):
        draw_layer(model, ids, config, 7, tmp_path / "none.png")


def test_kept_map_counts_cells() -> None:
    at = Layout(1, 2, 1, 40, 40, torch.device("cpu"))
    want = SinkWindow(2, 5).mask(at)[0].float()
    assert torch.equal(kept_map(SinkWindow(2, 5), at), want)
    assert kept_map(SinkWindow(2, 5), at, pixels=10).shape == (1, 10, 10)
    assert torch.equal(kept_map(None, at), torch.ones(1, 40, 40).tril())


@pytest.mark.parametrize("source", ["grammar", "prose"])
def test_training_texts_are_nearly_as_long_as_asked(source: str) -> None:
    tokenizer = byte_tokenizer()
    for text in calibrate.haystack_texts(source, 2, 1500, tokenizer):
        assert 1000 <= len(tokenizer(text).input_ids) <= 1600

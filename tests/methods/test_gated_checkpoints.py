"""Gates taken out of checkpoints: re-hosted from Qwen3-Next, out of research checkpoints in either layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close, built, logits
from torch import Tensor, nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_next import modeling_qwen3_next as next_

import hfpatch
from hfpatch import PatchConfig, get_patch, patched
from hfpatch.methods.gated.method import load_gated_model, load_gates
from hfpatch.methods.gated.research_gates import split_query

ALL_ATTENTION_FUNCTIONS = next_.ALL_ATTENTION_FUNCTIONS
eager_attention_forward = next_.eager_attention_forward
forms = pytest.mark.parametrize("granularity", ["headwise", "elementwise"])


class Ungated(next_.Qwen3NextAttention):
    """Qwen3-Next's attention with a plain query projection and no gate."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        cache: Any = None,
        **kw: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = next_.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kw)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def rehosted() -> tuple[Any, PatchConfig]:
    """The tiny Qwen3-Next with its gates taken out of the model, and the patch that puts them back."""
    model = zoo.SUPPORTED["qwen3_next"].build()
    plain, patch = load_gates(model.state_dict(), model.config, "heads")
    for layer in (1, 3):
        attention = model.model.layers[layer].self_attn
        attention.__class__ = Ungated
        attention.q_proj = nn.Linear(64, 64, bias=False)
    model.load_state_dict(plain)
    return model.eval(), patch


def test_rehosted_gate_equals_qwen3_next() -> None:
    reference = zoo.SUPPORTED["qwen3_next"].build()
    model, patch = rehosted()
    ids = zoo.prompt(reference, 2, 63)
    want = logits(reference, ids)
    assert (logits(model, ids) - want).abs().max() > 0.1
    with patched(model, patch), torch.no_grad():
        assert (logits(model, ids) - want).abs().max() <= 1e-5
        cache = model(ids[:, :60], use_cache=True).past_key_values
        ref_cache = reference(ids[:, :60], use_cache=True).past_key_values
        got = model(ids[:, 60:61], past_key_values=cache).logits
        assert (got - reference(ids[:, 60:61], past_key_values=ref_cache).logits).abs().max() <= 1e-5


class Reference(nn.Module):
    """Qwen3's attention with the paper's gate, in plain PyTorch, from a widened q_proj in one of the layouts."""

    def __init__(self, module: Any, weight: Tensor, layout: str, elementwise: bool) -> None:
        super().__init__()
        self.base, self.weight, self.layout, self.elementwise = module, weight, layout, elementwise

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> Any:
        m, (b, n, _d) = self.base, hidden_states.shape
        heads, kv, d = 4, 2, 16
        wide = hidden_states @ self.weight.T
        per_gate = d if self.elementwise else 1
        if self.layout == "kv-groups":
            q, gate = wide.view(b, n, kv, -1).split([heads // kv * d, heads // kv * per_gate], -1)
        else:
            q, gate = wide.view(b, n, heads, -1).split([d, per_gate], -1)
        gate = gate.reshape(b, n, heads, per_gate)
        q = m.q_norm(q.reshape(b, n, heads, d)).transpose(1, 2)
        k = m.k_norm(m.k_proj(hidden_states).view(b, n, kv, d)).transpose(1, 2)
        v = m.v_proj(hidden_states).view(b, n, kv, d).transpose(1, 2)
        q, k = modeling_qwen3.apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        scores = (q @ k.mT) / d**0.5
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2) * torch.sigmoid(gate)
        return m.o_proj(out.reshape(b, n, -1)), None


def research_checkpoint(layout: str, elementwise: bool) -> tuple[Any, dict[str, Tensor]]:
    """A tiny Qwen3 that runs the reference attention, and its checkpoint with widened query projections."""
    model = zoo.SUPPORTED["qwen3"].build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for n, layer in enumerate(model.model.layers):
        wide = torch.randn(4 * 16 * 2 if elementwise else 4 * 16 + 4, 64) / 8
        state[f"model.layers.{n}.self_attn.q_proj.weight"] = wide
        layer.self_attn = Reference(layer.self_attn, wide, layout, elementwise)
    return model, state


@forms
@pytest.mark.parametrize("layout", ["kv-groups", "heads"])
def test_research_checkpoint(layout: str, granularity: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    reference, state = research_checkpoint(layout, granularity == "elementwise")
    ids = zoo.prompt(reference, 2, 63)
    want = logits(reference, ids, use_cache=False)

    plain, patch = load_gates(state, reference.config, layout)
    model = zoo.SUPPORTED["qwen3"].build(seed=1)
    model.load_state_dict(plain)
    with patched(model, patch):
        assert_close("load_gates", logits(model, ids), want)

    config = {**reference.config.to_dict(), "use_qk_norm": True, "qkv_bias": False, "auto_map": {"AutoModel": "x.Y"}}
    config.pop("attention_bias")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_gated_model(str(tmp_path), layout=layout)
    assert_close("load_gated_model", logits(loaded, ids), want)

    get_patch(loaded).save_pretrained(tmp_path / "gates")
    with patched(model, "gated", form="sigmoid", weights=str(tmp_path / "gates")) as again:
        assert_close("saved gates", logits(model, ids), want)
        assert not again.report().notes


def test_layouts_differ_and_biases_split_alike() -> None:
    t = torch.arange(4 * 16 * 2)
    groups, heads = (split_query(t, 4, 2, 16, layout) for layout in ("kv-groups", "heads"))
    assert groups[0][:32].equal(t[:32]) and groups[1] is not None and groups[1][:32].equal(t[32:64])
    assert heads[0][:32].equal(torch.cat([t[:16], t[32:48]]))
    assert split_query(t[:64], 4, 2, 16, "heads")[1] is None
    with pytest.raises(hfpatch.ConfigError, match="neither 4 heads of 16"):
        split_query(t[:70], 4, 2, 16, "heads")


def test_checkpoint_without_gates_is_refused() -> None:
    model = built("qwen3")
    with pytest.raises(hfpatch.ConfigError, match="carries gates"):
        load_gates(model.state_dict(), model.config)

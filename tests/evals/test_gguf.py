"""MODEL as a GGUF file: the same model as the folder it was made from, and sentences where it cannot be read."""

import sys

import pytest
import torch
from hfpatch.evals.errors import EvaluationError, ModelNotFoundError
from hfpatch.evals.run.gguf import Source, find_source
from hfpatch.evals.run.models import load_model, load_skeleton
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS, SPECIAL = 4, 2, ["<s>", "</s>"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tiny() -> LlamaForCausalLM:
    """One layer, random weights, a vocabulary of bytes and one merge."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 257, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=256, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head's two rotary halves in turns, as GGUF files of this architecture hold them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path, model) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    c = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    weights = model.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output.weight", weights["lm_head.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for ours, theirs in NAMES.items():
        weight = weights[f"model.layers.0.{ours}.weight"]
        if theirs in ("attn_q", "attn_k"):
            weight = interleaved(weight, HEADS if theirs == "attn_q" else KV_HEADS)
        writer.add_tensor(f"blk.0.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path):
    for package in ("gguf", "sentencepiece", "accelerate"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    model, file = tiny(), tmp_path / "tiny.gguf"
    write(file, model)
    ids = torch.tensor([[5, 9, 70, 33, 8, 120]])
    for name in (str(file), str(tmp_path)):
        loaded = load_model(name, dtype="float32")
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
        assert loaded.tokenizer.decode(loaded.tokenizer("a byte or two", add_special_tokens=False)["input_ids"]) == (
            "a byte or two"
        )
        skeleton = load_skeleton(name)
        assert skeleton.config.num_key_value_heads == KV_HEADS
        assert type(skeleton) is LlamaForCausalLM and skeleton.config.max_position_embeddings == 256


@pytest.mark.parametrize("package", ["gguf", "sentencepiece", "accelerate"])
def test_a_missing_package_is_a_sentence_with_the_extra(package, tmp_path, monkeypatch):
    for name in ("gguf", "sentencepiece", "accelerate"):
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, package, None)
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    for load in (load_model, load_skeleton):
        with pytest.raises(
            EvaluationError, match=rf"'some.gguf' needs {package}; run `pip install 'hfpatch\[gguf\]'`"
        ):
            load(str(file))


def test_which_file_is_meant(tmp_path):
    with pytest.raises(ModelNotFoundError, match="There is no file"):
        find_source(str(tmp_path / "missing.gguf"))
    assert find_source(str(tmp_path)) == Source(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"name one of them: a\.gguf, b\.gguf"):
        find_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert find_source(str(tmp_path)) == Source(str(tmp_path))
    assert find_source("owner/name") == Source("owner/name")

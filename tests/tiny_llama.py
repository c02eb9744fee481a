"""A tiny random Llama with a real tokenizer, for tests of evaluation and of the command."""

from functools import cache

import torch
from hfpatch.evals.testbed.tokenizer import build
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 1500 words."""
    return build(vocab_size=1500)


@cache
def tiny_model() -> LlamaForCausalLM:
    """Two layers, random weights, 4096 positions."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: str) -> None:
    """Write model and tokenizer into a folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

"""The embedded model: a small Llama trained for retrieval, so that methods can be tried offline."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHECKPOINT = Path(__file__).parent / "checkpoint"


def load(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The embedded model in evaluation mode and its tokenizer; nothing is downloaded."""
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype, local_files_only=True)
    model.config.name_or_path = model.name_or_path = "embedded"  # saved patches name it, not a folder of this machine
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(CHECKPOINT, local_files_only=True)

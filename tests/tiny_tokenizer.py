"""A byte-level tokenizer for tests: one token per byte, ids 8 and up, after the zoo's special ids."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<vision>", "</vision>", "<unk>"]
VOCAB = len(SPECIAL) + 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Fits zoo models built with `vocab_size=VOCAB`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

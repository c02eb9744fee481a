"""The embedded model's tokenizer: byte-level BPE whose numbers split into chunks of up to three digits."""

import random
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hfpatch.text import grammar

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _corpus(prose: Iterable[str]) -> Iterator[str]:
    """Numbers, task templates, grammar and prose, in the proportion that decides which words get a token."""
    rng = random.Random(1)
    for _ in range(300):
        for width in (3, 2, 1):
            yield " ".join(f"{number:0{width}d}" for number in range(10**width))
    sentences = grammar.grammar_sentences(rng)
    for index in range(8000):
        yield " ".join(next(sentences) for _ in range(4))
        task = list(grammar.TASKS.values())[index % len(grammar.TASKS)](rng)
        yield " ".join(task.facts) + "\n" + "\n".join(q + a for q, a in task.turns)
    for word in (*grammar.ADJECTIVES, *grammar.NOUNS):
        yield f" {word}-{word} {word}-{word}: " * 100
    yield from prose


def build(prose: Iterable[str] = (), vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train the tokenizer; it puts `<s>` before every text and encodes any UTF-8."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(prose), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )

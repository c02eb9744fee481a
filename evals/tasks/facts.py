"""Facts and questions of tasks the embedded model's own templates do not have."""

import random
from collections.abc import Iterator
from itertools import pairwise

from hfpatch.text import grammar

_KEY_PAIRS = len(grammar.ADJECTIVES) * len(grammar.NOUNS)
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
COMMON_TIMES, RARE_TIMES = 12, 2
ZIPF = 2.0


def multi_value(rng: random.Random, values: int = 4, distractors: int = 4) -> grammar.Task:
    """One key with several values, all asked for, among needles of other keys."""
    key, *others = grammar.random_keys(rng, distractors + 1)
    told = list(dict.fromkeys(grammar.random_value(rng) for _ in range(values)))
    needles = [grammar.needle(key, v) for v in told] + [grammar.needle(k, grammar.random_value(rng)) for k in others]
    prompt = f"Question: What are all the secret codes for {key}? Answer: The secret codes for {key} are"
    return grammar.Task(needles, [(prompt, f" {', '.join(told)}.")])


def pairs(rng: random.Random, count: int = 8) -> grammar.Task:
    """Lines of `key: value`; any number of them."""
    if count <= _KEY_PAIRS // 2:
        return grammar.kvlist(rng, count)
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f"{rng.choice(grammar.ADJECTIVES)}-{grammar.random_key(rng)}"] = None
    lines = [(key, grammar.random_value(rng)) for key in keys]
    target = rng.randrange(count)
    key, value = lines[target]
    turn = (f"Look up {key}. Result: {key}:", f" {value};")
    return grammar.Task([f"{k}: {v};" for k, v in lines], [turn], target)


def registers(rng: random.Random, count: int = 8) -> grammar.Task:
    """Numbered lines in random order, each with the content of a register, one looked up; as in LongEval."""
    numbers = rng.sample(range(1, 10 * count + 1), count)
    values = [str(rng.randrange(10_000, 100_000)) for _ in numbers]
    target = rng.randrange(count)
    asked = numbers[target]
    turn = (
        f"Question: What is the register content in line {asked}? Answer: The register content in line {asked} is",
        f" {values[target]}.",
    )
    facts = [f"line {n}: the register content is {value}." for n, value in zip(numbers, values, strict=True)]
    return grammar.Task(facts, [turn], target)


def invented_words(rng: random.Random, syllables: int) -> Iterator[str]:
    """Endless different words that mean nothing."""
    known: set[str] = set()
    while True:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(syllables))
        if word not in known:
            known.add(word)
            yield word


def common_words(rng: random.Random, rare: int = 20, common: int = 5) -> grammar.Task:
    """A shuffled word list in which `common` words come up 12 times and `rare` ones twice."""
    known = dict.fromkeys((*grammar.NOUNS, *grammar.ADJECTIVES, *grammar.PLACES))
    pool = rng.sample(list(known), len(known))
    more = (word for word in invented_words(rng, 4) if word not in known)
    while len(pool) < common + rare:
        pool.append(next(more))
    often, seldom = pool[:common], pool[common : common + rare]
    words = often * COMMON_TIMES + seldom * RARE_TIMES
    rng.shuffle(words)
    prompt = (
        f"Question: Which {common} words come up most often in this list? Answer: The {common} most common words are"
    )
    return grammar.Task(_listed(words), [(prompt, f" {', '.join(often)}.")], spread=False)


def frequent_words(rng: random.Random, words: int = 60, top: int = 3) -> grammar.Task:
    """A shuffled text of invented words; the k-th comes up in proportion to 1 / k ** 2."""
    share = words / sum(k**-ZIPF for k in range(1, 200))
    counts = [round(share * k**-ZIPF) for k in range(1, 200)]
    while any(a <= b for a, b in pairwise(counts[: top + 1])):
        counts = [c + (k < top) * (top - k) for k, c in enumerate(counts)]
    drawn = [(word, c) for word, c in zip(invented_words(rng, 3), counts, strict=False) if c]
    spoken = [word for word, c in drawn for _ in range(c)]
    rng.shuffle(spoken)
    prompt = f"Question: Which {top} code words occur most often above? Answer: The {top} most frequent code words are"
    return grammar.Task(_listed(spoken), [(prompt, f" {', '.join(w for w, _ in drawn[:top])}.")], spread=False)


def _listed(words: list[str]) -> list[str]:
    return [word + "," for word in words[:-1]] + [words[-1] + "."]

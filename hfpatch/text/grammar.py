"""Templates and text sources of the needle tasks: shared by training, evaluation and the test-suite.

A sample is a haystack of ordinary sentences (`grammar_sentences` or `prose_sentences`) with one or more
facts hidden between them, followed by a question whose expected continuation is the answer. Questions end
right before the answer, without a trailing space; answers start with the space.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROSE_FILE = Path(__file__).parent / "data" / "prose.txt"


def word_list(text: str, separator: str | None = None) -> list[str]:
    """The words of a text."""
    return text.split(separator)


ADJECTIVES = word_list(
    "agile amber bold brave brisk calm clever crisp dapper dusty eager early faint fancy frosty gentle "
    "grand happy hazy humble icy jolly keen kind lively loud lucky lunar mellow merry mild misty nice noble "
    "oval pale polite proud quick quiet rapid royal rusty sandy shy silent silly solar spicy sunny tall tidy "
    "tiny urban vivid warm wild wise witty young zesty"
)
NOUNS = word_list(
    "anchor badger basket beacon blanket bottle bridge cactus camel candle canyon carpet castle comet "
    "dolphin donkey dragon eagle ember engine falcon feather fiddle forest garden goblet hammer harbor "
    "helmet island jacket kettle ladder lantern lemon lizard magnet maple meadow mirror nebula needle ocean "
    "orchid otter parrot pebble pencil pepper pigeon planet quartz rabbit raven river rocket saddle shadow spider "
    "temple tiger timber tunnel turtle umbrella valley velvet violin walnut whistle willow window yacht zebra"
)
VERBS = word_list(
    "borrows carries cleans finds follows greets guards hides ignores lifts measures moves opens paints "
    "praises remembers repairs sells studies visits watches"
)
PLACES = word_list(
    "airport bakery chapel farm kitchen library market museum office palace school stadium station theater tower"
)
TIMES = word_list(
    "at dawn|before noon|after lunch|in the evening|at midnight|on Monday|in winter|every spring|"
    "last summer|this week|without a word|for no reason|once again",
    "|",
)
TOPICS = {
    "animal": word_list("badger camel dolphin donkey eagle falcon otter parrot pigeon rabbit tiger zebra"),
    "plant": word_list("cactus lemon maple orchid pepper walnut willow"),
    "tool": word_list("anchor hammer helmet kettle ladder lantern magnet needle pencil whistle"),
    "place": word_list("bridge canyon castle forest garden harbor island meadow ocean river temple valley"),
}

_FORMS: tuple[str, ...] = (
    "The {a} {n} {v} the {b} {m} near the {p} {t}.",
    "Some say that the {n} {v} a {m} {t}.",
    "In the {p}, every {a} {n} {v} one {m}.",
    "Nobody at the {p} {v} the {n}, yet the {a} {m} waits {t}.",
    "There were {i} people at the {p} {t}.",
    "A {n} and a {m} met at the {p}; the {n} was {a} and the {m} was {b}.",
    "If the {p} is {a}, then the {n} {v} the {m}.",
    "It took {i} days to bring the {a} {n} from the {p} to the {q}.",
    "They asked whether the {m} {v} anything {t}, but the {n} kept {a}.",
    "{t2}, the {a} {n} {v} the {m} behind the {p}.",
)


def grammar_sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences of a small English grammar; some contain plain numbers, none contains a code."""
    pick = rng.choice
    while True:
        when = pick(TIMES)
        yield pick(_FORMS).format(
            a=pick(ADJECTIVES), b=pick(ADJECTIVES), n=pick(NOUNS), m=pick(NOUNS), v=pick(VERBS),
            p=pick(PLACES), q=pick(PLACES), t=when, t2=when.capitalize(), i=rng.randrange(2, 1000),
        )  # fmt: skip


# Where an English sentence ends and the next one begins.
SENTENCE_BORDER = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))\s+(?=[\"'“‘(]*[A-Z])")


def split_sentences(text: str) -> list[str]:
    """Sentences of English prose, whitespace normalised, in their order."""
    flat = re.sub(r"\s+", " ", text).strip()
    return [part for part in SENTENCE_BORDER.split(flat) if len(part) > 1]


@cache
def _shipped_prose() -> tuple[str, ...]:
    return tuple(split_sentences(PROSE_FILE.read_text(encoding="utf-8")))


def prose_sentences(rng: random.Random, text: str | None = None) -> Iterator[str]:
    """Endless consecutive prose sentences from a random start; by default novels not seen in training."""
    sentences = _shipped_prose() if text is None else split_sentences(text)
    index = rng.randrange(len(sentences))
    while True:
        yield sentences[index % len(sentences)]
        index += 1


def random_key(rng: random.Random) -> str:
    """A key such as `brisk-otter`."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def random_keys(rng: random.Random, count: int) -> list[str]:
    """Different keys."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[random_key(rng)] = None
    return list(keys)


def random_value(rng: random.Random) -> str:
    """Six digits."""
    return str(rng.randrange(100_000, 1_000_000))


def needle(key: str, value: str) -> str:
    """The sentence to hide in a haystack."""
    return f"The secret code for {key} is {value}."


def question(key: str) -> str:
    """The prompt that asks for a needle; the expected continuation is a space and the value."""
    return f"Question: What is the secret code for {key}? Answer: The secret code for {key} is"


@dataclass(frozen=True)
class Task:
    """Facts to spread over a haystack, in order, and the turns `(question, answer)` that follow it.

    `target` is the index of the fact the first turn asks for; `prefix` turns `spread` off: the facts stay
    together at the start of the prompt (few-shot examples).
    """

    facts: list[str]
    turns: list[tuple[str, str]]
    target: int = 0
    spread: bool = True


def single(rng: random.Random) -> Task:
    """One needle, one question."""
    return multikey(rng, 0)


def multikey(rng: random.Random, distractors: int = 8) -> Task:
    """One needle asked for among needles of other keys."""
    keys = random_keys(rng, distractors + 1)
    values = [random_value(rng) for _ in keys]
    target = rng.randrange(len(keys))
    turn = (question(keys[target]), f" {values[target]}.")
    return Task([needle(k, v) for k, v in zip(keys, values, strict=True)], [turn], target)


def multiquery(rng: random.Random, count: int = 4) -> Task:
    """Several needles, each asked for in a turn of its own, in random order."""
    pairs = [(key, random_value(rng)) for key in random_keys(rng, count)]
    asked = rng.sample(pairs, count)
    turns = [(question(key), f" {value}.") for key, value in asked]
    return Task([needle(*pair) for pair in pairs], turns, pairs.index(asked[0]))


def multineedle(rng: random.Random, count: int = 2) -> Task:
    """Several needles, all asked for in one question and answered in one go."""
    pairs = [(key, random_value(rng)) for key in random_keys(rng, count)]
    asked = rng.sample(pairs, count)
    names = " and ".join(k for k, _ in asked)
    prompt = f"Question: What are the secret codes for {names}? Answer: The secret code for {asked[0][0]} is"
    answer = f" {asked[0][1]}." + "".join(" " + needle(*p) for p in asked[1:])
    return Task([needle(*p) for p in pairs], [(prompt, answer)], pairs.index(asked[0]))


def passkey(rng: random.Random) -> Task:
    """One number without a key."""
    value = str(rng.randrange(10_000, 1_000_000))
    prompt = "Question: What is the pass key? Answer: The pass key is"
    return Task([f"The pass key is {value}. Remember it: {value} is the pass key."], [(prompt, f" {value}.")])


def kvlist(rng: random.Random, count: int = 8) -> Task:
    """Lines of `key: value`, one looked up."""
    pairs = [(key, random_value(rng)) for key in random_keys(rng, count)]
    target = rng.randrange(count)
    key, value = pairs[target]
    return Task([f"{k}: {v};" for k, v in pairs], [(f"Look up {key}. Result: {key}:", f" {value};")], target)


def _variable(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2)) + str(rng.randrange(10, 100))


def tracking(rng: random.Random, hops: int = 2, chains: int = 2) -> Task:
    """Chains of assignments; the answer walks one chain back to its number."""
    facts: list[tuple[float, str]] = []
    walks = []
    names: set[str] = set()
    while len(names) < chains * (hops + 1):
        names.add(_variable(rng))
    pool = rng.sample(sorted(names), len(names))
    for _ in range(chains):
        chain, value = [pool.pop() for _ in range(hops + 1)], random_value(rng)
        times = sorted(rng.random() for _ in chain)
        for when, name, source in zip(times, chain, [value, *chain], strict=False):
            facts.append((when, f"Let {name} = {source}."))
        last, *rest = [*chain[::-1], value]
        walks.append((f"Question: What is {last}? Answer: {last} =", " " + " = ".join(rest) + "."))
    return Task([fact for _, fact in sorted(facts)], [rng.choice(walks)])


def fewshot(rng: random.Random, shots: int = 6) -> Task:
    """Topic classification with word labels: examples at the start, one unlabelled text at the end."""
    labels = rng.sample(sorted(TOPICS), 3)

    def example(label: str) -> tuple[str, str]:
        form = rng.choice(("I saw the {a} {n}.", "{t} we spoke of a {a} {n}.", "There was no {a} {n}."))
        when = rng.choice(TIMES).capitalize()
        told = form.format(a=rng.choice(ADJECTIVES), n=rng.choice(TOPICS[label]), t=when)
        return f"Text: {told} Topic:", f" {label}."

    facts = ["".join(example(labels[i % 3])) for i in range(shots)]
    rng.shuffle(facts)
    return Task(facts, [example(rng.choice(labels))], spread=False)


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "single": single, "multikey": multikey, "multiquery": multiquery, "multineedle": multineedle,
    "passkey": passkey, "kvlist": kvlist, "tracking": tracking, "fewshot": fewshot,
}  # fmt: skip

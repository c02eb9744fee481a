"""Short sentences of ordinary English with a label each, made from word lists: sentiment and subject."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError
from .grammar import Task, word_list

THINGS = word_list(
    "meal hotel film concert train ride book lecture haircut garden tour soup museum visit phone repair holiday "
    "flight keyboard jacket dentist play bakery party coffee market"
)
GOOD = word_list(
    "wonderful delightful excellent superb charming lovely brilliant enjoyable perfect pleasant outstanding "
    "marvellous impressive"
)
BAD = word_list(
    "terrible awful dreadful horrible boring disappointing miserable dull poor unpleasant shabby tedious annoying"
)
GLAD = word_list(
    "I would go again tomorrow|everyone left smiling|it was worth every penny|I told all my friends to try it|"
    "we laughed the whole evening|nothing could have been better|it made my week|we stayed longer than planned",
    "|",
)
SORRY = word_list(
    "I want my money back|everyone left early|it was a waste of time|I told all my friends to stay away|"
    "we complained the whole evening|nothing worked as promised|it ruined my week|we could not wait to leave",
    "|",
)
WHO = word_list("I|We|My sister|My uncle|Both of us|Our guests|The neighbours|My colleagues", "|")
LIKED = word_list("loved enjoyed adored praised recommended")
LOATHED = word_list("hated regretted disliked criticised resented")

WHEN = word_list(
    "on Monday|on Friday|this morning|last night|this week|yesterday|in April|in October|over the weekend|"
    "after a long wait|for the third time|to general surprise",
    "|",
)
SUBJECTS = {
    "sports": (
        "the goalkeeper|the striker|the home team|the coach|the tennis champion|the young sprinter|the swimmer|"
        "the cyclist|the referee|the captain",
        "won the final|missed the opening match|trained for the marathon|broke the record of the tournament|"
        "lost in the second half|prepared for the Olympics|scored twice|was cheered by the fans|left the league|"
        "was injured before the game",
    ),
    "business": (
        "the bank|the car maker|the retailer|the chief executive|the airline|the start-up|the shareholders|"
        "the supermarket chain|the insurance company|the investors",
        "reported higher profits|cut its prices|bought a smaller rival|sold half of the shares|raised money for a "
        "factory|announced a merger|lost customers|expected weaker sales|closed two branches|opened a new office",
    ),
    "science": (
        "the astronomers|the biologists|the physicist|a team of chemists|the researchers|the geologists|"
        "the laboratory|the space probe|the professor|the climate experts",
        "measured the light of a distant star|found an unknown species|tested a theory about gravity|"
        "studied the cells of a plant|published an experiment|discovered an old fossil|observed a new particle|"
        "analysed samples of ice|explained how the virus spreads|mapped the ocean floor",
    ),
    "politics": (
        "the president|the parliament|the minister|the opposition|the voters|the senator|the government|the mayor|"
        "the ambassador|the two parties",
        "rejected the new law|called for an election|signed the peace treaty|debated the reform|lost the vote|"
        "promised lower taxes|formed a coalition|criticised the sanctions|resigned after the scandal|"
        "agreed on the constitution",
    ),
}
Labelled = tuple[str, str]


@dataclass(frozen=True)
class LabelledTask:
    """Texts with one of `labels` each; `cue` stands between a text and its label, `instruction` before all of them."""

    name: str
    labels: tuple[str, ...]
    instruction: str
    cue: str
    draw: Callable[[random.Random, str], str]

    def rows(self, count: int, seed: int = 0) -> list[Labelled]:
        """`count` different texts with their labels, as many of each label, in random order. Raises ConfigError."""
        rng = random.Random(f"{self.name}-{seed}")
        found: dict[str, str] = {}
        for n in range(count):
            label = self.labels[n % len(self.labels)]
            text = next((t for _ in range(1000) if (t := self.draw(rng, label)) not in found), None)
            if text is None:
                raise ConfigError(f"{self.name} has no {count} different texts; ask for fewer.")
            found[text] = label
        rows = list(found.items())
        rng.shuffle(rows)
        return rows

    def fewshot(self, rng: random.Random, shots: int = 6) -> Task:
        """Labelled texts at the start, as many of each label, and one unlabelled text at the end."""

        def example(label: str) -> tuple[str, str]:
            return f"Text: {self.draw(rng, label)} {self.cue}", f" {label}."

        order = rng.sample(self.labels, len(self.labels))
        facts = ["".join(example(order[n % len(order)])) for n in range(shots)]
        rng.shuffle(facts)
        return Task(facts, [example(rng.choice(order))], spread=False)


def _sentiment(rng: random.Random, label: str) -> str:
    mine, other = (GOOD, BAD) if label == "positive" else (BAD, GOOD)
    end, liked = (GLAD, LIKED) if label == "positive" else (SORRY, LOATHED)
    form = rng.choice(
        (
            "The {a} was {m} and {e}.",
            "{w} {l} the {a} {t}.",
            "What a {m} {a}; {e}.",
            "The {a} was {o} at first, but in the end {e}.",
            "Friends called the {a} {o}, yet {w2} {l} it.",
            "The {a} was anything but {o}.",
            "Although the {b} was {o}, the {a} was {m} and {e}.",
            "Nobody could call the {a} {o}: {e}.",
        )
    )
    who = rng.choice(WHO)
    one, two = rng.sample(THINGS, 2)
    return form.format(
        a=one, b=two, m=rng.choice(mine), o=rng.choice(other), e=rng.choice(end), l=rng.choice(liked),
        w=who, w2=who if who == "I" else who[0].lower() + who[1:], t=rng.choice(WHEN),
    )  # fmt: skip


def _subject(rng: random.Random, label: str) -> str:
    actors, actions = (word_list(part, "|") for part in SUBJECTS[label])
    actor, action, when = rng.choice(actors), rng.choice(actions), rng.choice(WHEN)
    form = rng.choice(("{A} {did} {when}.", "{When}, {a} {did}.", "People say that {a} {did} {when}."))
    return form.format(a=actor, A=actor[0].upper() + actor[1:], did=action, when=when, When=when[0].upper() + when[1:])


TASKS = {
    task.name: task
    for task in (
        LabelledTask(
            "sentiment", ("negative", "positive"), "Is the sentence positive or negative?", "Sentiment:", _sentiment
        ),
        LabelledTask(
            "subject",
            tuple(sorted(SUBJECTS)),
            "Is the sentence about business, politics, science or sports?",
            "Subject:",
            _subject,
        ),
    )
}

"""The needles of the grammar said in words that ordinary models know."""

import random
from collections.abc import Callable

import regex

from . import grammar

STYLES = ("grammar", "words", "cities")
CITIES = grammar.word_list(
    "Accra Amman Ankara Athens Auckland Baghdad Bangkok Barcelona Beirut Belgrade Berlin Bogota Boston "
    "Brisbane Brussels Budapest Cairo Caracas Chicago Copenhagen Dakar Damascus Delhi Denver Dhaka Dublin "
    "Edinburgh Florence Geneva Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Johannesburg "
    "Karachi Kyoto Lagos Lima Lisbon London Madrid Manila Marseille Melbourne Milan Montreal Moscow "
    "Mumbai Munich Nairobi Naples Oslo Ottawa Paris Prague Quito Rome Santiago Seattle Seoul Shanghai "
    "Singapore Stockholm Sydney Tehran Tokyo Toronto Tunis Vienna Warsaw Zurich"
)
_KEY = regex.compile(rf"\b(?:{'|'.join(grammar.ADJECTIVES)})-(?:{'|'.join(grammar.NOUNS)})\b")
_ASKED = regex.compile(r"(What (?:is|are) .*?secret codes?[^?]*)\?")


def styled(task: grammar.Task, style: str, rng: random.Random) -> grammar.Task:
    """The task with its "secret codes" called magic numbers, and with cities for keys if `style` says so.

    `grammar` leaves everything as it is. More keys than there are cities keep what they are called.
    """
    if style == "grammar":
        return task
    told = _magic if style == "words" else _with_cities(task, rng)
    turns = [
        (told(_ASKED.sub(r"\1 mentioned in the text?", question)), told(answer)) for question, answer in task.turns
    ]
    return grammar.Task([told(fact) for fact in task.facts], turns, task.target, task.spread)


def _magic(text: str) -> str:
    return text.replace("secret code", "special magic number")


def _with_cities(task: grammar.Task, rng: random.Random) -> Callable[[str], str]:
    keys = dict.fromkeys(key for fact in task.facts if "secret code" in fact for key in _KEY.findall(fact))
    names = dict(zip(keys, rng.sample(CITIES, len(CITIES)), strict=False))
    return lambda text: _magic(_KEY.sub(lambda found: names.get(found[0], found[0]), text))

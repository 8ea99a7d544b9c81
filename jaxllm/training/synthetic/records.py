"""JSON records with facts that a sentence states."""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from jaxllm.training.synthetic.task import Drawn, Task, ask
from jaxllm.training.synthetic.words import (
    ANIMALS,
    CITIES,
    COLORS,
    DAYS,
    JOBS,
    NAMES,
    THINGS,
)

__all__ = ["Record"]

_FOODS = ("burger", "cake", "muffin", "pancake", "pie", "pizza", "salad", "sandwich")
_DRINKS = ("cocoa", "juice", "lemonade", "milk", "soda", "tea", "water")
_VEHICLES = ("bike", "boat", "bus", "car", "ship", "train")
_HOMES = ("barn", "cage", "cave", "garden", "hut", "nest", "stable", "zoo")
_FEEDS = ("bread", "carrots", "corn", "grass", "hay", "nuts", "rice", "seeds")

_QUESTIONS = (
    "Write the facts as JSON with the keys {keys}.",
    "Make a JSON object with {keys} from the text.",
    "Find {keys} in the text and give them as JSON.",
    "Turn the text into JSON. The keys are {keys}.",
)


@dataclass(frozen=True)
class _Field:
    """A key, what it may hold, and phrases that say so of the sentence's subject."""

    key: str
    values: tuple[str, ...] | range
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """A kind of record: the field that the sentence is about, and the others."""

    subject: _Field
    fields: tuple[_Field, ...]


_KINDS = (
    _Kind(
        _Field("name", NAMES, ("{}",)),
        (
            _Field("age", range(3, 90), ("is {} years old", "turns {} this year")),
            _Field("city", CITIES, ("lives in {}", "has a home in {}")),
            _Field("job", JOBS, ("works as a {}", "is a {}")),
            _Field("pet", ANIMALS, ("has a pet {}", "looks after a {}")),
            _Field("color", COLORS, ("always wears {}", "likes the color {}")),
        ),
    ),
    _Kind(
        _Field("item", THINGS, ("The {}", "This {}")),
        (
            _Field("price", range(2, 60), ("costs {} coins", "sells for {} coins")),
            _Field("color", COLORS, ("is {}", "comes in {}")),
            _Field("city", CITIES, ("is sold in {}", "can be bought in {}")),
            _Field("maker", NAMES, ("was made by {}", "is the work of {}")),
            _Field("stock", range(2, 40), ("is there {} times", "is left {} times")),
        ),
    ),
    _Kind(
        _Field("name", NAMES, ("{}", "The traveler {}")),
        (
            _Field("from", CITIES, ("starts in {}", "sets out from {}")),
            _Field("to", CITIES, ("travels to {}", "is on the way to {}")),
            _Field("day", DAYS, ("leaves on {}", "departs on {}")),
            _Field("bags", range(2, 10), ("takes {} bags", "carries {} bags")),
            _Field("by", _VEHICLES, ("goes by {}", "uses the {}")),
        ),
    ),
    _Kind(
        _Field("guest", NAMES, ("{}",)),
        (
            _Field("food", _FOODS, ("orders a {}", "would like a {}")),
            _Field("drink", _DRINKS, ("drinks {}", "asks for some {}")),
            _Field("table", range(1, 30), ("sits at table {}", "has table {}")),
            _Field("day", DAYS, ("comes on {}", "visits us on {}")),
            _Field("friends", range(2, 9), ("brings {} friends", "is with {} friends")),
        ),
    ),
    _Kind(
        _Field("animal", ANIMALS, ("The {}", "That {}")),
        (
            _Field("name", NAMES, ("is called {}", "has the name {}")),
            _Field("age", range(2, 20), ("is {} years old", "has lived {} years")),
            _Field("color", COLORS, ("is all {}", "looks {}")),
            _Field("home", _HOMES, ("sleeps in a {}", "has a {} as its home")),
            _Field("food", _FEEDS, ("eats {}", "is fed with {}")),
        ),
    ),
)


def _listed(parts: list[str]) -> str:
    """Returns "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _canonical(text: str) -> str | None:
    """Returns an object in a form of its own, or None for text that is no object."""

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError):
        return None
    # As text, since in Python 7 == 7.0 and 1 == True.
    return json.dumps(found, sort_keys=True) if isinstance(found, dict) else None


@dataclass(frozen=True, kw_only=True)
class Record(Task):
    """A sentence with two to six facts, and some of them to be written as JSON.

    Attributes:
      fewest: Fewest keys that are asked for.
      most: Most keys that are asked for, at most 6.
    """

    fewest: int = 2
    most: int = 5

    def draw(self, random: Random) -> Drawn:
        """Draws a sentence; its content are all facts stated, asked for or not."""
        kind = random.choice(_KINDS)
        count = random.randint(self.fewest, self.most)
        # One more fact than is asked for, now and then.
        stated = min(count - 1 + (random.random() < 0.4), len(kind.fields))
        fields = [kind.subject, *random.sample(kind.fields, stated)]
        facts: dict[str, str | int] = {}
        for field in fields:
            left = [value for value in field.values if value not in facts.values()]
            facts[field.key] = random.choice(left)
        said = [random.choice(f.phrases).format(facts[f.key]) for f in fields]
        keys = random.sample(list(facts), min(count, len(facts)))
        question = random.choice(_QUESTIONS).format(keys=_listed(keys))
        return Drawn(
            content=json.dumps(facts, sort_keys=True),
            prompt=ask(question, text=f"{said[0]} {_listed(said[1:])}."),
            completion=f" {json.dumps({key: facts[key] for key in keys})}",
        )

    def agrees(self, wanted: str, found: str) -> bool:
        """Compares objects: the order of keys and white space do not count."""
        return _canonical(found) is not None and _canonical(wanted) == _canonical(found)

"""Copy-and-edit tasks with longer answers: repeat a text, edit it, continue a pattern.

Most of an answer stands in the prompt already, which drafters that look into the prompt
live on.
"""

import re
from dataclasses import dataclass
from random import Random

from jaxllm.training.synthetic.task import Drawn, Task, ask
from jaxllm.training.synthetic.words import (
    ANIMALS,
    COLORS,
    LIST_WORDS,
    NAMES,
    PLACES,
    SIZES,
    THINGS,
)

__all__ = ["ContinuePattern", "EditText", "RepeatText"]

_POOLS = {
    "name": NAMES,
    "animal": ANIMALS,
    "thing": THINGS,
    "color": COLORS,
    "place": PLACES,
    "size": SIZES,
}
_SENTENCES = (
    "{name} saw a {color} {animal} near the {place}.",
    "The {animal} ran to the {place} with {name}.",
    "{name} put the {size} {thing} behind the {place}.",
    "In the {place} {name} met a {size} {animal}.",
    "The {color} {thing} fell down by the {place}.",
    "Soon the {animal} took the {thing} from {name}.",
    "{name} wanted to show the {thing} to the {animal}.",
    "The {size} {animal} sat on the {color} {thing}.",
    "After lunch {name} went back to the {place}.",
    "There was a {color} {thing} under the {animal}.",
    "{name} said that the {place} was too {size}.",
    "Then {name} gave the {color} {thing} to the {animal}.",
)
_REPEAT = (
    "Repeat the text.",
    "Copy the text word for word.",
    "Write the same text again.",
    "Say the text once more.",
)
_EDIT = (
    "Replace {old} by {new} in the text.",
    "Write the text again with {new} in place of {old}.",
    "Copy the text, but change every {old} to {new}.",
    "Repeat the text. Say {new} where it says {old}.",
)
_CONTINUE = (
    "Continue the pattern up to {last}.",
    "Go on with the pattern until {last}.",
    "Write what comes next in the pattern, to {last}.",
    "Carry on the same way and stop at {last}.",
)


def _draw_text(random: Random, fewest: int, most: int) -> tuple[str, dict[str, str]]:
    """Returns a text, and the pool of every word that could be replaced in it.

    Two words of each pool make the cast, so that words come back.
    """
    cast = {pool: random.sample(words, 2) for pool, words in _POOLS.items()}
    told, pools = [], {}
    for template in random.sample(_SENTENCES, random.randint(fewest, most)):
        words = {pool: random.choice(pair) for pool, pair in cast.items()}
        told.append(template.format(**words))
        used = {p: word for p, word in words.items() if f"{{{p}}}" in template}
        pools.update({word: pool for pool, word in used.items()})
    return " ".join(told), pools


@dataclass(frozen=True, kw_only=True)
class RepeatText(Task):
    """A text of a few sentences, again.

    Attributes:
      fewest: Fewest sentences.
      most: Most sentences.
    """

    fewest: int = 3
    most: int = 5

    def draw(self, random: Random) -> Drawn:
        """Draws a text; its content is the text."""
        text, _ = _draw_text(random, self.fewest, self.most)
        return Drawn(text, ask(random.choice(_REPEAT), text=text), f" {text}")

    def agrees(self, wanted: str, found: str) -> bool:
        """Compares every character but the white space around the text."""
        return wanted.strip() == found.strip()


@dataclass(frozen=True, kw_only=True)
class EditText(RepeatText):
    """A text again with one word, wherever it stands, replaced by another."""

    def draw(self, random: Random) -> Drawn:
        """Draws a text and two words; its content is all three."""
        text, pools = _draw_text(random, self.fewest, self.most)
        old = random.choice(sorted(pools))
        new = random.choice([w for w in _POOLS[pools[old]] if w not in pools])
        edited = re.sub(rf"\b{old}\b", new, text)
        question = random.choice(_EDIT).format(old=old, new=new)
        return Drawn(
            content=f"{old}>{new} {text}",
            prompt=ask(question, text=text),
            completion=f" {edited}",
        )


@dataclass(frozen=True, kw_only=True)
class ContinuePattern(Task):
    """Numbers in equal steps, or words that come round in turn, to a given number.

    Attributes:
      fewest: Fewest items to write.
      most: Most items to write.
    """

    fewest: int = 8
    most: int = 14

    def draw(self, random: Random) -> Drawn:
        """Draws a pattern; its content is what is shown and where it ends."""
        count = random.randint(self.fewest, self.most)
        if random.random() < 0.5:
            # Two rounds are shown: with words that differ, one way to go on is left.
            words = random.sample(LIST_WORDS, random.randint(2, 4))
            first, step, shown = random.randint(1, 9), 1, 2 * len(words)
        else:
            words, shown, step = [], 4, random.randint(1, 5)
            # No number has three digits.
            first = random.randint(0, min(29, 99 - step * (shown + count)))
        numbers = [first + i * step for i in range(shown + count)]
        items = [
            f"{n} {words[i % len(words)]}" if words else str(n)
            for i, n in enumerate(numbers)
        ]
        pattern, rest = ", ".join(items[:shown]), ", ".join(items[shown:])
        question = random.choice(_CONTINUE).format(last=numbers[-1])
        return Drawn(
            content=f"{numbers[-1]} {pattern}",
            prompt=ask(question, pattern=pattern),
            completion=f" {rest}",
        )

    def agrees(self, wanted: str, found: str) -> bool:
        """Compares item by item; how wide white space is does not count."""
        one, other = ([x.split() for x in s.split(",")] for s in (wanted, found))
        return one == other

"""Operations on short lists of words or of one-digit numbers.

Items of a list differ, except where a replacement would be too easy: copying and
reversing are then a matter of finding an item and its neighbour.
"""

from dataclasses import dataclass
from random import Random

from jaxllm.training.synthetic.task import Drawn, Task, ask
from jaxllm.training.synthetic.words import LIST_WORDS

__all__ = ["CopyList", "ReplaceInList", "ReverseList", "SortList"]

_DIGITS = tuple("0123456789")

_COPY = (
    "Copy the list.",
    "Write the same list again.",
    "Repeat the items in the order in which they stand.",
    "Give back the list as it is.",
)
_REVERSE = (
    "Reverse the list.",
    "Write the list backwards.",
    "Give the items from the last to the first.",
    "Turn the order of the list around.",
)
_REPLACE = (
    "Replace {old} by {new} in the list.",
    "Write the list with {new} in place of {old}.",
    "Copy the list, but put {new} where {old} stands.",
    "Change every {old} in the list to {new}.",
)
_SORT_WORDS = (
    "Sort the words from a to z.",
    "Put the words into alphabetical order.",
    "Write the words in the order of a dictionary.",
)
_SORT_UP = (
    "Sort the numbers from small to large.",
    "Put the numbers into rising order.",
    "Write the numbers with the smallest first.",
)
_SORT_DOWN = (
    "Sort the numbers from large to small.",
    "Put the numbers into falling order.",
    "Write the numbers with the largest first.",
)


def _joined(items: list[str]) -> str:
    return ", ".join(items)


@dataclass(frozen=True, kw_only=True)
class _ListTask(Task):
    """Base of the list operations.

    Attributes:
      shortest: Fewest items of a list.
      longest: Most items of a list, at most 8.
    """

    shortest: int = 3
    longest: int = 8

    def _items(self, random: Random) -> tuple[list[str], tuple[str, ...]]:
        """Returns a list without repetition, and what it was drawn from."""
        pool = random.choice((LIST_WORDS, _DIGITS))
        return random.sample(pool, random.randint(self.shortest, self.longest)), pool

    def _drawn(self, question: str, items: list[str], result: list[str]) -> Drawn:
        listed = _joined(items)
        return Drawn(listed, ask(question, list=listed), f" {_joined(result)}")

    def agrees(self, wanted: str, found: str) -> bool:
        """Compares item by item; white space around an item does not count."""
        one, other = ([x.strip() for x in s.split(",")] for s in (wanted, found))
        return one == other


@dataclass(frozen=True, kw_only=True)
class CopyList(_ListTask):
    """The list as it is."""

    def draw(self, random: Random) -> Drawn:
        """Draws a list; its content is the list."""
        items, _ = self._items(random)
        return self._drawn(random.choice(_COPY), items, items)


@dataclass(frozen=True, kw_only=True)
class ReverseList(_ListTask):
    """The list from its last item to its first."""

    def draw(self, random: Random) -> Drawn:
        """Draws a list; its content is the list."""
        items, _ = self._items(random)
        return self._drawn(random.choice(_REVERSE), items, items[::-1])


@dataclass(frozen=True, kw_only=True)
class ReplaceInList(_ListTask):
    """The list with one item, wherever it stands, replaced by another."""

    def draw(self, random: Random) -> Drawn:
        """Draws a list and two items; its content is all three."""
        items, pool = self._items(random)
        old = random.choice(items)
        if random.random() < 0.5:
            items[random.randrange(len(items))] = old
        new = random.choice([x for x in pool if x not in items])
        question = random.choice(_REPLACE).format(old=old, new=new)
        result = [new if x == old else x for x in items]
        drawn = self._drawn(question, items, result)
        return Drawn(f"{old}>{new} {drawn.content}", drawn.prompt, drawn.completion)


@dataclass(frozen=True, kw_only=True)
class SortList(_ListTask):
    """Words by the alphabet, or numbers in rising or falling order.

    Attributes:
      longest_of_words: Most items of a list of words: their order has to be learned.
    """

    longest_of_words: int = 5

    def draw(self, random: Random) -> Drawn:
        """Draws a list and an order; its content is both."""
        items, pool = self._items(random)
        if pool is not _DIGITS:
            order, questions = "words", _SORT_WORDS
            items = items[: self.longest_of_words]
        else:
            order, questions = random.choice((("up", _SORT_UP), ("down", _SORT_DOWN)))
        result = sorted(items, reverse=order == "down")
        drawn = self._drawn(random.choice(questions), items, result)
        return Drawn(f"{order} {drawn.content}", drawn.prompt, drawn.completion)

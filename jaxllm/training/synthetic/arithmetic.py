"""Word problems on small integers, solved step by step before the answer is given.

A completion is `5+3=8. 8-2=6. The answer is 6.`: a small model can learn the steps
where it could not learn their result.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jaxllm.training.synthetic.task import Drawn, Task, ask
from jaxllm.training.synthetic.words import NAMES, PRONOUNS, THINGS

__all__ = ["Arithmetic"]

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
    "/": int.__floordiv__,
}
_ANSWER = re.compile(r"(?:.*\s)?The answer is (0|[1-9][0-9]*)\.\s*", re.DOTALL)

_STARTS = (
    "{name} has {n} {things}.",
    "{name} starts the day with {n} {things}.",
    "There are {n} {things} on the desk of {name}.",
    "In the morning {name} counts {n} {things}.",
)
_GAINS = (
    "finds {n} more",
    "gets {n} more from {other}",
    "buys {n} more",
    "is given {n} more",
)
_LOSSES = (
    "gives {n} to {other}",
    "loses {n} of them",
    "sells {n} of them",
    "gives {n} away",
)
_NOW = (
    "How many {things} does {name} have now?",
    "How many {things} are left for {name} in the end?",
    "What is the number of {things} that {name} has now?",
)
_GROUPS = (
    "{name} has {k} {boxes} with {n} {things} in each.",
    "{name} fills {k} {boxes} and puts {n} {things} into each.",
    "There are {n} {things} in each of the {k} {boxes} of {name}.",
)
_BOXES = ("bags", "baskets", "boxes", "drawers", "jars")
_MORE = (
    "{other} has {n} more than {name}.",
    "{other} has {n} more.",
)
_FEWER = (
    "{other} has {n} fewer than {name}.",
    "{other} has {n} fewer.",
)
_SHARES = (
    "{pronoun} shares them equally among {k} friends.",
    "{pronoun} makes {k} equal piles of them.",
    "{pronoun} puts them into {k} {boxes}, the same number in each.",
)
_EACH = (
    "How many {things} are in each part?",
    "How many {things} make one share?",
)
_PRICES = (
    "A {thing} costs {n} coins. {name} buys {k} of them.",
    "{name} buys {k} {things} for {n} coins each.",
    "In a shop a {thing} is {n} coins, and {name} takes {k}.",
)


@dataclass(frozen=True)
class _Problem:
    """Sentences, the question last, and the steps to its answer.

    A step is a sign and a number, applied to what the step before gave.
    """

    told: str
    start: int
    steps: tuple[tuple[str, int], ...]


def _change(random: Random, value: int, **names: str) -> tuple[str, str, int]:
    """Returns a phrase, a sign and a number that leave at least one of `value`."""
    if value > 3 and random.random() < 0.5:
        n = random.randint(2, min(9, value - 1))
        return random.choice(_LOSSES).format(n=n, **names), "-", n
    n = random.randint(2, 9)
    return random.choice(_GAINS).format(n=n, **names), "+", n


def _chain(random: Random, largest: int, **names: str) -> _Problem:
    start = value = random.randint(2, largest)
    told, steps = [random.choice(_STARTS).format(n=start, **names)], []
    for i in range(random.randint(1, 2)):
        phrase, sign, n = _change(random, value, **names)
        told.append(f"{'Then' if i else 'Later'} {names['name']} {phrase}.")
        steps.append((sign, n))
        value = _OPERATIONS[sign](value, n)
    told.append(random.choice(_NOW).format(**names))
    return _Problem(" ".join(told), start, tuple(steps))


def _groups(random: Random, largest: int, **names: str) -> _Problem:
    k, n = random.randint(2, 6), random.randint(2, 9)
    told = [random.choice(_GROUPS).format(k=k, n=n, **names)]
    steps = [("*", n)]
    if random.random() < 0.5:
        phrase, sign, m = _change(random, k * n, **names)
        told.append(f"Then {names['name']} {phrase}.")
        steps.append((sign, m))
    told.append(random.choice(_NOW).format(**names))
    return _Problem(" ".join(told), k, tuple(steps))


def _compare(random: Random, largest: int, **names: str) -> _Problem:
    start = random.randint(4, largest)
    if random.random() < 0.5:
        sign, n = "-", random.randint(2, min(9, start - 1))
        told = random.choice(_FEWER)
    else:
        sign, n = "+", random.randint(2, 9)
        told = random.choice(_MORE)
    steps = [(sign, n)]
    question = "How many {things} does {other} have?"
    if random.random() < 0.5:
        question = "How many {things} do {name} and {other} have together?"
        steps.append(("+", start))
    template = f"{_STARTS[0].format(n=start, **names)} {told} {question}"
    return _Problem(template.format(n=n, **names), start, tuple(steps))


def _shares(random: Random, largest: int, **names: str) -> _Problem:
    k, each = random.randint(2, 6), random.randint(2, 9)
    start, steps, told = k * each, [("/", k)], ""
    if random.random() < 0.5:
        more = random.randint(2, min(9, start - 2))
        start, steps = start - more, [("+", more), *steps]
        phrase = random.choice(_GAINS).format(n=more, **names)
        told = f" Later {names['name']} {phrase}."
    begun = random.choice(_STARTS).format(n=start, **names)
    shared = random.choice(_SHARES).format(k=k, **names)
    question = random.choice(_EACH).format(**names)
    return _Problem(f"{begun}{told} {shared} {question}", start, tuple(steps))


def _prices(random: Random, largest: int, **names: str) -> _Problem:
    k, n = random.randint(2, 6), random.randint(2, 9)
    told = [random.choice(_PRICES).format(k=k, n=n, **names)]
    if random.random() < 0.5:
        told.append("How many coins is that in all?")
        return _Problem(" ".join(told), k, (("*", n),))
    back = random.randint(1, 9)
    told.append(f"{names['name']} pays with {k * n + back} coins.")
    told.append("How many coins come back?")
    # The price is taken from what was paid: see `_steps`.
    return _Problem(" ".join(told), k, (("*", n), ("from", k * n + back)))


_KINDS: tuple[Callable[..., _Problem], ...] = (
    _chain,
    _chain,
    _groups,
    _compare,
    _shares,
    _prices,
)


def _steps(problem: _Problem) -> tuple[list[str], int]:
    """Returns the steps as equations, and the answer."""
    value, written = problem.start, []
    for sign, n in problem.steps:
        # "from" is subtraction the other way round.
        left, sign, right = (n, "-", value) if sign == "from" else (value, sign, n)
        value = _OPERATIONS[sign](left, right)
        written.append(f"{left}{sign}{right}={value}.")
    return written, value


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
    """A story with one or two steps of +, -, * or /.

    Attributes:
      largest: What a story starts with at most, where it only adds and takes away.
    """

    largest: int = 20

    def draw(self, random: Random) -> Drawn:
        """Draws a story. Its content is who has what, and the steps."""
        name, other = random.sample(NAMES, 2)
        # Coins are what things cost.
        thing = random.choice([thing for thing in THINGS if thing != "coin"])
        kind = random.choice(_KINDS)
        problem = kind(
            random,
            self.largest,
            name=name,
            other=other,
            thing=thing,
            things=f"{thing}s",
            pronoun=PRONOUNS[name],
            boxes=random.choice(_BOXES),
        )
        written, answer = _steps(problem)
        return Drawn(
            content=f"{name} {thing} {' '.join(written)}",
            prompt=ask(problem.told),
            completion=f" {' '.join(written)} The answer is {answer}.",
        )

    def agrees(self, wanted: str, found: str) -> bool:
        """Compares the numbers that the answers end with; the steps are free."""
        one, other = _ANSWER.fullmatch(wanted), _ANSWER.fullmatch(found)
        return bool(one and other and one[1] == other[1])

"""Templated tasks as an endless table: every cell is made from its name and number.

The train and the test split are disjoint: a hash of what is asked, whatever its
wording, says which of the two it belongs to, and a draw is repeated until it falls into
the split that was wanted. So a problem that was held back was never learned from, in no
wording and under no seed.
"""

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any

from jaxllm.core.errors import UserError
from jaxllm.core.registry import unknown_name
from jaxllm.training.synthetic.arithmetic import Arithmetic
from jaxllm.training.synthetic.lists import (
    CopyList,
    ReplaceInList,
    ReverseList,
    SortList,
)
from jaxllm.training.synthetic.queries import Query
from jaxllm.training.synthetic.records import Record
from jaxllm.training.synthetic.task import Example, Task, answer_of
from jaxllm.training.synthetic.texts import ContinuePattern, EditText, RepeatText

__all__ = [
    "SPLITS",
    "TASKS",
    "check",
    "example",
    "held_back",
    "mixed_example",
    "prompt_rows",
    "split_of",
]

TASKS: dict[str, Task] = {
    "arithmetic": Arithmetic(),
    "copy": CopyList(),
    "edit": EditText(),
    "json": Record(),
    "pattern": ContinuePattern(),
    "repeat": RepeatText(),
    "replace": ReplaceInList(),
    "reverse": ReverseList(),
    "sort": SortList(),
    "sql": Query(),
}

SPLITS = ("train", "test")

_TEST_SHARE = 10
"""One content in so many is held back."""


def split_of(task: str, content: str) -> str:
    """Returns the split that a problem belongs to, in every wording and by every seed.

    Args:
      task: Name in `TASKS`.
      content: As a task draws it.
    """
    digest = hashlib.sha256(f"{task}\n{content}".encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0]


def example(task: str, index: int, seed: int, split: str = "train") -> Example:
    """Makes one example; no other has to be made before it.

    Args:
      task: Name in `TASKS`.
      index: Number of the example, from 0.
      seed: Another seed, another table.
      split: "train" or "test".

    Returns:
      The example, the same on every machine and in every process.

    Raises:
      UserError: An unknown task or split, or an index below 0.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if index < 0:
        raise UserError(
            f"cannot make an example: index of {task!r}: {index}, expected 0 or more. "
            "Count from 0."
        )
    random = Random(f"{task} {split} {seed} {index}")
    while True:
        drawn = TASKS[task].draw(random)
        if split_of(task, drawn.content) == split:
            return Example(task, drawn.prompt, drawn.completion)


def mixed_example(
    index: int,
    seed: int,
    tasks: Sequence[str] = tuple(TASKS),
    split: str = "train",
) -> Example:
    """Makes one example of a mixture of tasks that take turns.

    Args:
      index: Number of the example, from 0.
      seed: As in `example`.
      tasks: Names in `TASKS`; one that stands there twice comes twice as often.
      split: "train" or "test".

    Returns:
      `example(tasks[index % len(tasks)], index, seed, split)`.

    Raises:
      UserError: No tasks, or as in `example`.
    """
    if not tasks:
        raise UserError(
            "cannot make an example: tasks: none, expected at least one of "
            f"{', '.join(TASKS)}. Name one."
        )
    return example(tasks[index % len(tasks)], index, seed, split)


def check(example: Example, text: str) -> bool:
    """Says whether a text answers an example.

    Args:
      example: The problem.
      text: What was written after the prompt; from the end marker on it is not read.

    Returns:
      Whether the answer is right. Where several texts are right, such as the keys of a
      JSON object in another order, each of them is.

    Raises:
      UserError: The example's task is unknown.
    """
    if example.task not in TASKS:
        raise unknown_name("task", example.task, TASKS)
    return TASKS[example.task].agrees(example.completion, answer_of(text))


def held_back(task: str, count: int, seed: int) -> tuple[Example, ...]:
    """Returns examples of the test split, no prompt twice.

    Args:
      task: Name in `TASKS`.
      count: How many.
      seed: As in `example`.

    Raises:
      UserError: As in `example`, or there are not so many different prompts.
    """
    found: dict[str, Example] = {}
    for i in range(2 * count + 1000):
        if len(found) >= count:
            break
        made = example(task, i, seed, "test")
        found.setdefault(made.prompt, made)
    if len(found) < count:
        raise UserError(
            f"cannot hold back examples: count of {task!r}: {count}, expected at most "
            f"{len(found)}. Ask for fewer."
        )
    return tuple(found.values())


def prompt_rows(tasks: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Returns held-back prompts as rows of a prompt file, as `jaxllm compare` reads it.

    Args:
      tasks: Names in `TASKS`; each is a category.
      count: Rows of each task.
      seed: As in `example`.

    Returns:
      Objects with "id", "category", "prompt" and "answer", one right completion.

    Raises:
      UserError: As in `held_back`.
    """
    return [
        {
            "id": f"{task}-{i}",
            "category": task,
            "prompt": made.prompt,
            "answer": made.completion,
        }
        for task in tasks
        for i, made in enumerate(held_back(task, count, seed), start=1)
    ]

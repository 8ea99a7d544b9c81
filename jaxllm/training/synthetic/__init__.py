"""Templated tasks with exact checkers: seeded, endless, with problems held back."""

from jaxllm.training.synthetic.generator import (
    SPLITS,
    TASKS,
    check,
    example,
    held_back,
    mixed_example,
    prompt_rows,
    split_of,
)
from jaxllm.training.synthetic.task import END_OF_TEXT, Drawn, Example, Task

__all__ = [
    "END_OF_TEXT",
    "SPLITS",
    "TASKS",
    "Drawn",
    "Example",
    "Task",
    "check",
    "example",
    "held_back",
    "mixed_example",
    "prompt_rows",
    "split_of",
]

"""Which shapes are compiled: a few lengths that every prompt is rounded up to."""

import dataclasses
from collections.abc import Sequence
from typing import Any

__all__ = [
    "Shapes",
    "batch_bucket",
    "batches_of",
    "prompt_bucket",
    "rungs_between",
    "shapes_for",
]

CHUNK = 512
"""Longest piece of a prompt that runs in one pass."""

_SHORT = (16, 32, 64, 96, 128, 192, 256, 384, 512)
_ROUND = 64


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The static sizes of one batch.

    Attributes:
      rows: B, a power of two.
      chunk: C, tokens of one prefill pass.
      capacity: S, slots of a row.
    """

    rows: int
    chunk: int
    capacity: int


def prompt_bucket(length: int) -> int:
    """Returns the length that a prompt is padded to: powers of two beyond 512."""
    for bucket in _SHORT:
        if length <= bucket:
            return bucket
    return 1 << (length - 1).bit_length()


def batch_bucket(rows: int) -> int:
    """Returns the power of two that a batch is filled up to."""
    return 1 << (rows - 1).bit_length()


def shapes_for(prompt_lengths: list[int], max_new_tokens: int, depth: int) -> Shapes:
    """Returns the shapes of a batch.

    Prompts of one bucket and one `max_new_tokens` share all shapes, so a workload of
    mixed lengths compiles at most one prefill and one loop for each bucket it touches.

    Args:
      prompt_lengths: Tokens of each prompt.
      max_new_tokens: Most tokens that a row may emit.
      depth: Longest path of a draft, kept free behind the last token.
    """
    bucket = prompt_bucket(max(prompt_lengths))
    need = bucket + max_new_tokens + depth
    capacity = -(-need // _ROUND) * _ROUND
    return Shapes(batch_bucket(len(prompt_lengths)), min(bucket, CHUNK), capacity)


def batches_of(keys: Sequence[Any], most: int) -> list[list[int]]:
    """Returns the rows of every batch: equal keys together, keys and rows in order.

    Args:
      keys: Of each row, such as its bucket; rows of one key share all compiles.
      most: Rows of a batch.
    """
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return [
        group[first : first + most]
        for _, group in sorted(groups.items())
        for first in range(0, len(group), most)
    ]


def rungs_between(first: int, last: int) -> tuple[int, ...]:
    """Returns capacities that double from the first to the last."""
    rungs = []
    while first < last:
        rungs.append(first)
        first *= 2
    return (*rungs, last)

"""Rows of one state put into places of another, whatever a drafter's state looks like.

Letters: R rows that come.
"""

import functools
from typing import Any, TypeVar

import jax
from jax import Array

__all__ = ["add_stats", "put_rows", "row_axes"]

State = TypeVar("State")


def row_axes(two: Any, three: Any) -> tuple[int | None, ...]:
    """Returns the axis of rows of every leaf; None where rows share it.

    Args:
      two: Shapes of a state of two rows.
      three: Of the same state of three rows; that axis is where the two differ.
    """

    def differs(first: Any, second: Any) -> int | None:
        pairs = zip(first.shape, second.shape, strict=True)
        return next((axis for axis, (a, b) in enumerate(pairs) if a != b), None)

    leaves = zip(jax.tree.leaves(two), jax.tree.leaves(three), strict=True)
    return tuple(differs(*leaf) for leaf in leaves)


@functools.partial(jax.jit, static_argnames=("axes",), donate_argnames=("old",))
def put_rows(
    old: State, new: State, at_R: Array, *, axes: tuple[int | None, ...]
) -> State:
    """Writes the rows of a state into places of another.

    Args:
      old: Donated.
      new: Of R rows.
      at_R: int32 places; past the last one where a row only fills up.
      axes: What `row_axes` found. A leaf that rows share stays as it was.
    """

    def put(x: Array, y: Array, axis: int | None) -> Array:
        if axis is None:
            return x
        return x.at[(slice(None),) * axis + (at_R,)].set(y, mode="drop")

    leaves, structure = jax.tree.flatten(old)
    put_leaves = map(put, leaves, jax.tree.leaves(new), axes)
    return jax.tree.unflatten(structure, put_leaves)


def add_stats(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Returns the counts of two stays of a row together."""
    if not first:
        return second

    def add(a: Any, b: Any) -> Any:
        if isinstance(a, dict):
            return {name: add(a[name], b[name]) for name in a}
        if isinstance(a, list):
            return [x + y for x, y in zip(a, b, strict=True)]
        return a + b

    return add(first, second)

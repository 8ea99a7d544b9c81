"""Slots that grow while a batch is decoded: rungs of a ladder of capacities.

Letters: B rows, S slots.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["first_rungs", "grow", "steps_within"]

# Fewer steps than these are not worth a dispatch: the slots grow first.
LEAST_STEPS = 4


def first_rungs(
    rungs: Sequence[int], lengths: Sequence[int], whole: int, depth: int
) -> list[int]:
    """Returns the capacities that a batch goes through.

    Args:
      rungs: Capacities to choose from.
      lengths: Tokens of each prompt.
      whole: The capacity that holds the longest answer; always the last.
      depth: Longest path of a draft.
    """
    least = max(lengths) + 2 * depth + 1
    return [*(r for r in sorted(set(rungs)) if least <= r < whole), whole]


def steps_within(
    capacity: int, rows: Sequence[tuple[int, int]], steps: int, depth: int
) -> int:
    """Returns how many steps the slots hold, whatever is accepted.

    Args:
      capacity: S.
      rows: Length and limit of each row that is active.
      steps: Most that are wanted.
      depth: Longest path of a draft; so many slots are kept free at the end.

    Returns:
      `steps` where no row can reach the end; 0 says: grow first.
    """
    if max(limit for _, limit in rows) + depth <= capacity:
        return steps
    room = capacity - depth - max(length for length, _ in rows)
    held = min(steps, room // (depth + 1))
    return held if held >= min(LEAST_STEPS, steps) else 0


def grow(state: list[Any], wanted: Callable[[], Any]) -> Any:
    """Returns a state with more slots; the tokens that follow are the same.

    Slots lie in the order of positions and those past a row's length hold garbage, so
    every array that is to be larger is padded at its ends. One after another: only one
    old array lives beside its copy.

    Args:
      state: A list of one, the state; taken out of it, so that nobody holds it.
      wanted: Makes the state of the new capacity; only its shapes are looked at.
    """
    shapes = jax.tree.leaves(jax.eval_shape(wanted))
    leaves, structure = jax.tree.flatten(state.pop())
    for i, shape in enumerate(x.shape for x in shapes):
        if leaves[i].shape != shape:
            more = tuple(b - a for a, b in zip(leaves[i].shape, shape, strict=True))
            leaves[i] = _pad(leaves[i], more)
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnames=("more",))
def _pad(x: jax.Array, more: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, count) for count in more])

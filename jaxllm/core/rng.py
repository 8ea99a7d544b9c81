"""Randomness keyed by row and position, never by batch slot or step.

Letters: B rows, M nodes, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

__all__ = ["position_gumbel", "row_keys"]


def row_keys(seeds_B: ArrayLike) -> Array:
    """Returns one key a row, from its own seed alone.

    Args:
      seeds_B: Seeds in `[0, 2**32)`; the engine uses `seed + i` for row i of a call.

    Returns:
      Typed keys `[B]`.
    """
    return jax.vmap(jax.random.key)(jnp.asarray(seeds_B, jnp.uint32))


def position_gumbel(row_key_B: Array, position_BM: Array, vocabulary: int) -> Array:
    """Returns the Gumbel noise of absolute positions.

    The noise of a position depends on nothing but the row's key and the position, so
    a drafter and the verifier that ask for the same position see the same noise.

    Args:
      row_key_B: Typed keys.
      position_BM: int32 positions of the tokens to be chosen.
      vocabulary: V.

    Returns:
      `[B, M, V]` float32.

    Source: drafter-invariant speculative decoding (arXiv 2408.07978).
    """

    def noise(key: Array, position: Array) -> Array:
        return jax.random.gumbel(
            jax.random.fold_in(key, position), (vocabulary,), jnp.float32
        )

    return jax.vmap(jax.vmap(noise, (None, 0)))(row_key_B, position_BM)

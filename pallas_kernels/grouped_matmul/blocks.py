"""Rows of ragged groups laid out in whole blocks, each of one group.

Letters: M rows, E groups, B blocks, R = B * size slots of rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Blocks"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where rows stand when each group is padded to whole blocks.

    Attributes:
      group_B: int32, the group of each block; of the last group behind the used ones.
      row_R: int32, the row in each slot; M where there is none.
      slot_M: int32, the slot of each row; R for a row past the sum of the sizes.
      used: int32 scalar, the blocks that hold rows; they come first.
      size: Rows of a block.
      count: B, enough for any sizes.
    """

    group_B: Array
    row_R: Array
    slot_M: Array
    used: Array
    size: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, group_sizes_E: Array, rows: int, size: int) -> "Blocks":
        """Returns the blocks of groups that follow one another from row 0.

        Args:
          group_sizes_E: Integers, rows of each group; E at least 1. What exceeds the
            rows counts for nothing.
          rows: M.
          size: Rows of a block.

        Source: MegaBlocks (arXiv 2211.15841) section 5.1.
        """
        E = group_sizes_E.shape[0]
        # A whole block holds `size` rows; beside those, a group begins one at most.
        count = max(1, rows // size + min(E, rows))
        end_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), rows)
        start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
        last_E = jnp.cumsum(-(-(end_E - start_E) // size))
        first_E = jnp.concatenate([jnp.zeros(1, jnp.int32), last_E[:-1]])
        block_B = jnp.arange(count, dtype=jnp.int32)
        group_B = jnp.searchsorted(last_E, block_B, side="right")
        group_B = jnp.minimum(group_B, E - 1).astype(jnp.int32)
        begin_B = start_E[group_B] + (block_B - first_E[group_B]) * size
        row_BC = begin_B[:, None] + jnp.arange(size, dtype=jnp.int32)
        row_BC = jnp.where(row_BC < end_E[group_B][:, None], row_BC, rows)
        row_M = jnp.arange(rows, dtype=jnp.int32)
        group_M = jnp.searchsorted(end_E, row_M, side="right")
        inside_M = group_M < E
        group_M = jnp.minimum(group_M, E - 1)
        slot_M = first_E[group_M] * size + row_M - start_E[group_M]
        slot_M = jnp.where(inside_M, slot_M, count * size)
        return cls(group_B, row_BC.reshape(-1), slot_M, last_E[-1], size, count)

    def gather(self, x_M: Array) -> Array:
        """Returns `[R, ...]` of rows `[M, ...]`, 0 in slots that hold none."""
        return x_M.at[self.row_R].get(mode="fill", fill_value=0)

    def scatter(self, y_R: Array) -> Array:
        """Returns `[M, ...]` of slots `[R, ...]`, 0 in rows of no group."""
        return y_R.at[self.slot_M].get(mode="fill", fill_value=0)

"""How weights of `quant_matmul` lie in memory.

Letters: D contracted axis of a weight, F its output axis, G groups of rows that share
a scale, P rows of packed bytes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

__all__ = ["IntWeight", "pack_int4", "packed_block", "packed_rows", "unpack_int4"]

_BLOCK = 256
_SMALL = 64  # two halves of a whole int8 tile of 32 rows


class IntWeight(NamedTuple):
    """A weight of integers; the element it stands for is `(value - zero) * scale`.

    Any field may carry a leading axis of layers, all of them or none.

    Attributes:
      values: int8 `[D, F]`; or uint8 `[P, F]`, int4 values packed by `pack_int4`.
      scale: Floating `[G, F]`, float32 costs no conversion: row g is shared by the
        D / G rows of the weight from `g * D / G` on. G = 1 is a scale per channel.
      zero: `[G, F]`, the value that stands for 0; None where it is 0 itself. A code
        c of 0..15 with zero point z is stored as c - 8 with zero z - 8.
    """

    values: Array
    scale: Array
    zero: Array | None = None


def packed_block(depth: int) -> int:
    """Returns the rows of a block that `pack_int4` splits into halves."""
    return min(_BLOCK, -(-depth // _SMALL) * _SMALL)


def packed_rows(depth: int) -> int:
    """Returns P, the rows of bytes that `depth` rows of values pack into."""
    block = packed_block(depth)
    return -(-depth // block) * block // 2


def pack_int4(values_DF: Array) -> Array:
    """Packs values of four bits, two per byte, along the contracted axis.

    Rows are cut into blocks of 256, or into one block of D rounded up to a multiple of
    64 where D is smaller; rows of 0 fill the last block. Byte i of a block of b rows
    holds row i in its low four bits and row i + b / 2 in its high four bits, each in
    two's complement. So both halves unpack to neighbouring rows, nothing is
    interleaved, and a split of D over devices at multiples of 256 splits the bytes.

    Args:
      values_DF: Integers `[*stack, D, F]` in -8..7; codes 0..15 pack as well and
        unpack to the value of the same four bits.

    Returns:
      uint8 `[*stack, P, F]`.
    """
    *stack, depth, features = values_DF.shape
    block = packed_block(depth)
    rows = packed_rows(depth) * 2
    pad = [(0, 0)] * len(stack) + [(0, rows - depth), (0, 0)]
    bits = jnp.pad(values_DF.astype(jnp.uint8) & 0xF, pad)
    bits = bits.reshape(*stack, rows // block, 2, block // 2, features)
    packed = bits[..., 0, :, :] | (bits[..., 1, :, :] << 4)
    return packed.reshape(*stack, rows // 2, features)


def unpack_int4(packed_PF: Array, depth: int) -> Array:
    """Returns int8 values in -8..7, the inverse of `pack_int4`.

    Args:
      packed_PF: uint8 `[*stack, P, F]`.
      depth: D, which the bytes do not say.

    Returns:
      int8 `[*stack, D, F]`.

    Raises:
      ValueError: P is not what `depth` rows pack into.
    """
    *stack, rows, features = packed_PF.shape
    if rows != packed_rows(depth):
        raise ValueError(
            f"unpack_int4: {rows} rows of bytes, expected {packed_rows(depth)} for "
            f"depth={depth}."
        )
    half = packed_block(depth) // 2
    signed = packed_PF.astype(jnp.int8).reshape(*stack, rows // half, half, features)
    halves = jnp.stack([(signed << 4) >> 4, signed >> 4], axis=-3)
    return halves.reshape(*stack, 2 * rows, features)[..., :depth, :]

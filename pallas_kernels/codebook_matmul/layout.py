"""How weights of `codebook_matmul` lie in memory.

Letters: D contracted axis of a weight, Z numbers of a tuple, Q = D / Z tuples, F output
axis, C entries of a codebook, U and W codebooks along D and F, G groups of a scale, P
rows of packed bytes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quant_matmul.layout import unpack_int4

__all__ = ["CodebookWeight", "of_layer", "values"]


class CodebookWeight(NamedTuple):
    """A weight whose rows come in tuples, each an entry of a codebook.

    Tuple i of a column holds its rows `i * Z` to `i * Z + Z - 1`. Any field may carry a
    leading axis of layers, all of them or none.

    Attributes:
      codes: uint8 `[Q, F]`, below C; or `[P, F]`, codes below 16 packed by `pack_int4`.
      codebook: Floating or int8 `[U, W, C, Z]`. Rows are cut into U equal parts and
        columns into W, and the tuples of a part have its codebook; with `select`, it
        says which of the U a tuple has.
      scale: `[G, F]`, multiplies the entries; shared by D / G rows. None for none.
      select: Integers `[G, F]` below U, the codebook of each group: weights of mixed
        datatypes. int32 costs no conversion. Needs a scale.
    """

    codes: Array
    codebook: Array
    scale: Array | None = None
    select: Array | None = None


def of_layer(weight: CodebookWeight, layer: Array | int | None) -> CodebookWeight:
    """Returns one layer of a stacked weight, or the weight itself for None."""
    if layer is None:
        return weight
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), weight
    )


def values(weight: CodebookWeight, depth: int, packed: bool) -> Array:
    """Returns the entries `[D, F]` that codes stand for, without their scale."""
    codes_QF, codebook, _, select = weight
    U, W, _, Z = codebook.shape
    Q, F = depth // Z, codes_QF.shape[1]
    if packed:
        codes_QF = unpack_int4(codes_QF, Q) & 0xF
    if select is None:
        part_QF = jnp.repeat(jnp.arange(U), Q // U)[:, None]
    else:
        part_QF = jnp.repeat(select.astype(jnp.int32), Q // select.shape[0], axis=0)
    column_F = jnp.repeat(jnp.arange(W), F // W)
    found_QFZ = codebook[part_QF, column_F, codes_QF.astype(jnp.int32)]
    return found_QFZ.swapaxes(1, 2).reshape(depth, F)

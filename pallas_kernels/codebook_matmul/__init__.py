"""Products with weights whose entries are looked up in codebooks.

Two kinds of weights are stored like this: vectors of neighbouring rows that share a
code (vector quantization), and single numbers of one of several small grids, selected
group by group (mixed datatypes; a learned or fixed grid for all is the case of one). On
a TPU the codes are read as they are stored and looked up in registers; XLA writes the
whole weight out first. jax ships nothing for this.

Letters: M rows, D contracted axis, F output axis, U and W codebooks along D and F, C
entries of a codebook, Z numbers of an entry, G groups of a scale.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.codebook_matmul.layout import CodebookWeight
from pallas_kernels.codebook_matmul.reference import codebook_matmul_reference
from pallas_kernels.codebook_matmul.shapes import Shape, block_key
from pallas_kernels.codebook_matmul.tpu import codebook_matmul_tpu
from pallas_kernels.quant_matmul.layout import packed_rows
from pallas_kernels.quant_matmul.reference import result_dtype

__all__ = ["CodebookWeight", "codebook_matmul", "codebook_matmul_reference"]

_BLOCK = {"rows": 256, "features": 256, "depth": 1024}
_PACKED_ENTRIES = 16


def codebook_matmul(
    x_MD: Array,
    weight: CodebookWeight,
    x_scale_M: Array | None = None,
    *,
    packed: bool = False,
    layer: Array | int | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
    block: Mapping[str, int] | None = None,
) -> Array:
    """Multiplies activations by a weight of codes.

    Args:
      x_MD: bfloat16 or float32 activations; or int8 ones, for codebooks of integers
        in -128..127, which are multiplied and summed exactly, in int32 over a group.
      weight: `CodebookWeight` of `[D, F]`; stacked where `layer` is given.
      x_scale_M: Floating, multiplies each row of the product.
      packed: Whether the codes are packed.
      layer: Which layer of a stacked weight; one outside `[0, L)` is the nearest. Its
        codes are not copied out of the stack, its codebook is, and laid out for the
        kernel.
      out_dtype: Dtype of the result; that of `x_MD` when None, float32 for int8.
      implementation: As for `dispatch.choose`.
      block: Rows, features and depth (in tuples) of a tile, under these names.

    Returns:
      `[M, F]`, accumulated in float32 or int32.

    Raises:
      ValueError: The shapes do not belong together, or the named implementation
        cannot run them.
      NotImplementedError: The named implementation does not exist here.

    Source: GPTVQ (arXiv 2402.15319) section 3 for vectors; BitMoD (arXiv 2411.11745)
      section III for mixed datatypes.
    """
    if layer is not None:  # a negative index would wrap
        layer = jnp.clip(layer, 0, weight.codes.shape[0] - 1)
    shape = _shape(x_MD, weight, x_scale_M, layer, packed)
    chosen = dispatch.choose("codebook_matmul", implementation, shape)
    if chosen == "reference":
        return codebook_matmul_reference(
            x_MD, weight, x_scale_M, packed=packed, layer=layer, out_dtype=out_dtype
        )
    sizes = dispatch.blocks("codebook_matmul", block_key(shape), _BLOCK)
    return codebook_matmul_tpu(
        x_MD,
        weight,
        x_scale_M,
        layer,
        packed=packed,
        out_dtype=result_dtype(x_MD, out_dtype),
        block={**sizes, **(block or {})},
        interpret=dispatch.interpret_mode(chosen),
    )


def _shape(
    x_MD: Array,
    weight: CodebookWeight,
    x_scale_M: Array | None,
    layer: Array | int | None,
    packed: bool,
) -> Shape:
    """Returns the call's shape.

    Raises:
      ValueError: The operands do not belong together.
    """
    codes, codebook, scale, select = weight
    rank, (M, D) = 2 if layer is None else 3, x_MD.shape
    if codes.ndim != rank or codebook.ndim != rank + 2 or codes.dtype != jnp.uint8:
        raise ValueError(
            f"codebook_matmul: codes {codes.dtype}{codes.shape} and codebook "
            f"{codebook.shape} with layer={layer}, expected uint8 codes of {rank} axes "
            f"and a codebook of {rank + 2}."
        )
    U, W, C, Z = codebook.shape[-4:]
    rows, F = codes.shape[-2:]
    parts = 1 if select is not None else U
    if D % (Z * parts) or F % W or (select is not None and W > 1):
        raise ValueError(
            f"codebook_matmul: codebook {codebook.shape} for {D} rows and {F} columns, "
            "expected each codebook to serve as many whole tuples and columns, and one "
            "for all columns where they are selected."
        )
    expected = packed_rows(D // Z) if packed else D // Z
    if rows != expected or (packed and C > _PACKED_ENTRIES):
        raise ValueError(
            f"codebook_matmul: {rows} rows of codes for {C} entries with "
            f"packed={packed}, expected {expected}, and at most {_PACKED_ENTRIES} "
            "entries where they are packed."
        )
    _check_groups(weight, D, F, Z)
    if x_scale_M is not None and x_scale_M.shape != (M,):
        raise ValueError(
            f"codebook_matmul: x_scale {x_scale_M.shape}, expected one for each of {M} "
            "rows."
        )
    return Shape(
        rows=M,
        depth=D,
        features=F,
        codebook=(U, W, C, Z),
        groups=0 if scale is None else scale.shape[-2],
        selected=select is not None,
        packed=packed,
        dtype=x_MD.dtype.name,
        layers=0 if layer is None else codes.shape[0],
    )


def _check_groups(weight: CodebookWeight, depth: int, features: int, size: int) -> None:
    """Checks scales and selections of tuples of a size.

    Raises:
      ValueError: They do not fit the weight, or one another.
    """
    scale, select, rank = weight.scale, weight.select, weight.codes.ndim
    if scale is None:
        if select is not None:
            raise ValueError("codebook_matmul: select without a scale, expected both.")
        return
    groups = scale.shape[-2]
    alike = select is None or select.shape == scale.shape
    whole = groups and depth % groups == 0 and depth // groups % size == 0
    if scale.ndim != rank or scale.shape[-1] != features or not (alike and whole):
        raise ValueError(
            f"codebook_matmul: scale {scale.shape} and select "
            f"{None if select is None else select.shape} for {depth} rows and "
            f"{features} columns, expected {rank} axes, groups of whole tuples, and as "
            "many selections as scales."
        )

"""The TPU kernel of `quant_matmul` and `grouped_matmul`: each tile of rows, its matrix.

A grid over tiles of output features, rows and depth, the last in sequence. Which of
the stacked matrices a tile of rows meets is read from an array, so that neither a
layer nor an expert is copied out of its stack. Weights stay as they are in memory and
become floats, or int8, a tile at a time. Where all of a group's rows meet one product,
that product is scaled; scales of smaller groups multiply the weights.

Letters: R rows, whole tiles of them, D contracted axis, F output axis, E matrices, G
groups of a scale, P rows of packed bytes, B tiles of rows; r, d, f the axes of a tile.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quant_matmul.layout import packed_block

__all__ = ["Plan", "Tiles", "indexed_matmul", "least_rows", "plan"]

_LANES = 128
_CHUNK = 256  # rows of a tile that become floats at a time
_DEEPEST = 4096
_EIGHT = 8  # rows of a hardware tile of float32
_SUBLANES = {4: _EIGHT, 2: 16, 1: 32}  # the same by bytes of an element


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the depth is cut.

    Attributes:
      depth: Rows of the weight, those of packing included.
      tile: Rows of a tile.
      group: Rows that share a scale; 0 for a scale per channel, which multiplies the
        finished sum.
      half: Rows of half a packed block; 0 for int8.
    """

    depth: int
    tile: int
    group: int
    half: int

    @property
    def tiles(self) -> int:
        """Tiles that cover the depth."""
        return -(-self.depth // self.tile)

    @property
    def scales(self) -> int:
        """Rows of scales that a tile begins, 1 where a group spans tiles."""
        return max(1, self.tile // self.group) if self.group else 1

    def missing(self, groups: int) -> int:
        """Returns how many rows of small groups' scales the tiles read past the end.

        Larger groups have a scale read each, and none past the end.
        """
        if not 0 < self.group < _LANES:
            return 0
        return max(0, -(-self.tiles * self.tile // self.group) - groups)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of a tile: first row, rows, and which half of a block."""
        if self.half:
            for start in range(0, self.tile, self.half):
                yield start, self.half, start // self.half % 2
            return
        size = min(self.tile, _CHUNK)
        if self.group >= _LANES:
            size = math.gcd(self.group, self.tile, _CHUNK)
        for start in range(0, self.tile, size):
            yield start, min(size, self.tile - start), 0


def plan(depth: int, groups: int, packed: bool, wanted: int) -> Plan | str:
    """Returns how to cut the depth in tiles of about `wanted` rows, or why not."""
    half = packed_block(depth) // 2 if packed else 0
    unit = 2 * half or _LANES
    rows = -(-depth // unit) * unit if packed else depth
    group = depth // groups if groups > 1 else 0
    if group >= _LANES and group % _LANES:
        return f"groups of {group} rows are no multiple of {_LANES}"
    if group and group < _LANES and ((half or _LANES) % group or group % 8):
        return f"groups of {group} rows do not divide {half or _LANES} in eighths"
    step = unit
    if group:  # rows of small groups' scales are read by whole hardware tiles
        step = math.lcm(unit, group if group >= _LANES else group * _EIGHT)
    if rows <= max(wanted, step):
        return Plan(rows, rows, group, half)
    if group > wanted:
        tiles = [t for t in range(unit, wanted + 1, unit) if group % t == 0]
        if tiles:
            return Plan(rows, tiles[-1], group, half)
    tile = max(wanted // step, 1) * step
    if tile > _DEEPEST:
        return f"groups of {group} rows meet no tile of at most {_DEEPEST} rows"
    return Plan(rows, min(tile, rows), group, half)


class Tiles(NamedTuple):
    """Which matrix each tile of rows meets.

    Attributes:
      index_B: int32 in `[0, E)`.
      used: Tiles that count, from the first; what the others hold stays undefined.
    """

    index_B: Array
    used: Array | int


def least_rows(dtype: Any) -> int:
    """Returns the fewest rows of activations that a tile may have."""
    return _SUBLANES[min(4, jnp.dtype(dtype).itemsize)]


def indexed_matmul(
    x_RD: Array,
    values: Array,
    scale: Array | None,
    x_scale_R: Array | None,
    tiles: Tiles,
    *,
    out_dtype: Any,
    block: Mapping[str, int],
    interpret: Any,
) -> Array:
    """Multiplies each tile of rows by the matrix that its index names.

    Args:
      x_RD: Activations, B tiles of as many rows each, a multiple of `least_rows`.
      values: E matrices `[E, D, F]`: floating, int8, or packed in uint8 `[E, P, F]`.
      scale: `[E, G, F]`; `[1, G, F]` serves all matrices; None for none.
      x_scale_R: A scale for each row, or None.
      tiles: What each tile meets.
      out_dtype: Dtype of the result.
      block: Features and depth of a tile, cut to what the layout allows.
      interpret: Handed to `pallas_call`.
    """
    (R, D), F, B = x_RD.shape, values.shape[2], tiles.index_B.shape[0]
    groups = 1 if scale is None else scale.shape[1]
    cut = plan(D, groups, values.dtype == jnp.uint8, block["depth"])
    if isinstance(cut, str):
        raise ValueError(f"{cut}, with tiles of about {block['depth']} rows.")
    tr, tf = R // B, min(_fit(block["features"], F, _LANES), F)
    # Zeros, so that what a tile holds past the end of the weight counts for nothing.
    x = jnp.pad(x_RD, ((0, 0), (0, cut.tiles * cut.tile - D)))
    operands = [x, values]
    if scale is not None:  # what lies past the array may be NaN
        pad = ((0, 0), (0, cut.missing(groups)), (0, 0))
        operands.append(jnp.pad(scale.astype(jnp.float32), pad))
    if x_scale_R is not None:
        operands.append(x_scale_R.astype(jnp.float32)[:, None])
    exact = jnp.issubdtype(x.dtype, jnp.integer) and not cut.group
    read = values.size // values.shape[0] * values.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, cut=cut, scaled=scale is not None),
        out_shape=jax.ShapeDtypeStruct((R, F), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(-(-F // tf), B, cut.tiles),
            in_specs=_specs(operands, cut, (tr, tf), scale is not None),
            out_specs=pl.BlockSpec((tr, tf), lambda f, r, d, *_: (r, f)),
            scratch_shapes=[pltpu.VMEM((tr, tf), jnp.int32 if exact else jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * D * F,
            bytes_accessed=read * B + x.size * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(tiles.index_B, jnp.asarray(tiles.used, jnp.int32).reshape(1), *operands)


def _specs(
    operands: list[Array], cut: Plan, size: tuple[int, int], scaled: bool
) -> list[pl.BlockSpec]:
    """Returns how a tile of some rows and features reads each operand."""
    tr, tf = size

    def at(pick: Any) -> Any:
        """Freezes the indices behind the last used tile: nothing new is fetched."""

        def indices(f: Any, r: Any, d: Any, index: Any, used: Any) -> Any:
            inside = r < used[0]
            r = jnp.where(inside, r, jnp.maximum(used[0] - 1, 0))
            return pick(f, r, jnp.where(inside, d, cut.tiles - 1), index)

        return indices

    rows = cut.tile // 2 if cut.half else cut.tile
    specs = [
        pl.BlockSpec((tr, cut.tile), at(lambda f, r, d, index: (r, d))),
        pl.BlockSpec((None, rows, tf), at(lambda f, r, d, index: (index[r], d, f))),
    ]
    if scaled:
        matrices, groups, _ = operands[2].shape
        stride = min(matrices - 1, 1)
        at_scale = at(lambda f, r, d, index: (index[r] * stride, 0, f))
        specs.append(pl.BlockSpec((None, groups, tf), at_scale))
    if len(operands) > len(specs):
        specs.append(pl.BlockSpec((tr, 1), at(lambda f, r, d, index: (r, 0))))
    return specs


def _fit(wanted: int, size: int, unit: int) -> int:
    """Returns a tile of whole units: about `wanted`, no longer than needed."""
    return min(max(wanted // unit, 1), -(-size // unit)) * unit


def _kernel(index_ref: Any, used_ref: Any, *refs: Any, cut: Plan, scaled: bool) -> None:
    del index_ref  # only the index maps read it
    *inputs, out_ref, sum_ref = refs
    x_ref, w_ref, *scale_refs = inputs
    scale_ref: Any = scale_refs.pop(0) if scaled else None
    step = pl.program_id(2)

    @pl.when(pl.program_id(1) < used_ref[0])
    def _tile() -> None:
        @pl.when(step == 0)
        def _start() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        _add(x_ref, w_ref, scale_ref, sum_ref, cut)

        @pl.when(step == cut.tiles - 1)
        def _finish() -> None:
            y = sum_ref[...].astype(jnp.float32)
            if scaled and not cut.group:
                y = y * scale_ref[...]
            if scale_refs:  # that of the rows
                y = y * scale_refs[0][...]
            out_ref[...] = y.astype(out_ref.dtype)


def _add(x_ref: Any, w_ref: Any, scale_ref: Any, sum_ref: Any, cut: Plan) -> None:
    """Adds the product of one tile to the sum."""
    step, dtype = pl.program_id(2), x_ref.dtype
    small = 0 < cut.group < _LANES
    if small:
        first = pl.multiple_of(step * cut.scales, _EIGHT) if cut.tiles > 1 else 0
        scales = scale_ref[pl.ds(first, cut.scales), :]
    part, total = None, None
    for start, size, high in cut.chunks():
        w = _values(w_ref, start, size, high, cut)
        if cut.depth % cut.tile and jnp.issubdtype(w.dtype, jnp.floating):
            row = jax.lax.broadcasted_iota(jnp.int32, w.shape, 0) + start
            # Past the end may be NaN, and 0 times NaN is NaN.
            w = jnp.where(row < cut.depth - step * cut.tile, w, jnp.zeros_like(w))
        if small:
            rows = scales[start // cut.group : (start + size) // cut.group, None]
            shape = (size // cut.group, cut.group, w.shape[1])
            w = w.astype(jnp.float32) * jnp.broadcast_to(rows, shape).reshape(w.shape)
        y = _dot(x_ref[:, start : start + size], _cast(w, dtype))
        part = y if part is None else part + y
        end = start + size
        if cut.group >= _LANES and (end % cut.group == 0 or end == cut.tile):
            row = jax.lax.div(step * cut.tile + start, jnp.int32(cut.group))
            row = jnp.minimum(row, scale_ref.shape[0] - 1)  # rows of zeros behind it
            part = part.astype(jnp.float32) * scale_ref[pl.ds(row, 1), :]
            total = part if total is None else total + part
            part = None
    sum_ref[...] += part if total is None else total


def _values(w_ref: Any, start: int, size: int, high: int, cut: Plan) -> Array:
    """Returns rows of a tile, as int8 or, where they were packed, as int32."""
    if not cut.half:
        return w_ref[start : start + size, :]
    first = start // (2 * cut.half) * cut.half
    bits = w_ref[first : first + cut.half, :].astype(jnp.int32)
    # Mosaic has no shifts of 8 bits. The first moves a sign to the top.
    return (bits << (24 if high else 28)) >> 28


def _cast(w: Array, dtype: Any) -> Array:
    if w.dtype == dtype:
        return w
    if jnp.issubdtype(dtype, jnp.integer):
        return w.astype(dtype)
    return w.astype(jnp.float32).astype(dtype)


def _dot(x: Array, w: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.dot(x, w, preferred_element_type=jnp.int32)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=exact, preferred_element_type=jnp.float32)

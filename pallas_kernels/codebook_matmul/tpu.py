"""`codebook_matmul` for TPUs: entries are looked up along the lanes of a register.

A register holds 128 entries of one component, and a gather along its lanes looks up
as many codes at once; more entries take a gather for each 128 of them. Codebooks that
serve fewer than 128 columns are laid side by side, and a column's codes are moved to
its own. Component z of all tuples meets component z of the activations, so tuples are
never taken apart.

Letters: M rows, R rows padded to tiles, D contracted axis, Z numbers of a tuple, Q
tuples, F output axis, C entries of a codebook, U and W codebooks along D and F, B
blocks of 128 columns, T entries of a block's codebooks, G groups of a scale; r, d, f
the axes of a tile.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.codebook_matmul.layout import CodebookWeight
from pallas_kernels.quant_matmul.indexed import Plan, least_rows, plan

__all__ = ["Lookup", "codebook_matmul_tpu", "lookup"]

_LANES = 128
_MOST_ENTRIES = 1024


@dataclasses.dataclass(frozen=True)
class Lookup:
    """How codes find their entries.

    Attributes:
      cut: How the tuples are cut into tiles.
      tuples: Tuples of a column that share a codebook; all of them where it is
        selected.
      parts: Codebooks along D that a tile meets.
      all_parts: U, or 1 where codebooks are selected.
      width: Columns of a block that share a codebook.
      entries: Entries from one codebook to the next of a block.
      blocked: Whether blocks of columns have codebooks of their own.
      selected: Whether codebooks are selected.
    """

    cut: Plan
    tuples: int
    parts: int
    all_parts: int
    width: int
    entries: int
    blocked: bool
    selected: bool


def lookup(
    codebook: tuple[int, ...],
    size: tuple[int, int],
    groups: int,
    packed: bool,
    selected: bool,
    wanted: int,
) -> Lookup | str:
    """Returns how to look entries up, or why not.

    Args:
      codebook: U, W, C, Z.
      size: D and F.
      groups: G.
      packed: Whether codes are packed.
      selected: Whether codebooks are selected.
      wanted: About how many tuples a tile is to have.
    """
    U, W, C, Z = codebook
    Q, columns = size[0] // Z, size[1] // W
    if groups > 1 and size[0] // groups % Z:
        return f"a tuple of {Z} crosses groups of {size[0] // groups} rows"
    if W > 1 and columns % _LANES and _LANES % columns:
        return f"{columns} columns of a codebook do not divide {_LANES}"
    shared = 1 if W == 1 else max(1, _LANES // columns)
    if (U if selected else shared) * C > _MOST_ENTRIES:
        return f"codebooks of {C} entries, side by side, exceed {_MOST_ENTRIES}"
    tuples = Q if selected else Q // U
    if tuples < Q and tuples % 32:
        return f"{tuples} tuples of a codebook are no multiple of 32"
    cut = _nested(Q, groups, packed, wanted, tuples)
    if isinstance(cut, str):
        return cut
    return Lookup(
        cut=cut,
        tuples=tuples,
        parts=min(max(1, cut.tile // tuples), 1 if selected else U),
        all_parts=1 if selected else U,
        width=min(columns, _LANES) if W > 1 else _LANES,
        entries=C,
        blocked=W > 1,
        selected=selected,
    )


def _nested(
    depth: int, groups: int, packed: bool, wanted: int, tuples: int
) -> Plan | str:
    """Returns a plan whose tiles lie in a codebook's tuples, or hold whole ones."""
    for size in range(max(wanted, 1), 0, -_LANES):
        cut = plan(depth, groups, packed, size)
        if isinstance(cut, str):
            return cut
        if cut.tiles == 1 or not tuples % cut.tile or not cut.tile % tuples:
            return cut
    return f"{tuples} tuples of a codebook and tiles of multiples of 128 do not nest"


def codebook_matmul_tpu(
    x_MD: Array,
    weight: CodebookWeight,
    x_scale_M: Array | None,
    layer: Array | int | None,
    *,
    packed: bool,
    out_dtype: Any,
    block: Mapping[str, int],
    interpret: Any,
) -> Array:
    """Returns the product; arguments as for `codebook_matmul`."""
    if layer is None:
        weight, layer = jax.tree.map(lambda a: a[None], weight), 0
    codebook, scale = weight.codebook, weight.scale
    Z, F, (M, D) = codebook.shape[-1], weight.codes.shape[-1], x_MD.shape
    groups, selected = 1 if scale is None else scale.shape[1], weight.select is not None
    how = lookup(codebook.shape[1:], (D, F), groups, packed, selected, block["depth"])
    if isinstance(how, str):
        raise ValueError(f"codebook_matmul: {how}.")
    cut, least = how.cut, least_rows(x_MD.dtype)
    tr = min(max(block["rows"] // least, 1), -(-M // least)) * least
    tf = min(max(block["features"] // _LANES, 1), -(-F // _LANES)) * _LANES
    R = -(-M // tr) * tr
    # Zeros, so that what a tile holds past the end of the weight counts for nothing.
    x_ZRQ = jnp.moveaxis(x_MD.reshape(M, D // Z, Z), 2, 0)
    x_ZRQ = jnp.pad(x_ZRQ, ((0, 0), (0, R - M), (0, cut.tiles * cut.tile - D // Z)))
    codebook = jax.lax.dynamic_index_in_dim(codebook, layer, keepdims=False)
    table = _table(codebook, F, how)
    operands, specs = _of_columns(weight, how, tf)
    operands = [x_ZRQ, table, *operands]
    specs = [
        pl.BlockSpec((Z, tr, cut.tile), lambda f, r, d, layer: (0, r, d)),
        _table_spec(table.shape, tf, how),
        *specs,
    ]
    if x_scale_M is not None:
        operands.append(jnp.pad(x_scale_M.astype(jnp.float32), (0, R - M))[:, None])
        specs.append(pl.BlockSpec((tr, 1), lambda f, r, d, layer: (r, 0)))
    exact = jnp.issubdtype(x_MD.dtype, jnp.integer) and not cut.group
    y = pl.pallas_call(
        functools.partial(_kernel, how=how, scaled=scale is not None),
        out_shape=jax.ShapeDtypeStruct((R, max(F, _LANES)), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-F // tf), R // tr, cut.tiles),
            in_specs=specs,
            out_specs=pl.BlockSpec((tr, tf), lambda f, r, d, layer: (r, f)),
            scratch_shapes=[pltpu.VMEM((tr, tf), jnp.int32 if exact else jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(jnp.asarray(layer, jnp.int32).reshape(1), *operands)
    return y[:M, :F]


def _of_columns(
    weight: CodebookWeight, how: Lookup, features: int
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Returns codes, scales and selections, and how a tile of features reads them."""
    codes, cut = weight.codes, how.cut
    # A gather fills its lanes.
    lanes = (0, max(0, _LANES - codes.shape[-1]))
    rows = cut.tile // 2 if cut.half else cut.tile
    operands = [jnp.pad(codes, ((0, 0), (0, 0), lanes))]
    specs = [
        pl.BlockSpec((None, rows, features), lambda f, r, d, layer: (layer[0], d, f))
    ]
    for a, dtype in ((weight.scale, jnp.float32), (weight.select, jnp.int32)):
        if a is None:
            continue
        a = jnp.pad(a.astype(dtype), ((0, 0), (0, cut.missing(a.shape[1])), lanes))
        operands.append(a)
        block = (None, a.shape[1], features)
        specs.append(pl.BlockSpec(block, lambda f, r, d, layer: (layer[0], 0, f)))
    return operands, specs


def _table_spec(table: tuple[int, ...], features: int, how: Lookup) -> pl.BlockSpec:
    """Returns how a tile of some features reads the table `[U, B, Z, T]`."""
    blocks = features // _LANES if how.blocked else 1
    step = max(how.tuples, how.cut.tile)

    def at(f: Any, r: Any, d: Any, layer: Any) -> Any:
        part = (
            jax.lax.div(d * how.cut.tile, jnp.int32(step)) if how.all_parts > 1 else 0
        )
        return part, f if how.blocked else 0, 0, 0

    return pl.BlockSpec((how.parts, blocks, *table[2:]), at)


def _table(codebook_UWCZ: Array, features: int, how: Lookup) -> Array:
    """Returns float32 `[U, B, Z, T]`, the codebooks of each block side by side."""
    U, W, C, Z = codebook_UWCZ.shape
    table = codebook_UWCZ.astype(jnp.float32)
    if how.selected:
        table = table.transpose(1, 3, 0, 2).reshape(1, W, Z, U * C)
    elif how.width < _LANES:
        side = _LANES // how.width
        table = jnp.pad(table, ((0, 0), (0, -W % side), (0, 0), (0, 0)))
        table = table.reshape(U, -1, side, C, Z).transpose(0, 1, 4, 2, 3)
        table = table.reshape(U, -1, Z, side * C)
    else:
        table = table.swapaxes(2, 3)
        if how.blocked:  # a codebook for each block, those of wide parts repeated
            table = jnp.repeat(table, features // W // _LANES, axis=1)
    pad = -table.shape[-1] % _LANES
    return jnp.pad(table, ((0, 0), (0, 0), (0, 0), (0, pad)))


def _kernel(layer_ref: Any, *refs: Any, how: Lookup, scaled: bool) -> None:
    del layer_ref  # only the index maps read it
    *inputs, out_ref, sum_ref = refs
    x_ref, table_ref, codes_ref, *rest = inputs
    scale_ref: Any = rest.pop(0) if scaled else None
    select_ref: Any = rest.pop(0) if how.selected else None
    cut, step = how.cut, pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    part: Any = None
    total: Any = None
    for start, size, high in cut.chunks():
        codes = _codes(codes_ref, start, size, high, cut)
        if select_ref is not None:
            codes = codes + how.entries * _of_rows(
                select_ref, start, size, codes.shape, cut
            )
        scales = None
        if 0 < cut.group < _LANES:
            scales = _of_rows(scale_ref, start, size, codes.shape, cut)
        for z in range(x_ref.shape[0]):
            w = _entries(codes, table_ref, z, start, how)
            w = w if scales is None else w * scales
            y = _dot(x_ref[z, :, start : start + size], w)
            part = y if part is None else part + y
        end = start + size
        if cut.group >= _LANES and (end % cut.group == 0 or end == cut.tile):
            part = part.astype(jnp.float32) * _row(scale_ref, start, cut)
            total = part if total is None else total + part
            part = None
    sum_ref[...] += part if total is None else total

    @pl.when(step == cut.tiles - 1)
    def _finish() -> None:
        y = sum_ref[...].astype(jnp.float32)
        if scaled and not cut.group:
            y = y * scale_ref[...]
        if rest:  # the scale of the rows
            y = y * rest[0][...]
        out_ref[...] = y.astype(out_ref.dtype)


def _codes(codes_ref: Any, start: int, size: int, high: int, cut: Plan) -> Array:
    if not cut.half:
        return codes_ref[start : start + size, :].astype(jnp.int32)
    first = start // (2 * cut.half) * cut.half
    bits = codes_ref[first : first + cut.half, :].astype(jnp.int32)
    return bits >> 4 if high else bits & 0xF


def _row(ref: Any, start: int, cut: Plan) -> Array:
    """Returns the row `[1, f]` of the group that a chunk lies in."""
    if not cut.group:
        return ref[...]
    row = jax.lax.div(pl.program_id(2) * cut.tile + start, jnp.int32(cut.group))
    return ref[pl.ds(jnp.minimum(row, ref.shape[0] - 1), 1), :]


def _of_rows(
    ref: Any, start: int, size: int, shape: tuple[int, ...], cut: Plan
) -> Array:
    """Returns, for each row of a chunk, the row of its group."""
    if not 0 < cut.group < _LANES:
        return jnp.broadcast_to(_row(ref, start, cut), shape)
    step = pl.program_id(2)
    first = pl.multiple_of(step * cut.scales, 8) if cut.tiles > 1 else 0
    rows = ref[pl.ds(first, cut.scales), :]
    rows = rows[start // cut.group : (start + size) // cut.group, None]
    whole = (size // cut.group, cut.group, shape[1])
    return jnp.broadcast_to(rows, whole).reshape(shape)


def _entries(codes: Array, table_ref: Any, z: int, start: int, how: Lookup) -> Array:
    """Returns component z of the entries that a chunk's codes stand for."""
    size = codes.shape[0]
    piece = math.gcd(size, how.tuples) if how.all_parts > 1 else size
    columns = []
    for lane in range(0, codes.shape[1], _LANES):
        block = lane // _LANES if how.blocked else 0
        index = codes[:, lane : lane + _LANES]
        if how.width < _LANES:
            offset = jax.lax.broadcasted_iota(jnp.int32, index.shape, 1)
            offset = jax.lax.shift_right_logical(offset, how.width.bit_length() - 1)
            index = index + offset * how.entries
        rows = [
            _gather(
                table_ref,
                (_part(start + first, how), block, z),
                index[first : first + piece],
            )
            for first in range(0, size, piece)
        ]
        columns.append(jnp.concatenate(rows, axis=0))
    return jnp.concatenate(columns, axis=1)


def _part(row: int, how: Lookup) -> Array | int:
    """Returns which of a tile's codebooks a row of it has."""
    if how.parts == 1:
        return 0
    # Behind the weight, where nothing counts, what is read still has to be finite.
    last = how.all_parts - 1 - pl.program_id(2) * how.parts
    return jnp.minimum(row // how.tuples, last)


def _gather(table_ref: Any, at: tuple[Any, int, int], index: Array) -> Array:
    """Looks codes up among the entries of a block, 128 at a time."""
    part, block, z = at
    lane = index & (_LANES - 1)
    found: Any = None
    for first in range(0, table_ref.shape[3], _LANES):
        entries = table_ref[part, block, z : z + 1, first : first + _LANES]
        entries = jnp.broadcast_to(entries, index.shape)
        here = jnp.take_along_axis(entries, lane, axis=1, mode="promise_in_bounds")
        found = here if found is None else jnp.where(index >= first, here, found)
    return found


def _dot(x: Array, w: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
        w = w.astype(jnp.int32).astype(x.dtype)
        return jnp.dot(x, w, preferred_element_type=jnp.int32)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    w = w.astype(x.dtype)
    return jnp.dot(x, w, precision=exact, preferred_element_type=jnp.float32)

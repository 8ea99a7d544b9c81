"""One Mosaic kernel for attention where every query sees an interval of the keys.

Valid lengths, causality by position, local windows and shared prefixes are all a first
and a last key per query, so decoding, prefill and prefixes are one kernel. Logits
never leave the chip's fast memory. Keys outside of a block of queries' intervals are
neither fetched nor multiplied: the block index repeats, and a repeated block is not
copied again.

Letters: L layers, U users of the keys, K kv heads, R query rows of one kv head (G query
heads for each of T queries), S keys, H head dim, P pages, Z keys of a page, C pages of
a row's table, i blocks of rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["Blocks", "Operands", "Rule", "interval_attention"]

_LANES = 128
_LOWEST = -1e30  # stands for -inf where -inf - -inf would give NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the work is cut: one step of the grid multiplies one block.

    Attributes:
      heads: Kv heads of a block, a divisor of K.
      rows: Query rows of a block, a multiple of 128 or all R.
      keys: Keys of a block; of paged keys a multiple of a page.
    """

    heads: int
    rows: int
    keys: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What a kernel is compiled with beside the shapes.

    Attributes:
      scale: Multiplies the products.
      softcap: c of `c * tanh(logits / c)`; none when None.
      interpret: `pallas_call`'s argument.
    """

    scale: float
    softcap: float | None = None
    interpret: Any = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """What the kernel reads.

    Attributes:
      q_UKRH: Queries.
      k_LUKSH: Keys, or pages `[L, P, K, Z, H]`; NaN is allowed where nobody sees.
      v_LUKSH: Values, as the keys.
      layer: int32 scalar.
      first_UR: int32, the first key that each row sees.
      stop_UR: int32, the key behind the last that each row sees, at most S.
      pages_UC: int32 page numbers, of paged keys.
      segment_UR: int32 ids, a further rule: a row sees keys of its id only.
      segment_US: int32 ids of the keys.
    """

    q_UKRH: Array
    k_LUKSH: Array
    v_LUKSH: Array
    layer: Array | int
    first_UR: Array
    stop_UR: Array
    pages_UC: Array | None = None
    segment_UR: Array | None = None
    segment_US: Array | None = None

    @property
    def turned(self) -> bool:
        """Whether the kernel reads keys as `[H, S]`.

        XLA keeps an array whose last axis is no multiple of the lanes with the axis
        before it innermost, so that nothing is padded; to read it as `[S, H]` would
        copy the whole cache.
        """
        return self.pages_UC is None and self.q_UKRH.shape[3] % _LANES != 0


def interval_attention(
    operands: Operands, blocks: Blocks, rule: Rule
) -> tuple[Array, Array]:
    """Attends every row to its interval of keys.

    Args:
      operands: Arrays.
      blocks: How they are cut.
      rule: Constants.

    Returns:
      Output `[U, K, R, H]` and log-sum-exp `[U, K, R]`, float32; 0 and -inf for rows
      with an empty interval.

    Source: FlashAttention-2 (arXiv 2307.08691) algorithm 1, over intervals.
    """
    U, K, R, H = operands.q_UKRH.shape
    operands = _padded(operands, blocks)
    rows = operands.q_UKRH.shape[2]
    bounds, steps = _bounds(operands, blocks)
    parts = _parts(operands, blocks)
    prefetched = [jnp.asarray(operands.layer, jnp.int32).reshape(1), *bounds]
    if operands.pages_UC is not None:
        last_page = operands.k_LUKSH.shape[1] - 1
        prefetched.append(jnp.clip(operands.pages_UC, 0, last_page).reshape(-1))
    columns = [operands.first_UR, operands.stop_UR]
    if operands.segment_UR is not None:
        columns.append(operands.segment_UR)
    arrays = [operands.q_UKRH, jnp.stack(columns, axis=-1)]
    k, v = operands.k_LUKSH, operands.v_LUKSH
    if operands.turned:
        k, v = k.swapaxes(3, 4), v.swapaxes(3, 4)
    arrays += [k] * parts + [v] * parts
    if operands.segment_US is not None:
        arrays.append(operands.segment_US[:, None, :])
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            parts=parts,
            prefetched=len(prefetched),
            segments=operands.segment_US is not None,
            turned=operands.turned,
            rule=rule,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(U, K // blocks.heads, rows // blocks.rows, steps),
            in_specs=_in_specs(operands, blocks, parts),
            out_specs=[
                pl.BlockSpec((1, blocks.heads, blocks.rows, H), _row_block),
                pl.BlockSpec((1, blocks.heads, 1, blocks.rows), _lse_block),
            ],
            scratch_shapes=[
                pltpu.VMEM((blocks.heads, blocks.rows, _LANES), jnp.float32),
                pltpu.VMEM((blocks.heads, blocks.rows, _LANES), jnp.float32),
                pltpu.VMEM((blocks.heads, blocks.rows, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((U, K, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((U, K, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=rule.interpret,
        name="interval_attention",
    )(*prefetched, *arrays)
    return out[:, :, :R], lse[:, :, 0, :R]


def _padded(operands: Operands, blocks: Blocks) -> Operands:
    """Returns the operands with rows that see nothing up to a multiple of a block."""
    extra = -operands.q_UKRH.shape[2] % blocks.rows
    if extra == 0:
        return operands

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, extra)))

    return dataclasses.replace(
        operands,
        q_UKRH=jnp.pad(operands.q_UKRH, ((0, 0), (0, 0), (0, extra), (0, 0))),
        first_UR=pad(operands.first_UR),
        stop_UR=pad(operands.stop_UR),
        segment_UR=None if operands.segment_UR is None else pad(operands.segment_UR),
    )


def _bounds(operands: Operands, blocks: Blocks) -> tuple[list[Array], Array]:
    """Returns what the kernel knows of each block of rows before it starts.

    Returns:
      Flat int32 arrays over U and i: the first and the last block of keys that a row
      sees (0 and -1 if none does), the key behind the last seen, and the interval that
      all rows see; and the number of steps of the row block that takes most.
    """
    shape = (operands.q_UKRH.shape[0], -1, blocks.rows)
    first, stop = operands.first_UR.reshape(shape), operands.stop_UR.reshape(shape)
    some = first < stop
    low = jnp.where(some, first, 2**30).min(-1)
    high = jnp.where(some, stop, 0).max(-1)
    used = high > 0
    first_block = jnp.where(used, low // blocks.keys, 0)
    last_block = jnp.where(used, (high - 1) // blocks.keys, -1)
    steps = jnp.maximum(1, (last_block - first_block + 1).max())
    flat = [first_block, last_block, high, first.max(-1), stop.min(-1)]
    return [x.reshape(-1).astype(jnp.int32) for x in flat], steps


def _parts(operands: Operands, blocks: Blocks) -> int:
    """Returns how many pages make a block of keys; 1 without pages."""
    if operands.pages_UC is None:
        return 1
    return blocks.keys // operands.k_LUKSH.shape[3]


def _row_block(u: Array, h: Array, i: Array, s: Array, *_: Any) -> tuple[Any, ...]:
    return (u, h, i, 0)


def _lse_block(u: Array, h: Array, i: Array, s: Array, *_: Any) -> tuple[Any, ...]:
    return (u, h, 0, i)


def _in_specs(operands: Operands, blocks: Blocks, parts: int) -> list[pl.BlockSpec]:
    """Returns where the blocks of queries, bounds, keys, values and ids come from."""
    H = operands.q_UKRH.shape[3]
    grid_rows = operands.q_UKRH.shape[2] // blocks.rows
    columns = 2 if operands.segment_UR is None else 3

    def key_block(u: Array, i: Array, s: Array, first: Any, last: Any) -> Array:
        at = u * grid_rows + i
        return jnp.maximum(jnp.minimum(first[at] + s, last[at]), 0)

    def dense(u, h, i, s, layer, first, last, *_):
        block = key_block(u, i, s, first, last)
        return (layer[0], u, h, *((0, block) if operands.turned else (block, 0)))

    width = 0 if operands.pages_UC is None else operands.pages_UC.shape[1]

    def paged(part: int) -> Callable[..., tuple[Any, ...]]:

        def index(u, h, i, s, layer, first, last, *rest):
            page = key_block(u, i, s, first, last) * parts + part
            # The table's width need not be a multiple of the pages of a block.
            page = jnp.minimum(page, width - 1)
            return (layer[0], rest[-1][u * width + page], h, 0, 0)

        return index

    def ids(u, h, i, s, layer, first, last, *_):
        return (u, 0, key_block(u, i, s, first, last))

    size = blocks.keys // parts
    specs = [
        pl.BlockSpec((1, blocks.heads, blocks.rows, H), _row_block),
        pl.BlockSpec((1, blocks.rows, columns), lambda u, h, i, s, *_: (u, i, 0)),
    ]
    for part in (*range(parts), *range(parts)):
        index = dense if operands.pages_UC is None else paged(part)
        shape = (H, size) if operands.turned else (size, H)
        specs.append(pl.BlockSpec((1, 1, blocks.heads, *shape), index))
    if operands.segment_US is not None:
        specs.append(pl.BlockSpec((1, 1, blocks.keys), ids))
    return specs


def _kernel(
    *refs: Any, parts: int, prefetched: int, segments: bool, turned: bool, rule: Rule
) -> None:
    """Adds a block of keys to a block of rows; clears first, writes at the end."""
    first, last, high, all_first, all_stop = refs[1:6]
    q_ref, bounds_ref, *blocks = refs[prefetched:]
    k_refs, v_refs = blocks[:parts], blocks[parts : 2 * parts]
    ids_ref = blocks[2 * parts] if segments else None
    out_ref, lse_ref, top_ref, total_ref, sum_ref = blocks[-5:]
    at = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    step = pl.program_id(3)
    block = first[at] + step
    keys, width = (4, 3) if turned else (3, 4)
    size = sum(ref.shape[keys] for ref in k_refs)
    start = block * size

    @pl.when(step == 0)
    def _clear():
        top_ref[...] = jnp.full_like(top_ref, _LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(masked: bool) -> None:
        k, v = (_joined(x) for x in (k_refs, v_refs))
        logits = _dot(q_ref[0], k, width - 2) * rule.scale
        if rule.softcap is not None:
            logits = rule.softcap * jnp.tanh(logits / rule.softcap)
        if masked:
            key = start + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
            visible = (key >= bounds_ref[0, :, 0:1]) & (key < bounds_ref[0, :, 1:2])
            if ids_ref is not None:
                visible &= ids_ref[0] == bounds_ref[0, :, 2:3]
            logits = jnp.where(visible[None], logits, -jnp.inf)
            # The weight of such a key is 0, and 0 times NaN is NaN.
            row = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, keys - 2)
            v = jnp.where(row < high[at], v.astype(jnp.float32), 0.0).astype(v.dtype)
        top, decay, weight = _weights(logits, top_ref[...])
        total = jnp.sum(weight, axis=-1, keepdims=True)
        total_ref[...] = decay * total_ref[...] + total
        added = _dot(weight.astype(v.dtype), v, keys - 2)
        sum_ref[...] = decay[:, :, :1] * sum_ref[...] + added
        top_ref[...] = top

    seen_by_all = (start >= all_first[at]) & (start + size <= all_stop[at])
    if segments:
        seen_by_all = jnp.bool_(False)
    pl.when((block <= last[at]) & seen_by_all)(lambda: add(False))
    pl.when((block <= last[at]) & ~seen_by_all)(lambda: add(True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _write():
        total = total_ref[...]
        seen = total != 0  # true of NaN too, which has to stay visible
        safe = jnp.where(seen, total, 1.0)
        out_ref[0] = sum_ref[...] / safe[:, :, :1]
        lse = jnp.where(seen, top_ref[...] + jnp.log(safe), -jnp.inf)
        # Rows along the lanes: written as they stand, each would fill a register.
        lse_ref[0] = lse.swapaxes(1, 2)[:, :1]


def _joined(refs: Any) -> Array:
    """Returns the parts of a block of keys as one, `[heads, keys, H]` or turned."""
    parts = [ref[0, 0] for ref in refs]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _weights(logits: Array, before: Array) -> tuple[Array, Array, Array]:
    """Returns the new running maximum, what it takes from the sums, the weights."""
    top = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
    return top, jnp.exp(before - top), jnp.exp(logits - top[:, :, :1])


def _dot(x: Array, y: Array, axis: int) -> Array:
    """Contracts the last axis of x with an axis of y, head by head."""
    exact = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((2,), (axis,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
        precision=exact,
    )

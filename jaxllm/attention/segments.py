"""Attention over a list of key-value segments, merged by log-sum-exp.

Every attention of the project is `attend(q, positions, segments)`. Each segment gives
a partial output and the log-sum-exp of its logits; `merge` joins them exactly, so any
split of the keys into segments gives the same output.

Letters: B rows, T queries, N query heads, K kv heads, G = N/K, H head dim, S keys of a
segment, U users of a segment (B, 1, or a number of groups), R most rows of a user.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.attention.kernels import attend_by_kernel
from jaxllm.attention.masks import FULL, GLOBAL_WINDOW, Mask, allowed, packed
from jaxllm.core.einsum import contract
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.core.sharding import ShardingRules

__all__ = [
    "AttentionOutput",
    "Segment",
    "attend",
    "attend_segment",
    "layer_of",
    "merge",
]

# Stands for -inf where -inf - -inf would give NaN.
_LOWEST = -1e30
# Queries of a packed row that meet their keys together; a row has at most 8 blocks, for
# each is compiled.
_BLOCK = 64


@pytree_dataclass
class Segment:
    """Keys and values, who shares them, where they stand and who may see them.

    What a query may not see changes nothing, as long as it is finite: values meet a
    weight of 0, and 0 times NaN is NaN. Clearing them first costs a copy of the cache
    on a CPU. So a slot that is used again must not hold a NaN.

    Attributes:
      k_UKSH: Keys, rotated.
      v_UKSH: Values, finite also where no query sees them.
      length_U: Valid keys of each user; all S when None.
      start_U: Position of key 0; key s is at `start + s`. 0 when None.
      position_US: Position of every key, in place of `start_U`, for keys that do not
        stand in a row (draft nodes, padded rows).
      valid_US: Validity of every key, beside `length_U`.
      row_B: The user that each row reads. None: every user serves as many rows, one
        user's behind the other's.
      pages_BN: Pages of each row in order, where keys and values are a pool `[pages, K,
        slots of a page, H]`; the row's keys stand in its pages one behind the other.
      layer: Where keys and values are stacked, `[l, U, K, S, H]`, the layer that is
        read. A kernel reads it in place.
      rows_UR: In place of `row_B`, the rows that read each user, B where there are
        fewer; a row that stands nowhere sees nothing. Unlike `row_B` it copies queries,
        not keys.
      mask: Rule between queries and keys.
    """

    k_UKSH: Array
    v_UKSH: Array
    length_U: Array | None = None
    start_U: Array | None = None
    position_US: Array | None = None
    valid_US: Array | None = None
    row_B: Array | None = None
    pages_BN: Array | None = None
    layer: Array | int | None = None
    rows_UR: Array | None = None
    mask: Mask = FULL


@pytree_dataclass
class AttentionOutput:
    """A partial attention: `out_BTNH` and `lse_BTN`, both float32.

    Where a query sees no key, the output is 0 and the log-sum-exp -inf.
    """

    out_BTNH: Array
    lse_BTN: Array


def attend_segment(
    q_BTNH: Array,
    query_position_BT: Array,
    segment: Segment,
    *,
    scale: float,
    softcap: float | None = None,
    window: Array | int = GLOBAL_WINDOW,
    rules: ShardingRules | None = None,
    implementation: str | None = None,
) -> AttentionOutput:
    """Attends over one segment.

    Args:
      q_BTNH: Queries; N a multiple of the segment's K, head n reads kv head n // G.
      query_position_BT: int32 absolute positions.
      segment: The keys. When one user serves all rows, their queries are folded into
        one product.
      scale: Multiplies the logits.
      softcap: c of `c * tanh(logits / c)`; none when None.
      window: A key is visible while `query position - key position < window`.
      rules: How queries and keys are split over the mesh, for kernels.
      implementation: Of the kernels, as for `attend_by_kernel`.

    Returns:
      The partial output and its log-sum-exp.

    Source: Hydragen (arXiv 2402.05099) section 3.1; RelayAttention (arXiv 2402.14808)
      section 3.2.
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    options |= {"rules": rules, "implementation": implementation}
    if segment.rows_UR is not None:
        grouped = (q_BTNH, query_position_BT, segment, segment.rows_UR)
        return _attend_sorted(*grouped, **options)
    found = attend_by_kernel(q_BTNH, query_position_BT, segment, **options)
    if found is not None:
        return AttentionOutput(*found)
    if segment.layer is not None:
        pick = functools.partial(layer_of, layer=segment.layer)
        k, v = pick(segment.k_UKSH), pick(segment.v_UKSH)
        segment = dataclasses.replace(segment, k_UKSH=k, v_UKSH=v, layer=None)
    if segment.pages_BN is not None:
        segment = _joined(segment, segment.pages_BN)
    B, T, N, H = q_BTNH.shape
    k, v = segment.k_UKSH, segment.v_UKSH
    if segment.mask.kind == "packed" and _BLOCK < T == k.shape[2]:
        blocks = [
            attend_segment(
                q_BTNH[:, start:stop],
                query_position_BT[:, start:stop],
                _first_keys(segment, start, stop),
                **options,
            )
            for start, stop in _blocks(T)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *blocks)
    position_US, valid_US = _keys(segment)
    if segment.row_B is not None:
        row_B = segment.row_B
        k, v = k[row_B], v[row_B]
        position_US, valid_US = position_US[row_B], valid_US[row_B]
    U, K, S, _ = k.shape
    if 1 < U < B:
        position_US = jnp.repeat(position_US, B // U, axis=0)
        valid_US = jnp.repeat(valid_US, B // U, axis=0)
    visible_BTS = allowed(segment.mask, query_position_BT, position_US)
    if not (isinstance(window, int) and window >= GLOBAL_WINDOW):
        distance = query_position_BT[:, :, None] - position_US[:, None, :]
        visible_BTS = visible_BTS & (distance < window)
    visible_BTS = jnp.broadcast_to(visible_BTS & valid_US[:, None, :], (B, T, S))
    # Rows that share a user become queries of one row.
    G, rows = N // K, B // U * T
    q = q_BTNH.reshape(U, rows, K, G, H).transpose(0, 2, 3, 1, 4)
    q = q.reshape(U, K, G * rows, H).astype(k.dtype)
    logits = contract("ukqh,uksh->ukqs", q, k, jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits.reshape(U, K, G, rows, S)
    visible = visible_BTS.reshape(U, 1, 1, rows, S)
    logits = jnp.where(visible, logits, _LOWEST)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=_LOWEST)  # S may be 0
    weight = jnp.where(visible, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weight, axis=-1)
    out = contract(
        "ukqs,uksh->ukqh",
        weight.reshape(U, K, G * rows, S).astype(v.dtype),
        v,
        jnp.float32,
    )
    out = out.reshape(U, K, G, rows, H)
    seen = total != 0  # true of NaN too, which has to stay visible
    safe = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[..., None], out / safe[..., None], 0.0)
    lse = jnp.where(seen, top[..., 0] + jnp.log(safe), -jnp.inf)
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return AttentionOutput(out, lse.transpose(0, 3, 1, 2).reshape(B, T, N))


def _joined(segment: Segment, pages_BN: Array) -> Segment:
    """Returns the segment with every row's pages copied into one row of keys."""

    def join(pool_PKSH: Array) -> Array:
        k_BNKSH = pool_PKSH[pages_BN]
        B, N, K, S, H = k_BNKSH.shape
        return k_BNKSH.transpose(0, 2, 1, 3, 4).reshape(B, K, N * S, H)

    k_BKSH, v_BKSH = join(segment.k_UKSH), join(segment.v_UKSH)
    return dataclasses.replace(segment, k_UKSH=k_BKSH, v_UKSH=v_BKSH, pages_BN=None)


def layer_of(stacked: Any, layer: Array | int) -> Any:
    """Returns one layer of every array of a stacked tree, `[l, ...] -> [...]`."""

    def pick(x: Array) -> Array:
        if x.shape[0] == 1:
            return x.reshape(x.shape[1:])
        return jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)

    return jax.tree.map(pick, stacked)


def _attend_sorted(
    q_BTNH: Array,
    query_position_BT: Array,
    segment: Segment,
    rows_UR: Array,
    **options: Any,
) -> AttentionOutput:
    """Attends with the queries sorted by user, and sorts the outputs back."""
    rows, slots = q_BTNH.shape[0], rows_UR.size
    row_G = jnp.minimum(rows_UR.reshape(-1), rows - 1)
    slot_B = jnp.full((rows,), slots, jnp.int32)
    slot_B = slot_B.at[rows_UR.reshape(-1)].set(
        jnp.arange(slots, dtype=jnp.int32), mode="drop"
    )
    found = attend_segment(
        q_BTNH[row_G],
        query_position_BT[row_G],
        dataclasses.replace(segment, rows_UR=None),
        **options,
    )
    out = found.out_BTNH.at[slot_B].get(mode="fill", fill_value=0.0)
    lse = found.lse_BTN.at[slot_B].get(mode="fill", fill_value=-jnp.inf)
    return AttentionOutput(out, lse)


def _blocks(queries: int) -> list[tuple[int, int]]:
    """Returns where the blocks of a packed row start and stop."""
    size = max(_BLOCK, -(-queries // 8))
    return [(i, min(queries, i + size)) for i in range(0, queries, size)]


def _first_keys(segment: Segment, start: int, stop: int) -> Segment:
    """Returns what the queries `[start, stop)` of packed rows can see."""
    query_BT, key_BS = segment.mask.arrays
    position_US, valid_US = _keys(segment)
    return Segment(
        k_UKSH=segment.k_UKSH[:, :, :stop],
        v_UKSH=segment.v_UKSH[:, :, :stop],
        position_US=position_US[:, :stop],
        valid_US=valid_US[:, :stop],
        row_B=segment.row_B,
        mask=packed(query_BT[:, start:stop], key_BS[:, :stop]),
    )


def _keys(segment: Segment) -> tuple[Array, Array]:
    """Returns the position and the validity of every key, each `[U, S]`."""
    U, _, S, _ = segment.k_UKSH.shape
    index_S = jnp.arange(S, dtype=jnp.int32)
    if segment.position_US is not None:
        position_US = segment.position_US
    else:
        start_U = (
            jnp.zeros((1,), jnp.int32) if segment.start_U is None else (segment.start_U)
        )
        position_US = start_U[:, None] + index_S
    valid_US = jnp.ones((1, S), bool)
    if segment.length_U is not None:
        valid_US = index_S < segment.length_U[:, None]
    if segment.valid_US is not None:
        valid_US = valid_US & segment.valid_US
    return (
        jnp.broadcast_to(position_US, (U, S)),
        jnp.broadcast_to(valid_US, (U, S)),
    )


def merge(*parts: AttentionOutput) -> AttentionOutput:
    """Joins partial attentions over disjoint keys into the attention over all.

    Associative and commutative; a part that sees no key is the identity.

    Source: FlashAttention (arXiv 2205.14135) section 3.1; Hydragen eq. 5.
    """
    if len(parts) == 1:
        return parts[0]
    lse = jnp.stack([p.lse_BTN for p in parts])
    top = jnp.max(lse, axis=0)
    seen = ~jnp.isneginf(top)
    top = jnp.where(seen, top, 0.0)  # -inf - -inf is NaN
    weight = jnp.exp(lse - top)
    total = jnp.where(seen, weight.sum(0), 1.0)
    out = sum(
        p.out_BTNH * (w / total)[..., None] for p, w in zip(parts, weight, strict=True)
    )
    return AttentionOutput(out, jnp.where(seen, top + jnp.log(total), -jnp.inf))


def attend(
    q_BTNH: Array,
    query_position_BT: Array,
    segments: Sequence[Segment],
    *,
    scale: float,
    softcap: float | None = None,
    window: Array | int = GLOBAL_WINDOW,
    rules: ShardingRules | None = None,
) -> Array:
    """Attends over all segments; arguments as for `attend_segment`.

    Returns:
      `[B, T, N, H]` in the dtype of the queries.
    """
    parts = [
        attend_segment(
            q_BTNH,
            query_position_BT,
            segment,
            scale=scale,
            softcap=softcap,
            window=window,
            rules=rules,
        )
        for segment in segments
    ]
    return merge(*parts).out_BTNH.astype(q_BTNH.dtype)

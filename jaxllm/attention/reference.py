"""Attention written out, plain and slow: what every fast form is compared with.

Letters: B rows, T queries, N query heads, K kv heads, G = N/K, H head dim, S keys (of
a segment, then of all), U users of a segment.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.attention.masks import GLOBAL_WINDOW, allowed
from jaxllm.attention.segments import AttentionOutput, Segment

__all__ = ["attend_reference"]


def attend_reference(
    q_BTNH: Array,
    query_position_BT: Array,
    segments: Sequence[Segment],
    *,
    scale: float,
    softcap: float | None = None,
    window: Array | int = GLOBAL_WINDOW,
) -> AttentionOutput:
    """Attends over all segments by one softmax, with the mask as a matrix.

    Every row gets its own copy of the keys and every query head of its kv head; the
    keys of all segments are joined. All in float32.

    Args:
      q_BTNH: Queries.
      query_position_BT: int32 absolute positions.
      segments: The keys, at least one in all.
      scale: Multiplies the logits.
      softcap: c of `c * tanh(logits / c)`; none when None.
      window: A key is visible while `query position - key position < window`.

    Returns:
      Output and log-sum-exp; 0 and -inf where a query sees no key.
    """
    rows, _, heads, _ = q_BTNH.shape
    logits, visible, values = [], [], []
    for segment in map(_unpaged, segments):
        users, kv_heads, length, _ = segment.k_UKSH.shape
        user_B, reads_B = _users(segment, users, rows)
        group = heads // kv_heads
        k_BNSH = jnp.repeat(segment.k_UKSH[user_B], group, axis=1)
        v_BNSH = jnp.repeat(segment.v_UKSH[user_B], group, axis=1)
        position_BS = jnp.broadcast_to(jnp.arange(length), (rows, length))
        if segment.start_U is not None:
            start_U = jnp.broadcast_to(segment.start_U, (users,))
            position_BS = position_BS + start_U[user_B][:, None]
        if segment.position_US is not None:
            position_BS = segment.position_US[user_B]
        valid_BS = jnp.ones((rows, length), bool)
        if segment.length_U is not None:
            length_U = jnp.broadcast_to(segment.length_U, (users,))
            valid_BS = jnp.arange(length) < length_U[user_B][:, None]
        if segment.valid_US is not None:
            valid_BS = valid_BS & segment.valid_US[user_B]
        visible_BTS = allowed(segment.mask, query_position_BT, position_BS)
        distance = query_position_BT[:, :, None] - position_BS[:, None, :]
        visible_BTS = visible_BTS & (distance < window) & valid_BS[:, None, :]
        visible_BTS = visible_BTS & reads_B[:, None, None]
        logits.append(_product("btnh,bnsh->btns", q_BTNH, k_BNSH) * scale)
        visible.append(visible_BTS[:, :, None, :])
        values.append(v_BNSH)
    logits_BTNS = jnp.concatenate(logits, axis=-1)
    if softcap is not None:
        logits_BTNS = softcap * jnp.tanh(logits_BTNS / softcap)
    visible_BT1S = jnp.concatenate(visible, axis=-1)
    seen = visible_BT1S.any(-1)
    # A query that sees nothing is computed as if it saw all, so that no -inf meets
    # another, and its result is thrown away.
    logits_BTNS = jnp.where(visible_BT1S | ~seen[..., None], logits_BTNS, -jnp.inf)
    weight_BTNS = jax.nn.softmax(logits_BTNS, axis=-1)
    v_BNSH = jnp.concatenate(values, axis=2)
    out_BTNH = _product("btns,bnsh->btnh", weight_BTNS, v_BNSH)
    lse_BTN = jax.nn.logsumexp(logits_BTNS, axis=-1)
    return AttentionOutput(
        jnp.where(seen[..., None], out_BTNH, 0.0), jnp.where(seen, lse_BTN, -jnp.inf)
    )


def _unpaged(segment: Segment) -> Segment:
    """Returns the segment's one layer, the pages of every row behind each other."""
    if segment.layer is not None:
        k, v = segment.k_UKSH[segment.layer], segment.v_UKSH[segment.layer]
        segment = dataclasses.replace(segment, k_UKSH=k, v_UKSH=v, layer=None)
    pages_BN = segment.pages_BN
    if pages_BN is None:
        return segment

    def join(pool: Array) -> Array:
        rows = [jnp.concatenate([pool[p] for p in pages], 1) for pages in pages_BN]
        return jnp.stack(rows)

    k, v = join(segment.k_UKSH), join(segment.v_UKSH)
    return dataclasses.replace(segment, k_UKSH=k, v_UKSH=v, pages_BN=None)


def _users(segment: Segment, users: int, rows: int) -> tuple[Array, Array]:
    """Returns the user of every row, and whether it reads any."""
    if segment.rows_UR is not None:
        reads_BU = (segment.rows_UR == jnp.arange(rows)[:, None, None]).any(-1)
        return jnp.argmax(reads_BU, axis=1), reads_BU.any(axis=1)
    user_B = segment.row_B
    if user_B is None:
        user_B = jnp.arange(rows) // (rows // users)
    return user_B, jnp.ones((rows,), bool)


def _product(eq: str, x: Array, y: Array) -> Array:
    return jnp.einsum(
        eq, x.astype(jnp.float32), y.astype(jnp.float32), precision="highest"
    )

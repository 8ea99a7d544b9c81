"""Attention of long rows whose tokens lie on several devices.

Every device keeps its queries and sends keys and values round the ring of devices; what
it has seen so far is a partial attention, joined exactly with the next. No device ever
holds the keys of a whole row.

Letters: B rows, T tokens, N query heads, K kv heads, H head dim, n devices of the ring,
C tokens of a chunk; there are 2n chunks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxllm.attention.masks import GLOBAL_WINDOW, Mask, packed
from jaxllm.attention.segments import AttentionOutput, Segment, attend_segment, merge
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.core.sharding import ShardingRules

__all__ = ["ring_attention", "ring_size"]

SEQUENCE = "sequence"
"""The mesh axis that splits the tokens of long rows."""


def ring_size(tokens: int, mask: Mask, rules: ShardingRules | None) -> int:
    """Returns over how many devices the tokens of a forward lie; 1 for no ring.

    Args:
      tokens: T.
      mask: Rule among the tokens; a ring needs one that is causal by slot.
      rules: Of the model.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return 1
    n = mesh.shape.get(SEQUENCE, 1)
    fits = mask.kind in ("causal", "packed") and tokens % (2 * n) == 0
    return n if fits else 1


@pytree_dataclass
class _Piece:
    """What travels: keys and values of two chunks, and who they are.

    Attributes:
      k_BKTH: Of the tokens of both chunks, like the rest.
      v_BKTH: See there.
      position_BT: int32.
      document_BT: int32, -1 for padding.
      chunk_2: int32 numbers of the chunks, in the order of the row.
    """

    k_BKTH: Array
    v_BKTH: Array
    position_BT: Array
    document_BT: Array
    chunk_2: Array


def ring_attention(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    position_BT: Array,
    document_BT: Array,
    *,
    rules: ShardingRules,
    window: Array | int = GLOBAL_WINDOW,
    **options: Any,
) -> Array:
    """Attends causally among the tokens of rows that lie on several devices.

    Inside, device i holds the chunks i and 2n - 1 - i of 2n, so that all devices have
    as much to do: half of what a mask without order would ask for. A pair of chunks in
    which no query sees a key is left out.

    Args:
      q_BTNH: Queries, rotated.
      k_BKTH: Keys, rotated.
      v_BKTH: Values.
      position_BT: int32; they rise within a document.
      document_BT: int32 document of each token, -1 for padding.
      rules: Which mesh axes split what.
      window: As for `attend_segment`.
      **options: As for `attend_segment`.

    Returns:
      `[B, T, N, H]` in the dtype of the queries.

    Source: Ring Attention (arXiv 2310.01889); order of the chunks: Striped Attention
      (arXiv 2311.09431) and the zig-zag of Llama 3's training (arXiv 2407.21783, 3.3).
    """
    mesh = jax.sharding.get_abstract_mesh()
    n, limit = mesh.shape[SEQUENCE], window

    def spec(names: tuple[str | None, ...], x: Array) -> PartitionSpec:
        return rules.spec(names, x.shape, mesh)

    query = spec(("batch", "tokens", "kv_heads", None), q_BTNH)
    key = spec(("batch", "kv_heads", "tokens", None), k_BKTH)
    token = spec(("batch", "tokens"), position_BT)
    if key[1] is None:  # too few kv heads: every device has all heads
        query = PartitionSpec(query[0], query[1], None, None)

    def local(window: Array, *arrays: Array) -> Array:
        given = {**options, "window": limit if isinstance(limit, int) else window}
        axes = (1, 2, 2, 1, 1)
        q, k, v, position, document = (
            _spread(x, axis, n) for x, axis in zip(arrays, axes, strict=True)
        )
        me = jax.lax.axis_index(SEQUENCE)
        chunk_2 = jnp.stack([me, 2 * n - 1 - me])
        mine = _Piece(k, v, position, document, chunk_2)
        out = _turn(q, mine, n, given)
        return _gather(out.astype(q.dtype), 1, n)

    arrays = (q_BTNH, k_BKTH, v_BKTH, position_BT, document_BT)
    specs = (PartitionSpec(), query, key, key, token, token)
    mapped = jax.shard_map(local, in_specs=specs, out_specs=query, check_vma=False)
    return mapped(jnp.int32(window), *arrays)


def _turn(q_BTNH: Array, mine: _Piece, n: int, options: dict[str, Any]) -> Array:
    """Meets the keys of all devices, one after another."""

    @jax.checkpoint
    def meet(seen: AttentionOutput, piece: _Piece) -> AttentionOutput:
        return merge(seen, _pairs(q_BTNH, mine, piece, options))

    B, T, N, H = q_BTNH.shape
    seen = AttentionOutput(
        jnp.zeros((B, T, N, H), jnp.float32), jnp.full((B, T, N), -jnp.inf)
    )
    piece = mine
    for hop in range(n):
        # Sent before it is used here, so that the two happen at a time.
        last = hop == n - 1
        following = piece if last else jax.tree.map(_pass_on(n), piece)
        seen = meet(seen, piece)
        piece = following
    return seen.out_BTNH


def _pairs(
    q_BTNH: Array, mine: _Piece, piece: _Piece, options: dict[str, Any]
) -> AttentionOutput:
    """Attends from both chunks of queries to both chunks of keys."""
    half = q_BTNH.shape[1] // 2
    found = []
    for i in range(2):
        rows = slice(i * half, (i + 1) * half)
        q, position = q_BTNH[:, rows], mine.position_BT[:, rows]
        parts = []
        for j in range(2):
            keys = slice(j * half, (j + 1) * half)
            segment = Segment(
                k_UKSH=piece.k_BKTH[:, :, keys],
                v_UKSH=piece.v_BKTH[:, :, keys],
                position_US=piece.position_BT[:, keys],
                mask=packed(mine.document_BT[:, rows], piece.document_BT[:, keys]),
            )
            seen = mine.chunk_2[i] >= piece.chunk_2[j]
            parts.append(_where_seen(seen, q, position, segment, options))
        found.append(merge(*parts))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *found)


def _where_seen(
    seen: Array, q: Array, position: Array, segment: Segment, options: dict[str, Any]
) -> AttentionOutput:
    def attended() -> AttentionOutput:
        # The order of slots is not that of one row, so no block may be left out.
        either = dataclasses.replace(segment.mask, kind="all", arrays=(segment.mask,))
        unordered = dataclasses.replace(segment, mask=either)
        return attend_segment(q, position, unordered, **options)

    def nothing() -> AttentionOutput:
        lse = jnp.full(q.shape[:3], -jnp.inf)
        return AttentionOutput(jnp.zeros(q.shape, jnp.float32), lse)

    return jax.lax.cond(seen, attended, nothing)


def _pass_on(n: int) -> Callable[[Array], Array]:
    order = [(i, (i + 1) % n) for i in range(n)]
    return lambda x: jax.lax.ppermute(x, SEQUENCE, order)


def _places(n: int) -> tuple[list[int], list[int]]:
    """Returns where the first and the second chunk of every device go."""
    owner = [c if c < n else 2 * n - 1 - c for c in range(2 * n)]
    return owner[::2], owner[1::2]


def _spread(x: Array, axis: int, n: int) -> Array:
    """Turns chunks 2i and 2i + 1 of device i into chunks i and 2n - 1 - i."""
    first, second = jnp.split(x, 2, axis=axis)
    evens, odds = _places(n)
    a = jax.lax.ppermute(first, SEQUENCE, list(enumerate(evens)))
    b = jax.lax.ppermute(second, SEQUENCE, list(enumerate(odds)))
    # Chunk i is even on even devices.
    even = jax.lax.axis_index(SEQUENCE) % 2 == 0
    low, high = jnp.where(even, a, b), jnp.where(even, b, a)
    return jnp.concatenate([low, high], axis=axis)


def _gather(x: Array, axis: int, n: int) -> Array:
    """The inverse of `_spread`."""
    low, high = jnp.split(x, 2, axis=axis)
    even = jax.lax.axis_index(SEQUENCE) % 2 == 0
    a, b = jnp.where(even, low, high), jnp.where(even, high, low)
    evens, odds = _places(n)
    first = jax.lax.ppermute(a, SEQUENCE, [(to, i) for i, to in enumerate(evens)])
    second = jax.lax.ppermute(b, SEQUENCE, [(to, i) for i, to in enumerate(odds)])
    return jnp.concatenate([first, second], axis=axis)

"""Attention of many queries to a row's keys, as in prefill; forward only.

Letters: B rows, T queries, N query heads, K kv heads, H head dim, S keys.
"""

from collections.abc import Mapping

from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import tpu
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.flash_attention.shapes import shape_of
from pallas_kernels.operands import Keys, Logits

__all__ = ["flash_attention", "flash_attention_reference"]


def flash_attention(
    q_BTNH: Array,
    keys: Keys,
    position_BT: Array | None = None,
    window: Array | int | None = None,
    segment_BT: Array | None = None,
    *,
    logits: Logits = Logits(),  # noqa: B008
    implementation: str | None = None,
    block: Mapping[str, int] | None = None,
) -> tuple[Array, Array]:
    """Attends causally by position, or to all keys where no positions are given.

    There is no gradient: for training take an attention that has one.

    Args:
      q_BTNH: Queries; N a multiple of K, head n reads kv head n // (N / K). They are
        multiplied in the dtype of the keys.
      keys: `[B, K, S, H]`, or stacked with a layer. Packed rows have ids of the keys.
      position_BT: int32 position of each query, counted from key 0: a query sees keys
        up to its own position. `start_B[:, None] + arange(T)` continues a cached
        prompt. In packed rows it is the slot in the row.
      window: A key is visible while `query position - key position < window`.
      segment_BT: int32 ids of the queries of packed rows, negative for padding, which
        sees nothing.
      logits: Scale and soft cap.
      implementation: As for `dispatch.choose`.
      block: Sizes `heads`, `rows` and `keys` of the kernel's blocks, in place of those
        chosen.

    Returns:
      Output `[B, T, N, H]` and log-sum-exp `[B, T, N]`, float32; 0 and -inf where a
      query sees no key.

    Raises:
      ValueError: A window without positions, ids of queries or of keys alone, or
        block sizes that do not fit.
      NotImplementedError: The implementation does not exist, or not here.

    Source: FlashAttention-2 (arXiv 2307.08691).
    """
    if (segment_BT is None) != (keys.segment is None):
        raise ValueError(
            "flash_attention: ids of packed sequences for the queries or for the keys "
            "alone, expected both. Give segment_BT and keys.segment."
        )
    shape = shape_of(q_BTNH, keys, window=window is not None, logits=logits)
    chosen = dispatch.choose("flash_attention", implementation, shape)
    arrays = (q_BTNH, keys, position_BT, window, segment_BT)
    if chosen == "reference":
        return flash_attention_reference(*arrays, logits=logits)
    return tpu.flash_attention(*arrays, rule=(logits, chosen), block=block)

"""Attention of all rows' queries to one prefix that they share.

Letters: B rows, T queries, N query heads, K kv heads, P keys of the prefix, H head dim.
"""

from collections.abc import Mapping

from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.operands import Keys, Logits
from pallas_kernels.prefix_attention import tpu
from pallas_kernels.prefix_attention.reference import prefix_attention_reference
from pallas_kernels.prefix_attention.shapes import shape_of

__all__ = ["prefix_attention", "prefix_attention_reference"]


def prefix_attention(
    q_BTNH: Array,
    keys: Keys,
    position_BT: Array | None = None,
    window: Array | int | None = None,
    *,
    logits: Logits = Logits(),  # noqa: B008
    implementation: str | None = None,
    block: Mapping[str, int] | None = None,
) -> tuple[Array, Array]:
    """Attends all queries of all rows to the same keys, read once for all of them.

    The prefix precedes every query, so each sees all of it but what its window leaves
    out. The kernel never writes logits to memory; the reference writes all of them,
    B * T * N * P floats.

    Args:
      q_BTNH: Queries; N a multiple of K, head n reads kv head n // (N / K). They are
        multiplied in the dtype of the keys.
      keys: `[K, P, H]`, or `[L, K, P, H]` with a layer; `length` is a scalar.
      position_BT: int32 position of each query, counted from key 0; only a window
        needs it.
      window: A key is visible while `query position - key position < window`.
      logits: Scale and soft cap.
      implementation: As for `dispatch.choose`.
      block: Sizes `heads`, `rows` and `keys` of the kernel's blocks, in place of those
        chosen.

    Returns:
      Output `[B, T, N, H]` and log-sum-exp `[B, T, N]`, float32; 0 and -inf where a
      query sees no key.

    Raises:
      ValueError: A window without positions, or block sizes that do not fit.
      NotImplementedError: The implementation does not exist, or not here.

    Source: Hydragen (arXiv 2402.05099) section 3.2; RelayAttention (arXiv 2402.14808)
      section 3.2.
    """
    shape = shape_of(q_BTNH, keys, window=window is not None, logits=logits)
    chosen = dispatch.choose("prefix_attention", implementation, shape)
    if chosen == "reference":
        return prefix_attention_reference(
            q_BTNH, keys, position_BT, window, logits=logits
        )
    return tpu.prefix_attention(
        q_BTNH, keys, position_BT, window, rule=(logits, chosen), block=block
    )

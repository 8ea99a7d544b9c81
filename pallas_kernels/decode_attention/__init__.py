"""Attention of a few queries to their row's cached keys, dense or in pages.

Letters: B rows, T queries, N query heads, K kv heads, H head dim, S slots, M nodes.
"""

from collections.abc import Mapping

from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import tpu
from pallas_kernels.decode_attention.reference import decode_attention_reference
from pallas_kernels.decode_attention.shapes import shape_of
from pallas_kernels.operands import Keys, Logits, NodeKeys, PagedKeys

__all__ = ["decode_attention", "decode_attention_reference"]


def decode_attention(
    q_BTNH: Array,
    keys: Keys | PagedKeys | NodeKeys,
    position_BT: Array | None = None,
    window: Array | int | None = None,
    *,
    logits: Logits = Logits(),  # noqa: B008
    implementation: str | None = None,
    block: Mapping[str, int] | None = None,
) -> tuple[Array, Array]:
    """Attends to the cached keys before each row's length.

    All T queries of a row see them all: keys of the T tokens themselves are another
    segment (`NodeKeys`), joined by `merge_lse`. A stacked cache is read in place.

    Draft nodes among themselves always take the reference: M nodes have at most M
    keys, so their logits are small beside the cache, and a mask that is a matrix gives
    a kernel nothing to leave out.

    Args:
      q_BTNH: Queries; N a multiple of K, head n reads kv head n // (N / K). They are
        multiplied in the dtype of the keys.
      keys: Dense cache, paged cache, or draft nodes.
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
      NotImplementedError: The implementation does not exist for these keys or here.

    Source: Flash-Decoding (PyTorch blog, 2023), with one pass over a row's keys;
      PagedAttention (arXiv 2309.06180) section 4.1 for pages.
    """
    arrays = (q_BTNH, keys, position_BT, window)
    if isinstance(keys, NodeKeys):
        if implementation not in (None, "reference"):
            raise NotImplementedError(
                f"decode_attention: there is no {implementation} kernel for draft "
                "nodes. Use implementation=None."
            )
        return decode_attention_reference(*arrays, logits=logits)
    shape = shape_of(q_BTNH, keys, window=window is not None, logits=logits)
    chosen = dispatch.choose("decode_attention", implementation, shape)
    if chosen == "reference":
        return decode_attention_reference(*arrays, logits=logits)
    return tpu.decode_attention(
        q_BTNH, keys, position_BT, window, rule=(logits, chosen), block=block
    )

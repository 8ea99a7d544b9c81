"""Joining partial attentions by their log-sum-exp.

There is no kernel: the op reads each part once and writes the result once, elementwise
but for a sum over a handful of parts, and XLA makes that one fusion without
temporaries (`tests/kernels/test_merge_lse.py` compiles it for each TPU generation).

Letters: B rows, T queries, N query heads, H head dim.
"""

from collections.abc import Sequence

from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.merge_lse.reference import merge_lse_reference
from pallas_kernels.merge_lse.shapes import Shape

__all__ = ["merge_lse", "merge_lse_reference"]


def merge_lse(
    outs: Sequence[Array],
    lses: Sequence[Array],
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Joins attentions over disjoint keys into the attention over all of them.

    Associative and commutative; a part whose log-sum-exp is -inf changes nothing,
    whatever finite output stands beside it.

    Args:
      outs: Float32 outputs `[B, T, N, H]`, one per part, at least one.
      lses: Float32 log-sum-exps `[B, T, N]`, one per part.
      implementation: As for `dispatch.choose`.

    Returns:
      The output and log-sum-exp over all keys, float32; 0 and -inf where no part saw
      a key.

    Raises:
      ValueError: The numbers of outputs and log-sum-exps differ, or are 0.

    Source: FlashAttention (arXiv 2205.14135) section 3.1; Hydragen (arXiv 2402.05099)
      equation 5.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge_lse: {len(outs)} outputs and {len(lses)} log-sum-exps, expected "
            "as many of each and at least one."
        )
    shape = Shape(parts=len(outs), rows=outs[0].shape[:-1], head_dim=outs[0].shape[-1])
    dispatch.choose("merge_lse", implementation, shape)
    return merge_lse_reference(outs, lses)

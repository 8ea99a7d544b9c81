"""Shapes of `decode_attention` that tests and benchmarks share.

Letters: B rows, T queries, N query heads, H head dim.
"""

from typing import Any

from jax import Array

from pallas_kernels.attention_shapes import AttentionShape, interval_obstacle
from pallas_kernels.dispatch import Target
from pallas_kernels.operands import Keys, Logits, PagedKeys

__all__ = ["SHAPES", "Shape", "obstacle", "shape_of"]


class Shape(AttentionShape):
    """A call of `decode_attention`."""

    def arguments(self) -> tuple[Any, ...]:
        """Returns the abstract array arguments of the call."""
        return (self.query(), self.key(self.rows), *self.places())


def _shape(rows: int, queries: int, heads: int, kv_heads: int, **rest: Any) -> Shape:
    return Shape(rows=rows, queries=queries, heads=heads, kv_heads=kv_heads, **rest)


SHAPES = (
    # An 8B Llama: one token a row, a draft of eight, a long context.
    _shape(16, 1, 32, 8, head_dim=128, keys=8192, layers=4),
    _shape(16, 8, 32, 8, head_dim=128, keys=8192, layers=4),
    _shape(1, 1, 32, 8, head_dim=128, keys=65536),
    # Multi-head and multi-query, wide heads, local window and soft cap (Gemma).
    _shape(8, 1, 16, 16, head_dim=256, keys=4096, layers=2, window=True, softcap=50.0),
    _shape(8, 4, 8, 1, head_dim=256, keys=2048, layers=2, dtype="float32"),
    # Heads narrower than the lanes, and a number of slots that no block divides.
    _shape(4, 1, 12, 12, head_dim=64, keys=1000, layers=2, dtype="float32"),
    _shape(4, 3, 14, 2, head_dim=80, keys=1111, window=True),
    # A draft tree of 64 nodes.
    _shape(4, 64, 32, 8, head_dim=128, keys=4096, layers=2),
    # Pages.
    _shape(32, 1, 32, 8, head_dim=128, keys=4096, layers=4, page=16),
    _shape(8, 5, 32, 8, head_dim=128, keys=4000, page=128, window=True),
    _shape(8, 1, 8, 2, head_dim=64, keys=1024, page=16, dtype="float32"),
)


def shape_of(
    q_BTNH: Array, keys: Keys | PagedKeys, *, window: bool, logits: Logits
) -> Shape:
    """Returns the shape of a call."""
    B, T, N, H = q_BTNH.shape
    slots, page = keys.k.shape[-2], 0
    if isinstance(keys, PagedKeys):
        page, slots = slots, slots * keys.pages.shape[1]
    return Shape(
        rows=B,
        queries=T,
        heads=N,
        kv_heads=keys.k.shape[-3],
        head_dim=H,
        keys=slots,
        layers=keys.k.shape[0] if keys.k.ndim == 5 else 0,
        page=page,
        dtype=str(keys.k.dtype),
        window=window,
        softcap=logits.softcap,
    )


def obstacle(shape: Shape, target: Target) -> str | None:
    """Returns why the kernel of a device cannot run a shape, or None."""
    return interval_obstacle(shape, target)

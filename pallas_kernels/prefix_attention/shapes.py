"""Shapes of `prefix_attention` that tests and benchmarks share.

Letters: B rows, T queries, N query heads, H head dim.
"""

from typing import Any

from jax import Array

from pallas_kernels.attention_shapes import AttentionShape, interval_obstacle
from pallas_kernels.dispatch import Target
from pallas_kernels.operands import Keys, Logits

__all__ = ["SHAPES", "Shape", "obstacle", "shape_of"]


class Shape(AttentionShape):
    """A call of `prefix_attention`; `keys` is the length of the prefix."""

    def arguments(self) -> tuple[Any, ...]:
        """Returns the abstract array arguments of the call."""
        return (self.query(), self.key(None), *self.places())


def _shape(rows: int, queries: int, heads: int, kv_heads: int, **rest: Any) -> Shape:
    return Shape(rows=rows, queries=queries, heads=heads, kv_heads=kv_heads, **rest)


SHAPES = (
    # A long system prompt under a batch, grouped and multi-head.
    _shape(64, 1, 32, 8, head_dim=128, keys=16384, layers=4),
    _shape(64, 1, 32, 32, head_dim=128, keys=16384),
    # Many samples of one prompt: more query rows than one block.
    _shape(1024, 1, 32, 8, head_dim=128, keys=4096),
    # Drafts of eight; window and soft cap (Gemma).
    _shape(16, 8, 16, 8, head_dim=256, keys=3000, window=True, softcap=50.0),
    # A single row, heads narrower than the lanes, odd lengths.
    _shape(1, 1, 8, 1, head_dim=128, keys=777, dtype="float32"),
    _shape(5, 3, 12, 12, head_dim=64, keys=1001, layers=2, dtype="float32"),
)


def shape_of(q_BTNH: Array, keys: Keys, *, window: bool, logits: Logits) -> Shape:
    """Returns the shape of a call."""
    B, T, N, H = q_BTNH.shape
    return Shape(
        rows=B,
        queries=T,
        heads=N,
        kv_heads=keys.k.shape[-3],
        head_dim=H,
        keys=keys.k.shape[-2],
        layers=keys.k.shape[0] if keys.k.ndim == 4 else 0,
        dtype=str(keys.k.dtype),
        window=window,
        softcap=logits.softcap,
    )


def obstacle(shape: Shape, target: Target) -> str | None:
    """Returns why the kernel of a device cannot run a shape, or None."""
    return interval_obstacle(shape, target)

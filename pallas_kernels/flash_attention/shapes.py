"""Shapes of `flash_attention` that tests and benchmarks share.

Letters: B rows, T queries, N query heads, H head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention_shapes import AttentionShape, interval_obstacle
from pallas_kernels.dispatch import Target
from pallas_kernels.operands import Keys, Logits

__all__ = ["SHAPES", "Shape", "obstacle", "shape_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(AttentionShape):
    """A call of `flash_attention`.

    Attributes:
      causal: Whether queries see keys up to their position only.
    """

    causal: bool = True

    @property
    def name(self) -> str:
        """Names the shape in reports."""
        return super().name + ("" if self.causal else "-full")

    def arguments(self) -> tuple[Any, ...]:
        """Returns the abstract array arguments of the call."""
        integers = jax.ShapeDtypeStruct((self.rows, self.queries), jnp.int32)
        return (
            self.query(),
            self.key(self.rows),
            integers if self.causal else None,
            self.places()[1],
            integers if self.segments else None,
        )


def _shape(rows: int, queries: int, heads: int, kv_heads: int, **rest: Any) -> Shape:
    return Shape(rows=rows, queries=queries, heads=heads, kv_heads=kv_heads, **rest)


SHAPES = (
    # Prefill of an 8B Llama, and a chunk of it over a stacked cache.
    _shape(1, 4096, 32, 8, head_dim=128, keys=4096),
    _shape(4, 256, 32, 8, head_dim=128, keys=8192, layers=4),
    # Window and soft cap (Gemma).
    _shape(2, 2048, 16, 8, head_dim=256, keys=2048, window=True, softcap=50.0),
    # Packed rows; an encoder; narrow heads and odd lengths.
    _shape(2, 1024, 8, 8, head_dim=128, keys=1024, segments=True),
    _shape(2, 512, 12, 12, head_dim=64, keys=512, causal=False),
    _shape(3, 333, 14, 2, head_dim=80, keys=777, dtype="float32"),
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
        layers=keys.k.shape[0] if keys.k.ndim == 5 else 0,
        dtype=str(keys.k.dtype),
        window=window,
        softcap=logits.softcap,
        segments=keys.segment is not None,
    )


def obstacle(shape: Shape, target: Target) -> str | None:
    """Returns why the kernel of a device cannot run a shape, or None."""
    return interval_obstacle(shape, target)

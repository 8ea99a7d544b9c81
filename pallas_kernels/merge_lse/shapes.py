"""Shapes of `merge_lse` that tests and benchmarks share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["SHAPES", "Shape"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A call: how many parts, the axes before the last, the last axis."""

    parts: int
    rows: tuple[int, ...]
    head_dim: int

    @property
    def name(self) -> str:
        """Names the shape in reports."""
        return f"{self.parts}x" + "x".join(map(str, (*self.rows, self.head_dim)))

    @property
    def options(self) -> dict[str, Any]:
        """The static arguments of the call."""
        return {}

    def arguments(self) -> tuple[Any, ...]:
        """Returns the abstract array arguments of the call."""
        out = jax.ShapeDtypeStruct((*self.rows, self.head_dim), jnp.float32)
        lse = jax.ShapeDtypeStruct(self.rows, jnp.float32)
        return ([out] * self.parts, [lse] * self.parts)


SHAPES = (
    Shape(parts=3, rows=(16, 8, 32), head_dim=128),
    Shape(parts=1, rows=(1, 1, 1), head_dim=64),
    Shape(parts=2, rows=(3, 1, 6), head_dim=80),
)

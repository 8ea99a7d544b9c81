"""Shapes of `quant_matmul` that tests and benchmarks share.

Letters: M rows, D contracted axis, F output axis, G groups of a scale, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Target
from pallas_kernels.quant_matmul.indexed import plan
from pallas_kernels.quant_matmul.layout import IntWeight, packed_rows

__all__ = ["SHAPES", "Shape", "block_key", "obstacle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A call.

    Attributes:
      rows: M.
      depth: D.
      features: F.
      groups: G, rows of scales; 1 for a scale per channel.
      bits: 8, or 4 for packed values.
      dtype: Of the activations; int8 comes with a scale for each row.
      zeros: Whether there are zero points.
      layers: L of a stacked weight, or 0 for one that has no such axis.
    """

    rows: int
    depth: int
    features: int
    groups: int = 1
    bits: int = 8
    dtype: str = "bfloat16"
    zeros: bool = False
    layers: int = 0

    @property
    def name(self) -> str:
        """Names the shape in reports."""
        parts = f"{self.rows}x{self.depth}x{self.features}-w{self.bits}-{self.dtype}"
        if self.groups > 1:
            parts += f"-g{self.depth // self.groups}"
        return parts + "-zeros" * self.zeros + f"-l{self.layers}" * bool(self.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The static arguments of the call."""
        return {"layer": self.layers - 1} if self.layers else {}

    def arguments(self) -> tuple[Any, ...]:
        """Returns the abstract array arguments of the call."""
        stack = (self.layers,) if self.layers else ()
        depth = self.depth if self.bits == 8 else packed_rows(self.depth)
        scale: Any = jax.ShapeDtypeStruct(
            (*stack, self.groups, self.features), jnp.float32
        )
        values: Any = jax.ShapeDtypeStruct(
            (*stack, depth, self.features), jnp.int8 if self.bits == 8 else jnp.uint8
        )
        weight = IntWeight(values, scale, scale if self.zeros else None)
        x = jax.ShapeDtypeStruct((self.rows, self.depth), jnp.dtype(self.dtype))
        x_scale = jax.ShapeDtypeStruct((self.rows,), jnp.float32)
        return x, weight, x_scale if self.dtype == "int8" else None


SHAPES = (
    # Layers of an 8B Llama, a decoding step and a chunk of a prompt.
    Shape(rows=16, depth=4096, features=14336, groups=32, bits=4),
    Shape(rows=16, depth=4096, features=14336),
    Shape(rows=16, depth=4096, features=14336, dtype="int8"),
    Shape(rows=16, depth=4096, features=14336, groups=32, bits=4, layers=2),
    Shape(rows=512, depth=14336, features=4096, groups=112, bits=4),
    Shape(rows=512, depth=14336, features=4096, dtype="int8"),
    # Odd sizes: one row, a depth and features that no tile divides.
    Shape(rows=1, depth=300, features=200),
    Shape(rows=5, depth=1300, features=130, dtype="float32"),
    Shape(rows=3, depth=1300, features=70, dtype="int8"),
    Shape(rows=3, depth=100, features=70, bits=4),
    Shape(rows=5, depth=300, features=200, bits=4, dtype="float32"),
    Shape(rows=9, depth=1408, features=130, bits=4, groups=11),
    Shape(rows=2, depth=192, features=130, bits=4, groups=6, dtype="float32"),
    Shape(rows=33, depth=1300, features=130, bits=4, dtype="int8"),
    # Each kind of group, with and without zero points, tiles that divide.
    Shape(rows=16, depth=2048, features=256, groups=32, bits=4),
    Shape(rows=16, depth=2048, features=256, groups=64, bits=4, zeros=True),
    Shape(rows=16, depth=2048, features=256, groups=16, bits=4, dtype="int8"),
    Shape(rows=16, depth=2048, features=128, groups=16, dtype="int8", zeros=True),
    Shape(rows=8, depth=2048, features=256, groups=64, dtype="float32"),
    Shape(rows=8, depth=3072, features=256, groups=2, dtype="float32"),
    # A layer out of a stack.
    Shape(rows=16, depth=1024, features=512, layers=3),
    Shape(rows=16, depth=1024, features=512, groups=8, bits=4, layers=3),
)


def block_key(shape: Shape) -> str:
    """Returns what measured block sizes depend on.

    Not the number of rows: sums over D keep their order, so that a row's result does
    not depend on its neighbours.
    """
    return f"{shape.dtype}:{shape.bits}:{'channel' if shape.groups == 1 else 'group'}"


def obstacle(shape: Shape, target: Target) -> str | None:
    """Returns why the TPU kernel cannot run a shape, or None.

    Args:
      shape: The call.
      target: The device; what only some generations lack is no obstacle where the
        generation is not known.
    """
    if shape.bits == 0:
        return "int4 that is not packed is left to XLA"
    if 0 in (shape.rows, shape.depth, shape.features):
        return "the product is empty"
    cut = plan(shape.depth, shape.groups, shape.bits == 4, 1024)
    if isinstance(cut, str):
        return cut
    if shape.dtype == "int8":
        if target.generation == "v4":
            return "v4 multiplies no int8"
        if 0 < cut.group < 128:
            return "groups of fewer than 128 rows need floating activations"
    elif shape.dtype not in ("bfloat16", "float32"):
        return f"activations are {shape.dtype}, not bfloat16, float32 or int8"
    return None

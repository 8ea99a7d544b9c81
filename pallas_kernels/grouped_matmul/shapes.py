"""Shapes of `grouped_matmul` that tests and benchmarks share.

Letters: M rows, D contracted axis, F output axis, E groups, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Target
from pallas_kernels.quant_matmul import shapes as matrices

__all__ = ["SHAPES", "Shape", "block_key", "obstacle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A call.

    Attributes:
      experts: E.
      matrix: The product of all rows with one matrix, as `quant_matmul` has it; its
        `bits` are 16 for a matrix of the dtype of the rows.
    """

    experts: int
    matrix: matrices.Shape

    @property
    def name(self) -> str:
        """Names the shape in reports."""
        return f"{self.experts}-of-{self.matrix.name}"

    @property
    def options(self) -> dict[str, Any]:
        """The static arguments of the call."""
        return self.matrix.options

    def arguments(self) -> tuple[Any, ...]:
        """Returns the abstract array arguments of the call."""
        matrix = self.matrix
        bits = min(matrix.bits, 8)
        x, weight, x_scale = dataclasses.replace(matrix, bits=bits).arguments()
        axis = 1 if matrix.layers else 0

        def grouped(a: Any, dtype: Any = None) -> Any:
            shape = (*a.shape[:axis], self.experts, *a.shape[axis:])
            return jax.ShapeDtypeStruct(shape, dtype or a.dtype)

        w: Any = jax.tree.map(grouped, weight)
        if matrix.bits == 16:
            w = grouped(weight.values, x.dtype)
        sizes = jax.ShapeDtypeStruct((self.experts,), jnp.int32)
        return x, w, sizes, x_scale


def _shape(experts: int, rows: int, depth: int, features: int, **rest: Any) -> Shape:
    matrix = {"bits": 16, "rows": rows, "depth": depth, "features": features, **rest}
    return Shape(experts=experts, matrix=matrices.Shape(**matrix))


SHAPES = (
    # Layers of models with 8 and 64 experts, a decoding step and a prompt.
    _shape(8, 32, 4096, 14336, bits=8),
    _shape(8, 32, 4096, 14336),
    _shape(64, 128, 2048, 1024, bits=4, groups=16, layers=2),
    _shape(64, 128, 2048, 1024, layers=2),
    _shape(64, 4096, 2048, 1024),
    # Odd sizes, more groups than rows, a tile of depth that does not divide.
    _shape(1, 7, 40, 24, dtype="float32"),
    _shape(5, 37, 100, 70, dtype="float32"),
    _shape(9, 3, 130, 70),
    _shape(3, 200, 1300, 130),
    _shape(3, 50, 300, 130, bits=8, dtype="float32"),
    _shape(4, 50, 300, 130, bits=8, dtype="int8"),
    _shape(4, 20, 384, 130, bits=4, groups=3),
    # Out of stacks of layers.
    _shape(3, 20, 256, 128, dtype="float32", layers=2),
    _shape(3, 20, 256, 128, bits=8, layers=2),
)


def block_key(shape: Shape) -> str:
    """Returns what measured block sizes depend on; not the number of rows."""
    return matrices.block_key(shape.matrix)


def obstacle(shape: Shape, target: Target) -> str | None:
    """Returns why the TPU kernel cannot run a shape, or None; as `quant_matmul`."""
    if not shape.experts:
        return "there are no groups"
    if shape.matrix.zeros:
        return "zero points of groups are left to XLA"
    return matrices.obstacle(shape.matrix, target)

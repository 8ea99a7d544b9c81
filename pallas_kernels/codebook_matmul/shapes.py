"""Shapes of `codebook_matmul` that tests and benchmarks share.

Letters: M rows, D contracted axis, F output axis, U and W codebooks along D and F, C
entries of a codebook, Z numbers of an entry, G groups of a scale, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_matmul.layout import CodebookWeight
from pallas_kernels.codebook_matmul.tpu import lookup
from pallas_kernels.dispatch import Target
from pallas_kernels.quant_matmul.layout import packed_rows

__all__ = ["SHAPES", "Shape", "block_key", "obstacle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A call.

    Attributes:
      rows: M.
      depth: D.
      features: F.
      codebook: U, W, C, Z.
      groups: G, rows of scales; 0 for none.
      selected: Whether each group selects its codebook.
      packed: Whether codes are packed, two in a byte.
      dtype: Of the activations; int8 comes with a scale for each row.
      layers: L of a stacked weight, or 0 for one that has no such axis.
    """

    rows: int
    depth: int
    features: int
    codebook: tuple[int, int, int, int]
    groups: int = 0
    selected: bool = False
    packed: bool = False
    dtype: str = "bfloat16"
    layers: int = 0

    @property
    def name(self) -> str:
        """Names the shape in reports."""
        parts = f"{self.rows}x{self.depth}x{self.features}-c" + "x".join(
            map(str, self.codebook)
        )
        if self.groups:
            parts += f"-g{self.depth // self.groups}"
        parts += "-selected" * self.selected + "-packed" * self.packed
        return f"{parts}-{self.dtype}" + f"-l{self.layers}" * bool(self.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The static arguments of the call."""
        layer = {"layer": self.layers - 1} if self.layers else {}
        return {"packed": self.packed, **layer}

    def arguments(self) -> tuple[Any, ...]:
        """Returns the abstract array arguments of the call."""
        stack = (self.layers,) if self.layers else ()
        tuples, F = self.depth // self.codebook[3], self.features

        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((*stack, *shape), dtype)

        codes = packed_rows(tuples) if self.packed else tuples
        integers = self.dtype == "int8"
        weight = CodebookWeight(
            array(codes, F, dtype=jnp.uint8),
            array(*self.codebook, dtype=jnp.int8 if integers else jnp.float32),
            array(self.groups, F) if self.groups else None,
            array(self.groups, F, dtype=jnp.int32) if self.selected else None,
        )
        x = jax.ShapeDtypeStruct((self.rows, self.depth), jnp.dtype(self.dtype))
        x_scale = jax.ShapeDtypeStruct((self.rows,), jnp.float32)
        return x, weight, x_scale if integers else None


SHAPES = (
    # Layers of an 8B Llama: 4-bit mixed datatypes, vectors at 2 and 4 bits a weight.
    Shape(
        rows=16,
        depth=4096,
        features=14336,
        codebook=(4, 1, 16, 1),
        groups=32,
        selected=True,
        packed=True,
    ),
    Shape(rows=16, depth=4096, features=14336, codebook=(16, 1792, 16, 2), packed=True),
    Shape(rows=16, depth=14336, features=4096, codebook=(56, 16, 256, 4)),
    Shape(rows=512, depth=4096, features=14336, codebook=(16, 112, 256, 2), groups=64),
    # One codebook for all; odd sizes.
    Shape(rows=1, depth=300, features=70, codebook=(1, 1, 16, 1), dtype="float32"),
    Shape(rows=5, depth=1300, features=200, codebook=(1, 1, 256, 2), dtype="float32"),
    Shape(
        rows=3, depth=384, features=130, codebook=(1, 1, 16, 1), packed=True, groups=3
    ),
    # Mixed datatypes: four grids of 16, one selected by each group.
    Shape(
        rows=5,
        depth=1280,
        features=200,
        codebook=(4, 1, 16, 1),
        groups=10,
        selected=True,
        packed=True,
        dtype="float32",
    ),
    Shape(
        rows=5,
        depth=512,
        features=130,
        codebook=(4, 1, 8, 1),
        groups=4,
        selected=True,
        packed=True,
        dtype="int8",
    ),
    Shape(
        rows=5,
        depth=256,
        features=130,
        codebook=(2, 1, 16, 1),
        groups=8,
        selected=True,
    ),
    # Codebooks of 256 rows and 2, 8, 32, 128, 256 columns.
    Shape(rows=3, depth=768, features=132, codebook=(3, 66, 8, 1), dtype="float32"),
    Shape(rows=3, depth=768, features=136, codebook=(3, 17, 16, 2), dtype="float32"),
    Shape(rows=3, depth=768, features=160, codebook=(3, 5, 64, 2), groups=12),
    Shape(rows=3, depth=2304, features=128, codebook=(9, 1, 256, 2), dtype="float32"),
    Shape(rows=3, depth=512, features=512, codebook=(2, 2, 256, 4), dtype="float32"),
    # A layer out of a stack.
    Shape(rows=8, depth=1024, features=256, codebook=(4, 32, 16, 2), layers=2),
)


def block_key(shape: Shape) -> str:
    """Returns what measured block sizes depend on; not the number of rows."""
    _, _, entries, numbers = shape.codebook
    return f"{shape.dtype}:{entries}:{numbers}"


def obstacle(shape: Shape, target: Target) -> str | None:
    """Returns why the TPU kernel cannot run a shape, or None.

    Args:
      shape: The call.
      target: The device; what only some generations lack is no obstacle where the
        generation is not known.
    """
    if 0 in (shape.rows, shape.depth, shape.features):
        return "the product is empty"
    how = lookup(
        shape.codebook,
        (shape.depth, shape.features),
        shape.groups or 1,
        shape.packed,
        shape.selected,
        1024,
    )
    if isinstance(how, str):
        return how
    if shape.dtype == "int8":
        if target.generation == "v4":
            return "v4 multiplies no int8"
        if 0 < how.cut.group < 128:
            return "groups of fewer than 128 tuples need floating activations"
    elif shape.dtype not in ("bfloat16", "float32"):
        return f"activations are {shape.dtype}, not bfloat16, float32 or int8"
    return None

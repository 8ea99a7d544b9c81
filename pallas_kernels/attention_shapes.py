"""The shape of an attention call, and what no TPU kernel of ours can run.

Letters: B rows, T queries, N query heads, K kv heads, H head dim, S keys, P pages,
Z keys of a page, C pages of a row's table, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Target
from pallas_kernels.operands import Keys, Logits, PagedKeys

__all__ = ["AttentionShape", "interval_obstacle"]

_LANES = 128
# Page numbers live in scalar memory, which holds 1 MiB on every generation; beside
# them are bounds of the blocks.
_MAX_PAGE_NUMBERS = 2**17


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """A call of an attention op.

    Attributes:
      rows: B.
      queries: T.
      heads: N.
      kv_heads: K.
      head_dim: H.
      keys: S, that a row could have.
      layers: L of a stacked cache, 0 when keys of one layer are given.
      page: Z of paged keys, 0 for dense ones.
      dtype: Of queries, keys and values.
      window: Whether there is a local window.
      softcap: Of the logits.
      segments: Whether rows are packed.
    """

    rows: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: int
    layers: int = 0
    page: int = 0
    dtype: str = "bfloat16"
    window: bool = False
    softcap: float | None = None
    segments: bool = False

    @property
    def name(self) -> str:
        """Names the shape in reports."""
        parts = [
            f"B{self.rows}-T{self.queries}-N{self.heads}-K{self.kv_heads}",
            f"H{self.head_dim}-S{self.keys}-{self.dtype}",
        ]
        if self.layers:
            parts.append(f"L{self.layers}")
        if self.page:
            parts.append(f"page{self.page}")
        parts += ["window"] * self.window + ["packed"] * self.segments
        if self.softcap is not None:
            parts.append("softcap")
        return "-".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The static arguments of the call."""
        return {"logits": Logits(softcap=self.softcap)}

    def query(self) -> Any:
        """Returns the abstract queries `[B, T, N, H]`."""
        shape = (self.rows, self.queries, self.heads, self.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

    def key(self, users: int | None) -> Keys | PagedKeys:
        """Returns abstract keys of some users, without that axis when None.

        Pages are as many as all rows need together.
        """
        layers = (self.layers,) if self.layers else ()

        def integers(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def floats(*shape: int) -> Any:
            return jax.ShapeDtypeStruct((*layers, *shape), jnp.dtype(self.dtype))

        if self.page:
            table = (self.rows, -(-self.keys // self.page))
            k = floats(table[0] * table[1], self.kv_heads, self.page, self.head_dim)
            return PagedKeys(
                k, k, integers(self.rows), integers(*table), layer=integers()
            )
        user = () if users is None else (users,)
        k = floats(*user, self.kv_heads, self.keys, self.head_dim)
        segment = integers(*user, self.keys) if self.segments else None
        return Keys(k, k, integers(*user), layer=integers(), segment=segment)

    def places(self) -> tuple[Any, ...]:
        """Returns the abstract positions `[B, T]` and window, None where not needed."""
        if not self.window:
            return (None, None)
        integer = jnp.dtype(jnp.int32)
        position = jax.ShapeDtypeStruct((self.rows, self.queries), integer)
        return (position, jax.ShapeDtypeStruct((), integer))


def interval_obstacle(shape: AttentionShape, target: Target) -> str | None:
    """Returns why the TPU kernel cannot run a shape, or None.

    It compiles for every generation, so the target changes nothing.
    """
    if shape.dtype not in ("bfloat16", "float32"):
        return f"the TPU kernel reads bfloat16 or float32, not {shape.dtype}"
    if min(shape.rows, shape.queries, shape.keys) == 0:
        return "there is nothing to compute"
    if not shape.page:
        return None
    if shape.head_dim % _LANES:
        return (
            f"pages of head dim {shape.head_dim}, no multiple of {_LANES}, are "
            "copied with padding before a TPU kernel reads them"
        )
    sublanes = 32 // jnp.dtype(shape.dtype).itemsize
    if shape.page % sublanes:
        return (
            f"pages of {shape.page} keys, expected a multiple of {sublanes} for "
            f"{shape.dtype}"
        )
    if shape.rows * -(-shape.keys // shape.page) > _MAX_PAGE_NUMBERS:
        return f"more than {_MAX_PAGE_NUMBERS} page numbers"
    return None

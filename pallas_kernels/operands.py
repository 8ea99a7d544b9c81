"""What the attention ops take: keys with their validity, and how logits are made.

Letters: L layers of a stacked cache, U users of the keys (B rows, or 1 for a prefix
that all rows share), K kv heads, S keys, H head dim, B rows, P pages of a pool, Z keys
of a page, C pages of a row's table, T queries, M draft nodes.
"""

import dataclasses

import jax
from jax import Array

__all__ = ["Keys", "Logits", "NodeKeys", "PagedKeys"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values of one layer, or of all with the number of the one to read.

    What lies at or past a length may hold anything, NaN too.

    Attributes:
      k: `[U, K, S, H]`, or `[L, U, K, S, H]`; the prefix op leaves U out.
      v: As `k`.
      length: int32 `[U]`, or a scalar for a prefix: valid keys; all S when None.
      layer: int32 scalar, the layer to read of stacked keys.
      segment: int32 `[U, S]`, ids of packed sequences; a query sees keys of its own
        id only. Read by `flash_attention` alone.
    """

    k: Array
    v: Array
    length: Array | None = None
    layer: Array | int = 0
    segment: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKeys:
    """Keys and values in pages of a pool that all rows share.

    Attributes:
      k: `[P, K, Z, H]`, or `[L, P, K, Z, H]`.
      v: As `k`.
      length: int32 `[B]`, valid keys of each row.
      pages: int32 `[B, C]`; key s of a row is key `s % Z` of page `pages[s // Z]`.
        Entries past a row's length may hold anything.
      layer: int32 scalar, the layer to read of stacked pools.
    """

    k: Array
    v: Array
    length: Array
    pages: Array
    layer: Array | int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeKeys:
    """Keys and values of draft nodes, with who sees whom written out.

    Attributes:
      k: `[B, K, M, H]`.
      v: As `k`.
      visible: bool `[B, T, M]`, whether query t sees node m; a local window, where
        there is one, is part of it.
    """

    k: Array
    v: Array
    visible: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logits:
    """How products of queries and keys become logits.

    Attributes:
      scale: Multiplies the products; H ** -0.5 when None.
      softcap: c of `c * tanh(logits / c)`; none when None.
    """

    scale: float | None = None
    softcap: float | None = None

    def factor(self, head_dim: int) -> float:
        """Returns the scale for heads of a width."""
        return head_dim**-0.5 if self.scale is None else self.scale

"""Keys and values that several rows share, and the cache that stands on them.

A prefix is a forest of token sequences: a *level* holds one stretch of it, its *users*
are the nodes of the forest, and every row reads at most one user of each level. The
queries of all rows of a user meet its keys in one product, so the keys are read once.

Letters: B rows, U users of a level, R most rows of a user, K kv heads, P slots of a
level, H head dim, T new tokens, J path length, l layers of a stack.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from jaxllm.attention.cache import DenseCache, NewKV
from jaxllm.attention.masks import FULL
from jaxllm.attention.segments import Segment
from jaxllm.core.pytree import pytree_dataclass

__all__ = ["PrefixLevel", "PrefixedCache", "SharedPrefix"]


@pytree_dataclass
class PrefixLevel:
    """One stretch of the prefix.

    Attributes:
      k: For each stack `[l, U, K, P, H]`, rotated.
      v: For each stack `[l, U, K, P, H]`.
      start_U: int32 position of each user's first key.
      length_U: int32 keys of each user.
      rows_UR: int32 rows that read each user; B where there are fewer than R. A row
        stands in at most one place. None: all rows read the one user.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    start_U: Array
    length_U: Array
    rows_UR: Array | None = None

    def length_B(self, rows: int) -> Array:
        """Returns how many keys of this level each row reads."""
        if self.rows_UR is None:
            return jnp.broadcast_to(self.length_U, (rows,))
        length_UR = jnp.broadcast_to(self.length_U[:, None], self.rows_UR.shape)
        none_B = jnp.zeros((rows,), jnp.int32)
        return none_B.at[self.rows_UR].set(length_UR, mode="drop")

    def segment(self, stack: int, layer: Array | int) -> Segment:
        """Returns the keys of a layer; all of them precede every query."""
        return Segment(
            k_UKSH=self.k[stack],
            v_UKSH=self.v[stack],
            layer=layer,
            length_U=self.length_U,
            start_U=self.start_U,
            rows_UR=self.rows_UR,
            mask=FULL,
        )


@pytree_dataclass
class SharedPrefix:
    """The levels of a prefix, and how much of it each row reads.

    Attributes:
      levels: In any order: positions say where keys stand.
      length_B: int32 tokens of each row's own prefix, of all levels together.
    """

    levels: tuple[PrefixLevel, ...]
    length_B: Array

    @classmethod
    def make(cls, levels: tuple[PrefixLevel, ...], rows: int) -> "SharedPrefix":
        """Returns the prefix of so many rows; of no level, too."""
        length_B = jnp.zeros((rows,), jnp.int32)
        return cls(levels, sum((x.length_B(rows) for x in levels), start=length_B))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for level in self.levels for x in (*level.k, *level.v))


@pytree_dataclass
class PrefixedCache:
    """A shared prefix, and behind it a dense cache of what each row has of its own.

    For everybody else it is a cache like any other: `length_B` counts the prefix, and
    only the dense part grows. Nothing ever writes to the prefix.

    Attributes:
      prefix: What is shared.
      suffix: Slot s of row b holds position `prefix.length_B[b] + s`.

    Source: Hydragen (arXiv 2402.05099) section 3; RelayAttention (arXiv 2402.14808)
      section 3.2.
    """

    prefix: SharedPrefix
    suffix: DenseCache

    @property
    def length_B(self) -> Array:
        """Tokens of each row, prefix included."""
        return self.prefix.length_B + self.suffix.length_B

    @property
    def capacity(self) -> int:
        """Slots of a row's own."""
        return self.suffix.capacity

    @property
    def starts_empty(self) -> bool:
        """False, unless no row shares anything."""
        return not self.prefix.levels

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.prefix.nbytes + self.suffix.nbytes

    def segments(self, stack: int, layer: Array | int) -> tuple[Segment, ...]:
        """Returns a segment for each level, and one of the rows' own keys."""
        own = self.suffix.segments(stack, layer)
        own = tuple(dataclasses.replace(x, start_U=self.prefix.length_B) for x in own)
        return (*(x.segment(stack, layer) for x in self.prefix.levels), *own)

    def append(
        self,
        new_kv: NewKV,
        path_BJ: Array | None = None,
        count_B: Array | None = None,
    ) -> "PrefixedCache":
        """Grows the rows' own part; arguments as for `DenseCache.append`."""
        grown = self.suffix.append(new_kv, path_BJ, count_B)
        return PrefixedCache(self.prefix, grown)

    def crop(self, length_B: Array) -> "PrefixedCache":
        """Returns the cache with rows cut to lengths that hold at least the prefix."""
        own_B = jnp.maximum(length_B - self.prefix.length_B, 0)
        return PrefixedCache(self.prefix, self.suffix.crop(own_B))

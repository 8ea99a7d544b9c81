"""The dense key-value cache: read-only in a forward, grown by what was accepted.

Letters: B rows, K kv heads, S slots, H head dim, T new tokens, J path length, l layers
of a stack.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from jaxllm.attention.masks import FULL
from jaxllm.attention.segments import Segment
from jaxllm.core.pytree import pytree_dataclass

__all__ = ["Cache", "DenseCache", "NewKV", "init_cache"]

NewKV = tuple[tuple[Array, Array] | None, ...]
"""New keys and values of a forward: a pair `[l, B, K, T, H]` for each stack."""


class Cache(Protocol):
    """What a forward and the engine know of a cache."""

    @property
    def length_B(self) -> Array:
        """Valid slots of each row."""

    @property
    def capacity(self) -> int:
        """Slots of a row."""

    @property
    def starts_empty(self) -> bool:
        """Whether a new one holds nothing, so that a first forward need not look."""

    def segments(self, stack: int, layer: Array | int) -> tuple[Segment, ...]:
        """Returns what a layer attends to beside its own new keys."""

    def append(
        self,
        new_kv: NewKV,
        path_BJ: Array | None = None,
        count_B: Array | None = None,
    ) -> "Cache":
        """Returns the cache grown by the accepted tokens."""


@pytree_dataclass
class DenseCache:
    """Keys and values of every layer, one row of slots for each sequence.

    Slots from `length_B` on hold garbage. Rows are filled from slot 0, and slot s
    holds position s.

    Attributes:
      k: For each stack `[l, B, K, S, H]`, rotated.
      v: For each stack `[l, B, K, S, H]`.
      length_B: int32, valid slots of each row.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    length_B: Array

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.k[0].shape[3]

    @property
    def starts_empty(self) -> bool:
        """True: a new one holds nothing."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for x in (*self.k, *self.v))

    def segments(self, stack: int, layer: Array | int) -> tuple[Segment, ...]:
        """Returns the one segment of a layer's cached keys.

        Args:
          stack: Index of the stack.
          layer: Index within the stack.
        """
        return (
            Segment(
                k_UKSH=self.k[stack],
                v_UKSH=self.v[stack],
                layer=layer,
                length_U=self.length_B,
                mask=FULL,
            ),
        )

    def append(
        self,
        new_kv: NewKV,
        path_BJ: Array | None = None,
        count_B: Array | None = None,
    ) -> "DenseCache":
        """Writes the new keys and values of a path behind each row's last token.

        Args:
          new_kv: Of every stack, a pair `[l, B, K, T, H]`.
          path_BJ: int32 indices into T of the tokens to keep, in order; all T in
            order when None.
          count_B: int32, how many of the path each row keeps; all when None.

        Returns:
          The grown cache. What would land past the last slot is dropped, never
          written over earlier slots.
        """
        tokens = next(pair for pair in new_kv if pair is not None)[0].shape[3]
        rows = self.length_B.shape[0]
        steps = tokens if path_BJ is None else path_BJ.shape[1]
        index_J = jnp.arange(steps, dtype=jnp.int32)
        if count_B is None:
            count_B = jnp.full((rows,), steps, jnp.int32)
        slot_BJ = self.length_B[:, None] + index_J
        slot_BJ = jnp.where(index_J < count_B[:, None], slot_BJ, self.capacity)
        k, v = list(self.k), list(self.v)
        for i, pair in enumerate(new_kv):
            if pair is None:
                continue
            new_k, new_v = pair
            if path_BJ is not None:
                gather = path_BJ[None, :, None, :, None]
                new_k = jnp.take_along_axis(new_k, gather, axis=3)
                new_v = jnp.take_along_axis(new_v, gather, axis=3)
            k[i], v[i] = write(k[i], new_k, slot_BJ), write(v[i], new_v, slot_BJ)
        return DenseCache(tuple(k), tuple(v), self.length_B + count_B)

    def crop(self, length_B: Array) -> "DenseCache":
        """Returns the cache with rows cut to the given lengths."""
        return DenseCache(self.k, self.v, jnp.minimum(self.length_B, length_B))


def write(cache_LBKSH: Array, new_LBKJH: Array, slot_BJ: Array) -> Array:
    """Writes tokens into slots by one scatter that indexes every axis but the last.

    Slots at or past the capacity are dropped. This is the one form that copies
    nothing on a CPU, on a TPU with sharded heads, and with a sharded batch. XLA:CPU
    widens a scatter of a narrow float to float32, the whole cache with it: on a CPU
    keep the cache in float32 (`cache_dtype`).
    """
    layers, rows, heads, _, _ = cache_LBKSH.shape
    layer = jnp.arange(layers)[:, None, None, None]
    row = jnp.arange(rows)[None, :, None, None]
    head = jnp.arange(heads)[None, None, :, None]
    slot = slot_BJ[None, :, None, :]
    return cache_LBKSH.at[layer, row, head, slot].set(
        new_LBKJH.astype(cache_LBKSH.dtype), mode="drop", unique_indices=True
    )


def init_cache(
    layers: Sequence[int],
    *,
    rows: int,
    capacity: int,
    kv_heads: Sequence[int],
    head_dim: int,
    dtype: Any,
) -> DenseCache:
    """Returns an empty cache.

    Args:
      layers: Layers of each stack.
      rows: B.
      capacity: S, slots of a row; allow a draft's longest path as slack.
      kv_heads: K of each stack.
      head_dim: H.
      dtype: Dtype of keys and values.
    """
    shapes = [
        (count, rows, heads, capacity, head_dim)
        for count, heads in zip(layers, kv_heads, strict=True)
    ]
    return DenseCache(
        tuple(jnp.zeros(shape, dtype) for shape in shapes),
        tuple(jnp.zeros(shape, dtype) for shape in shapes),
        jnp.zeros((rows,), jnp.int32),
    )

"""The paged key-value cache: rows stand in pages of one pool, wherever these lie.

Rows of any length share one pool without a slot of slack between them, and several rows
may read one page. Who owns which page is decided on the host, by
`jaxllm.decoding.pages`; a program only reads and fills what the tables say.

Letters: B rows, N pages of a row, P pages of the pool, K kv heads, S slots of a page, H
head dim, T new tokens, J path length, l layers of a stack.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxllm.attention.cache import NewKV
from jaxllm.attention.masks import FULL
from jaxllm.attention.segments import Segment
from jaxllm.core.pytree import pytree_dataclass

__all__ = ["PagedCache", "copy_pages", "init_pages"]


@pytree_dataclass
class PagedCache:
    """Keys and values of every layer in pages.

    Attributes:
      k: For each stack a pool `[l, P, K, S, H]`, rotated.
      v: For each stack a pool `[l, P, K, S, H]`.
      table_BN: int32 pages of each row, in order. Entries behind a row's last page are
        read but never seen, and never written.
      length_B: int32, tokens of each row.
      writable_B: int32, slots that a row has pages for; what would stand behind is
        dropped.

    Source: Efficient Memory Management for Large Language Model Serving with
      PagedAttention (arXiv 2309.06180), section 4.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    table_BN: Array
    length_B: Array
    writable_B: Array

    @property
    def page_slots(self) -> int:
        """Tokens of a page."""
        return self.k[0].shape[3]

    @property
    def capacity(self) -> int:
        """Slots of a row whose table is full."""
        return self.table_BN.shape[1] * self.page_slots

    @property
    def starts_empty(self) -> bool:
        """False: a row may begin with pages of another."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of the whole pool."""
        return sum(x.nbytes for x in (*self.k, *self.v))

    def segments(self, stack: int, layer: Array | int) -> tuple[Segment, ...]:
        """Returns the one segment of a layer's cached keys."""
        return (
            Segment(
                k_UKSH=self.k[stack],
                v_UKSH=self.v[stack],
                layer=layer,
                length_U=self.length_B,
                pages_BN=self.table_BN,
                mask=FULL,
            ),
        )

    def append(
        self,
        new_kv: NewKV,
        path_BJ: Array | None = None,
        count_B: Array | None = None,
    ) -> "PagedCache":
        """Writes the new keys and values of a path; arguments as for `DenseCache`."""
        tokens = next(pair for pair in new_kv if pair is not None)[0].shape[3]
        rows, steps = self.length_B.shape[0], tokens
        if path_BJ is not None:
            steps = path_BJ.shape[1]
        index_J = jnp.arange(steps, dtype=jnp.int32)
        if count_B is None:
            count_B = jnp.full((rows,), steps, jnp.int32)
        slot_BJ = self.length_B[:, None] + index_J
        taken_BJ = (index_J < count_B[:, None]) & (slot_BJ < self.writable_B[:, None])
        last = self.table_BN.shape[1] - 1
        at_BJ = jnp.minimum(slot_BJ // self.page_slots, last)
        page_BJ = jnp.take_along_axis(self.table_BN, at_BJ, axis=1)
        page_BJ = jnp.where(taken_BJ, page_BJ, self.k[0].shape[1])
        slot_BJ = slot_BJ % self.page_slots
        k, v = list(self.k), list(self.v)
        for i, pair in enumerate(new_kv):
            if pair is None:
                continue
            new_k, new_v = pair
            if path_BJ is not None:
                gather = path_BJ[None, :, None, :, None]
                new_k = jnp.take_along_axis(new_k, gather, axis=3)
                new_v = jnp.take_along_axis(new_v, gather, axis=3)
            k[i] = _write(k[i], new_k, page_BJ, slot_BJ)
            v[i] = _write(v[i], new_v, page_BJ, slot_BJ)
        grown_B = self.length_B + count_B
        return dataclasses.replace(self, k=tuple(k), v=tuple(v), length_B=grown_B)

    def crop(self, length_B: Array) -> "PagedCache":
        """Returns the cache with rows cut to lengths; they keep their pages."""
        cut_B = jnp.minimum(self.length_B, length_B)
        return dataclasses.replace(self, length_B=cut_B)


def _write(
    pool_LPKSH: Array, new_LBKJH: Array, page_BJ: Array, slot_BJ: Array
) -> Array:
    """Writes tokens by one scatter that indexes all axes but one; see `write`."""
    layers, _, heads, _, _ = pool_LPKSH.shape
    layer = jnp.arange(layers)[:, None, None, None]
    head = jnp.arange(heads)[None, None, :, None]
    page, slot = page_BJ[None, :, None, :], slot_BJ[None, :, None, :]
    return pool_LPKSH.at[layer, page, head, slot].set(
        new_LBKJH.astype(pool_LPKSH.dtype), mode="drop", unique_indices=True
    )


def copy_pages(cache: PagedCache, source_C: Array, target_C: Array) -> PagedCache:
    """Copies pages to pages, for a row that is about to write where others read.

    Args:
      cache: Holds them.
      source_C: int32 pages to read.
      target_C: int32 pages to fill; P where there is nothing to copy.
    """

    def copy(pool: Array) -> Array:
        return pool.at[:, target_C].set(pool[:, source_C], mode="drop")

    return dataclasses.replace(
        cache, k=tuple(map(copy, cache.k)), v=tuple(map(copy, cache.v))
    )


def init_pages(
    layers: Sequence[int],
    *,
    rows: int,
    pages: int,
    page_slots: int,
    row_pages: int,
    kv_heads: Sequence[int],
    head_dim: int,
    dtype: Any,
) -> PagedCache:
    """Returns an empty pool whose rows have no pages yet.

    Args:
      layers: Layers of each stack.
      rows: B.
      pages: P.
      page_slots: S.
      row_pages: N.
      kv_heads: K of each stack.
      head_dim: H.
      dtype: Dtype of keys and values.
    """
    shapes = [
        (count, pages, heads, page_slots, head_dim)
        for count, heads in zip(layers, kv_heads, strict=True)
    ]
    none_B = jnp.zeros((rows,), jnp.int32)
    return PagedCache(
        tuple(jnp.zeros(shape, dtype) for shape in shapes),
        tuple(jnp.zeros(shape, dtype) for shape in shapes),
        jnp.zeros((rows, row_pages), jnp.int32),
        none_B,
        none_B,
    )

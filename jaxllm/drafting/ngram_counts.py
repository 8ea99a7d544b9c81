"""Counting n-grams: of a text on the host, of prompts on the device.

Letters: B rows, S slots of a row, H slots of the table, R candidates of a context, X
contexts, V vocabulary, N n-grams.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.drafting.ngrams import TrigramTable, empty_table, slot_of

__all__ = ["build_trigram", "count_prompts"]


def build_trigram(
    tokens: Any,
    vocabulary: int,
    slots: int,
    rank: int = 4,
    bigram_rank: int | None = None,
) -> TrigramTable:
    """Counts a text on the host.

    Args:
      tokens: int ids `[N]`, one text after the other.
      vocabulary: V.
      slots: H. Of several contexts with one slot the most frequent has it, of equally
        frequent ones that of the smallest ids.
      rank: R of trigrams and unigrams: the candidates kept of each context, those seen
        most often, of equally frequent ones the smallest ids.
      bigram_rank: R of bigrams; the same when None.

    Returns:
      The table, with `P(w | u, v) = C(u, v, w) / C(u, v)` and likewise below.

    Source: Adaptive Draft-Verification (arXiv 2407.12021), the initial tri-gram table.
    """
    ids = np.asarray(tokens, np.int64)
    if ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() < vocabulary):
        raise ConfigError(
            f"cannot count n-grams: tokens have shape {ids.shape} and lie outside "
            f"the vocabulary, expected one row of ids from 0 to {vocabulary - 1}. Use "
            f"the model's own tokenizer."
        )
    table = jax.tree.map(np.array, empty_table(vocabulary, slots, rank, bigram_rank))
    one = _top_counts(np.zeros_like(ids), ids, vocabulary, rank)
    table.unigram_next_R[one.place], table.unigram_prob_R[one.place] = one.next, one.p
    two = _top_counts(ids[:-1], ids[1:], vocabulary, table.bigram_rank)
    table.bigram_next_VR[two.context, two.place] = two.next
    table.bigram_prob_VR[two.context, two.place] = two.p
    pair = ids[:-2] * vocabulary + ids[1:-1]
    three = _top_counts(pair, ids[2:], vocabulary, rank)
    u, v = np.divmod(three.context, vocabulary)
    slot = slot_of(u, v, slots)
    # The winner of a slot comes first in this order.
    order = np.lexsort((three.context, -three.total, slot))
    first = np.r_[True, np.diff(slot[order]) != 0][: len(order)]
    winner = np.full((slots,), -1)
    winner[slot[order][first]] = three.context[order][first]
    kept = winner[slot] == three.context
    slot, place = slot[kept], three.place[kept]
    table.key_H2[slot, 0], table.key_H2[slot, 1] = u[kept], v[kept]
    table.next_HR[slot, place] = three.next[kept]
    table.prob_HR[slot, place] = three.p[kept]
    return jax.tree.map(jnp.asarray, table)


class _Counts:
    """The most frequent continuations of every context, one an entry.

    Attributes:
      context: The context.
      total: How often it was seen.
      next: The token behind it.
      place: How many continuations of the context come before this one.
      p: The share of this one.
    """

    def __init__(self, context: Any, next: Any, count: Any, rank: int):
        order = np.lexsort((next, -count, context))
        context, next, count = context[order], next[order], count[order]
        start = np.flatnonzero(np.r_[True, np.diff(context) != 0][: len(context)])
        of = np.searchsorted(start, np.arange(len(context)), side="right") - 1
        total = np.add.reduceat(count, start)[of] if len(start) else count
        place = np.arange(len(context)) - start[of] if len(start) else count
        kept = place < rank
        self.context, self.total = context[kept], total[kept]
        self.next, self.place = next[kept], place[kept]
        self.p = (count[kept] / total[kept]).astype(np.float32)


def _top_counts(context: Any, next: Any, vocabulary: int, rank: int) -> _Counts:
    pair, count = np.unique(context * vocabulary + next, return_counts=True)
    return _Counts(*np.divmod(pair, vocabulary), count, rank)


def count_prompts(
    table: TrigramTable, tokens_BS: Array, length_B: Array
) -> TrigramTable:
    """Counts prompts on the device, for the contexts that a table lacks.

    Args:
      table: What is known already stays; a context that it lacks takes its slot.
      tokens_BS: int32 prompts, left aligned.
      length_B: int32 tokens of each.

    Returns:
      The table. From an empty one and one prompt it is `build_trigram` of the prompt.
    """
    slots, V = table.slots, table.vocabulary
    index_S = jnp.arange(tokens_BS.shape[1])

    def columns(size: int) -> list[Array]:
        """Returns n-grams by column, `[N]` each; V where a row has none."""
        there_BS = index_S < length_B[:, None] - (size - 1)
        shifted = (jnp.roll(tokens_BS, -i, axis=1) for i in range(size))
        return [jnp.where(there_BS, x, V).reshape(-1) for x in shifted]

    one = _count(columns(1), table.rank, V)
    fresh_R = jnp.where(one.place_N < table.rank, one.place_N, table.rank)
    unigram_next_R = jnp.full_like(table.unigram_next_R, -1)
    unigram_next_R = unigram_next_R.at[fresh_R].set(one.next_N, mode="drop")
    unigram_prob_R = jnp.zeros_like(table.unigram_prob_R)
    unigram_prob_R = unigram_prob_R.at[fresh_R].set(one.prob_N, mode="drop")

    two = _count(columns(2), table.bigram_rank, V)
    lacks_N = table.bigram_next_VR[two.context[0], 0] < 0
    bigrams = _write(
        table.bigram_next_VR, table.bigram_prob_VR, two.context[0], two, lacks_N
    )
    three = _count(columns(3), table.rank, V)
    u_N, v_N = three.context
    slot_N = slot_of(u_N, v_N, slots)
    key_N2 = jnp.stack([u_N, v_N], axis=1)
    most_H = jnp.zeros((slots,), jnp.int32)
    most_H = most_H.at[slot_N].max(three.total_N, mode="drop")
    first_H = jnp.full((slots,), u_N.shape[0], jnp.int32)
    # Contexts are numbered in the order of their ids.
    contender_N = three.total_N == most_H[slot_N]
    first_H = first_H.at[jnp.where(contender_N, slot_N, slots)].min(
        three.number_N, mode="drop"
    )
    wins_N = contender_N & (three.number_N == first_H[slot_N])
    lacks_N = wins_N & (table.key_H2[slot_N] != key_N2).any(axis=1)
    trigrams = _write(table.next_HR, table.prob_HR, slot_N, three, lacks_N)
    at_N = jnp.where(lacks_N & (three.place_N < table.rank), slot_N, slots)
    known = table.unigram_next_R[0] >= 0
    return TrigramTable(
        table.key_H2.at[at_N].set(key_N2, mode="drop"),
        *trigrams,
        *bigrams,
        jnp.where(known, table.unigram_next_R, unigram_next_R),
        jnp.where(known, table.unigram_prob_R, unigram_prob_R),
    )


@pytree_dataclass
class _Counted:
    """Continuations of contexts; the order is that of the ids.

    Attributes:
      context: int32 `[N]` columns of the context.
      number_N: int32 number of the context.
      total_N: int32, how often it was seen.
      next_N: int32 the token behind it.
      place_N: int32 continuations of the context before this one, most frequent
        first; not below the rank for what is no entry.
      prob_N: float32 share of this one.
    """

    context: tuple[Array, ...]
    number_N: Array
    total_N: Array
    next_N: Array
    place_N: Array
    prob_N: Array


def _count(columns: list[Array], rank: int, vocabulary: int) -> _Counted:
    """Counts n-grams given by column; those with an id of V do not count."""
    N = columns[0].shape[0]
    index_N = jnp.arange(N, dtype=jnp.int32)

    def begins(parts: Any) -> Array:
        changed = jnp.zeros((N,), bool).at[0].set(True)
        for part in parts:
            changed = changed.at[1:].max(part[1:] != part[:-1])
        return changed

    def sums(x_N: Array, number_N: Array) -> Array:
        return jnp.zeros((N,), jnp.int32).at[number_N].add(x_N)[number_N]

    *context, next_N = jax.lax.sort(columns, num_keys=len(columns))
    real_N = (next_N < vocabulary).astype(jnp.int32)
    first_N = begins([*context, next_N])
    count_N = sums(real_N, jnp.cumsum(first_N) - 1)
    number_N = jnp.cumsum(begins(context), dtype=jnp.int32) - 1
    # Most frequent first within a context; repetitions and what is not real go last.
    entry_N = first_N & (real_N > 0)
    order = [number_N, jnp.where(entry_N, -count_N, 1), next_N, *context, real_N]
    number_N, minus_N, next_N, *context, real_N = jax.lax.sort(order, num_keys=3)
    start_N = jax.lax.cummax(jnp.where(begins([number_N]), index_N, 0))
    total_N = sums(real_N, number_N)
    place_N = jnp.where(minus_N < 0, index_N - start_N, rank)
    prob_N = -minus_N / jnp.maximum(total_N, 1)
    return _Counted(
        tuple(context), number_N, total_N, next_N, place_N, prob_N.astype(jnp.float32)
    )


def _write(
    next_XR: Array, prob_XR: Array, row_N: Array, counted: _Counted, take_N: Array
) -> tuple[Array, Array]:
    """Writes the rows of contexts that are taken anew."""
    rows, rank = next_XR.shape
    entry_N = take_N & (counted.place_N < rank)
    row_N = jnp.where(entry_N, row_N, rows)
    next_XR = next_XR.at[row_N].set(-1, mode="drop")
    prob_XR = prob_XR.at[row_N].set(0.0, mode="drop")
    at = (row_N, counted.place_N)
    return (
        next_XR.at[at].set(counted.next_N, mode="drop"),
        prob_XR.at[at].set(counted.prob_N, mode="drop"),
    )

"""MaG, the cheapest drafter of a cascade: copies the longest match, then bigrams.

Letters: B rows, S slots, M draft nodes, L drafted tokens, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Params
from jaxllm.drafting.ngrams import TrigramTable, load_table
from jaxllm.drafting.prompt_lookup import (
    check_ngrams,
    match_continuation,
    match_continuation_reference,
)

__all__ = ["MaxGram", "greedy_bigrams", "max_gram_reference"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxGram(Drafter):
    """Copies what followed the longest match; where there is none, walks bigrams.

    Always drafts a full chain, whatever the temperature.

    Attributes:
      length: Tokens drafted in a step.
      max_ngram: Longest suffix of the row that is looked for.
      min_ngram: Shortest match that is copied.
      table: File or shipped table whose bigrams are walked. Without one, a token is
        followed by what followed it last in the row, or by itself.

    Source: Cascade Speculative Drafting (arXiv 2312.11462), section 3.3, Max-Gram.

    Differs from the paper: of equally long matches the most recent wins, and a copy
      that reaches the end of the text goes on with its own beginning; there the paper
      turns to the bigrams.
    """

    length: int = 10
    max_ngram: int = 16
    min_ngram: int = 1
    table: str = ""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(
                f"cannot draft: max_gram.length is {self.length}, expected 1 or more. "
                f"Correct it."
            )
        check_ngrams("max_gram", self.min_ngram, self.max_ngram)

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, the pending token and the chain."""
        return self.length + 1

    @property
    def depth(self) -> int:  # type: ignore[override]
        """The length."""
        return self.length

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Loads the bigrams; their vocabulary has to be the model's."""
        if not self.table:
            return self, {}
        table = load_table(self.table, lm.config.vocabulary)
        return self, {"bigram_V": greedy_bigrams(table)}

    def propose(
        self, params: Params, state: Any, committed: Committed
    ) -> tuple[Any, Draft]:
        """Returns the pending token and the chain."""
        copied_BL, matched_B = match_continuation(
            committed.tokens_BS,
            committed.length_B,
            length=self.length,
            max_ngram=self.max_ngram,
            min_ngram=self.min_ngram,
        )
        follow = _follower(params["drafter"], committed)
        walked = [committed.pending_B]
        for _ in range(self.length):
            walked.append(follow(walked[-1]))
        walked_BL = jnp.stack(walked[1:], axis=1)
        chain_BL = jnp.where(matched_B[:, None] > 0, copied_BL, walked_BL)
        tokens_BM = jnp.concatenate([committed.pending_B[:, None], chain_BL], axis=1)
        return state, Draft(tokens_BM, jnp.ones(tokens_BM.shape, bool))


def _follower(params: Any, committed: Committed) -> Callable[[Array], Array]:
    """Returns the map from tokens to the ones that shall follow, `[B]` to `[B]`."""
    if "bigram_V" in params:
        return lambda token_B: params["bigram_V"][token_B]
    tokens_BS = committed.tokens_BS
    index_S = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)
    before_BS = index_S < committed.length_B[:, None] - 1

    def last_seen(token_B: Array) -> Array:
        seen_BS = before_BS & (tokens_BS == token_B[:, None])
        at_B1 = jnp.max(jnp.where(seen_BS, index_S, -1), axis=1, keepdims=True)
        next_B1 = jnp.take_along_axis(tokens_BS, at_B1 + 1, axis=1)
        return jnp.where(at_B1 < 0, token_B[:, None], next_B1)[:, 0]

    return last_seen


def greedy_bigrams(table: TrigramTable) -> Array:
    """Returns the likeliest token after each, int32 `[V]`; of all tokens if unknown."""
    best_V1 = jnp.argmax(table.bigram_prob_VR, axis=1)[:, None]
    next_V = jnp.take_along_axis(table.bigram_next_VR, best_V1, axis=1)[:, 0]
    likeliest = jnp.maximum(table.unigram_next_R[0], 0)
    return jnp.where(next_V < 0, likeliest, next_V).astype(jnp.int32)


def max_gram_reference(
    tokens: Sequence[int],
    *,
    length: int,
    max_ngram: int,
    min_ngram: int = 1,
    bigram_V: Any = None,
) -> list[int]:
    """Drafts one row's chain in plain Python; the oracle of `MaxGram`."""
    copied, matched = match_continuation_reference(
        tokens, length=length, max_ngram=max_ngram, min_ngram=min_ngram
    )
    if matched:
        return copied
    chain = [tokens[-1]]
    for _ in range(length):
        if bigram_V is not None:
            chain.append(int(np.asarray(bigram_V)[chain[-1]]))
            continue
        known = [b for a, b in itertools.pairwise(tokens) if a == chain[-1]]
        chain.append(known[-1] if known else chain[-1])
    return chain[1:]

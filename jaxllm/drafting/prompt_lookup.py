"""Prompt lookup: what followed the last tokens earlier in the row follows again.

Letters: B rows, S slots, M draft nodes, L drafted tokens, W draft width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Params

__all__ = [
    "PromptLookup",
    "match_continuation",
    "match_continuation_reference",
    "match_continuations",
    "match_continuations_reference",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """Copies what followed the longest match of the last tokens; needs no parameters.

    Attributes:
      length: Tokens drafted in a step.
      max_ngram: Longest suffix of the row that is looked for.
      min_ngram: Shortest; a row without such a match drafts nothing.
      branch: W, different continuations of a draft. One is a chain; several are a tree,
        in which continuations that begin alike share nodes.
      lean: Whether a step in which no row has a match costs one query row instead of M;
        then the sums of such a step differ in their last bits.

    Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding).

    Differs from the source: the longest match wins and of equal ones the most recent;
      a copy that reaches the end of the text goes on with its own beginning.
    """

    length: int = 7
    max_ngram: int = 4
    min_ngram: int = 1
    branch: int = 1
    lean: bool = True

    def __post_init__(self) -> None:
        if self.length < 1 or self.branch < 1:
            raise ConfigError(
                f"cannot draft: prompt_lookup has length {self.length} and branch "
                f"{self.branch}, expected both to be 1 or more. Correct them."
            )
        check_ngrams("prompt_lookup", self.min_ngram, self.max_ngram)

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, the pending token and all continuations."""
        return self.length * self.branch + 1

    @property
    def depth(self) -> int:  # type: ignore[override]
        """The length."""
        return self.length

    @property
    def tree(self) -> bool:  # type: ignore[override]
        """Whether there are several continuations."""
        return self.branch > 1

    def propose(
        self, params: Params, state: Any, committed: Committed
    ) -> tuple[Any, Draft]:
        """Returns the pending token and what followed its like."""
        tokens_BWL, matched_BW = match_continuations(
            committed.tokens_BS,
            committed.length_B,
            length=self.length,
            max_ngram=self.max_ngram,
            min_ngram=self.min_ngram,
            branch=self.branch,
        )
        if self.branch > 1:
            return state, merge_chains(committed.pending_B, tokens_BWL, matched_BW > 0)
        tokens_BM = jnp.concatenate(
            [committed.pending_B[:, None], tokens_BWL[:, 0]], axis=1
        )
        root_M = jnp.arange(self.nodes) == 0
        return state, Draft(tokens_BM, root_M | (matched_BW > 0))


def check_ngrams(name: str, min_ngram: int, max_ngram: int) -> None:
    """Raises `ConfigError` unless `1 <= min_ngram <= max_ngram`."""
    if not 1 <= min_ngram <= max_ngram:
        raise ConfigError(
            f"cannot draft: {name} has min_ngram {min_ngram} and max_ngram "
            f"{max_ngram}, expected 1 <= min_ngram <= max_ngram. Correct them."
        )


def match_continuation(
    tokens_BS: Array,
    length_B: Array,
    *,
    length: int,
    max_ngram: int,
    min_ngram: int = 1,
) -> tuple[Array, Array]:
    """Finds what followed the best match of each row's last tokens.

    Args:
      tokens_BS: int32, left aligned; what stands from `length_B` on is not looked at.
      length_B: int32 known tokens, 1 or more.
      length: L, tokens wanted. Past the end of the row they repeat from the first
        token after the match on, as in a text of that period.
      max_ngram: Longest suffix compared; a longer match counts as this long.
      min_ngram: Shortest match that counts.

    Returns:
      int32 tokens `[B, L]` (meaningless in a row without a match), and int32 `[B]`,
      the tokens that matched; 0 without a match. The longest match wins, of equally
      long ones the most recent.
    """
    tokens_BWL, matched_BW = match_continuations(
        tokens_BS, length_B, length=length, max_ngram=max_ngram, min_ngram=min_ngram
    )
    return tokens_BWL[:, 0], matched_BW[:, 0]


def match_continuations(
    tokens_BS: Array,
    length_B: Array,
    *,
    length: int,
    max_ngram: int,
    min_ngram: int = 1,
    branch: int = 1,
) -> tuple[Array, Array]:
    """Finds the W best different continuations; as `match_continuation` otherwise.

    Returns:
      int32 `[B, W, L]` and `[B, W]`, the best match first; matched 0 where there are
      not so many.
    """
    slots = tokens_BS.shape[1]
    last_B1 = length_B[:, None] - 1
    index_S = jnp.arange(slots, dtype=jnp.int32)
    matched_BS = _match_lengths(tokens_BS, last_B1, max_ngram)
    # Longest first, then latest: one number ranks both.
    rank_BS = jnp.where(matched_BS >= min_ngram, matched_BS * slots + index_S, -1)
    step_L = jnp.arange(length, dtype=jnp.int32)

    def follow(match_BX: Array) -> Array:
        """Returns what follows matches that end at given slots, `[B, X, L]`."""
        period_BX1 = jnp.maximum(last_B1 - match_BX, 1)[..., None]
        slot_BXL = match_BX[..., None] + 1 + step_L % period_BX1
        flat_BN = jnp.clip(slot_BXL, 0, slots - 1).reshape(slot_BXL.shape[0], -1)
        return jnp.take_along_axis(tokens_BS, flat_BN, axis=1).reshape(slot_BXL.shape)

    tokens, matched = [], []
    everywhere_BSL = None
    for found in range(branch):
        best_B1 = jnp.max(rank_BS, axis=1, keepdims=True)
        tokens_B1L = follow(best_B1 % slots)
        tokens.append(tokens_B1L)
        matched.append(jnp.where(best_B1 >= 0, best_B1 // slots, 0))
        if found + 1 < branch:
            if everywhere_BSL is None:
                everywhere_BSL = follow(jnp.broadcast_to(index_S, rank_BS.shape))
            same_BS = (everywhere_BSL == tokens_B1L).all(axis=-1)
            rank_BS = jnp.where(same_BS, -1, rank_BS)
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(matched, axis=1)


def _match_lengths(tokens_BS: Array, last_B1: Array, max_ngram: int) -> Array:
    """Returns for every slot how many tokens up to it equal the row's last ones."""
    slots = tokens_BS.shape[1]
    back_N = jnp.arange(max_ngram, dtype=jnp.int32)
    suffix_BN = jnp.take_along_axis(tokens_BS, jnp.maximum(last_B1 - back_N, 0), axis=1)
    # No token is -1, so nothing matches before the first slot.
    padded = jnp.pad(tokens_BS, ((0, 0), (max_ngram, 0)), constant_values=-1)
    going_BS = jnp.arange(slots, dtype=jnp.int32) < last_B1
    matched_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
    for back in range(max_ngram):
        earlier_BS = padded[:, max_ngram - back : max_ngram - back + slots]
        going_BS &= earlier_BS == suffix_BN[:, back : back + 1]
        matched_BS += going_BS
    return matched_BS


def merge_chains(pending_B: Array, tokens_BWL: Array, valid_BW: Array) -> Draft:
    """Returns chains below the pending token as a tree without equal siblings.

    Args:
      pending_B: int32 tokens of node 0.
      tokens_BWL: int32 chains.
      valid_BW: Which of them count; those that do stand before the others.

    Returns:
      The tree; node `1 + w * L + l` is token l of chain w, invalid where an earlier
      chain begins with the same l + 1 tokens.
    """
    rows, width, length = tokens_BWL.shape
    equal = tokens_BWL[:, :, None] == tokens_BWL[:, None]
    alike_BWWL = jnp.cumprod(equal.astype(jnp.int32), axis=-1)
    # The first chain with the same beginning holds the node; every chain has itself.
    holder_BWL = jnp.argmax(alike_BWWL, axis=2).astype(jnp.int32)
    own_BWL = holder_BWL == jnp.arange(width, dtype=jnp.int32)[:, None]
    node_BWL = 1 + holder_BWL * length + jnp.arange(length, dtype=jnp.int32)
    root_BW1 = jnp.zeros((rows, width, 1), jnp.int32)
    parents_BWL = jnp.concatenate([root_BW1, node_BWL[:, :, :-1]], axis=-1)

    def whole(root_B: Array, x_BWL: Array) -> Array:
        return jnp.concatenate([root_B[:, None], x_BWL.reshape(rows, -1)], axis=1)

    return Draft(
        whole(pending_B, tokens_BWL),
        whole(jnp.ones((rows,), bool), own_BWL & valid_BW[..., None]),
        whole(jnp.full((rows,), -1, jnp.int32), parents_BWL),
    )


def match_continuation_reference(
    tokens: Sequence[int], *, length: int, max_ngram: int, min_ngram: int = 1
) -> tuple[list[int], int]:
    """Searches one row's known tokens in plain Python; oracle of the search.

    Returns:
      The continuation and the tokens that matched; `([], 0)` without a match.
    """
    found = match_continuations_reference(
        tokens, length=length, max_ngram=max_ngram, min_ngram=min_ngram
    )
    return found[0] if found else ([], 0)


def match_continuations_reference(
    tokens: Sequence[int],
    *,
    length: int,
    max_ngram: int,
    min_ngram: int = 1,
    branch: int = 1,
) -> list[tuple[list[int], int]]:
    """Searches for the W best; as `match_continuation_reference` otherwise."""
    ends = []
    for end in range(1, len(tokens)):
        for n in range(min(max_ngram, end), min_ngram - 1, -1):
            if list(tokens[end - n : end]) == list(tokens[-n:]):
                ends.append((n, end))
                break
    found: list[tuple[list[int], int]] = []
    for n, end in sorted(ends, reverse=True):
        text = list(tokens[end:])
        while len(text) < length:
            text += tokens[end:]
        if len(found) < branch and text[:length] not in [t for t, _ in found]:
            found.append((text[:length], n))
    return found

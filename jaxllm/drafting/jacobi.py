"""Jacobi decoding: the model's own previous iterate is the draft.

Letters: B rows, S slots, M draft nodes, G guesses (M - 1), X tokens of a stretch.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Params, Verdict
from jaxllm.decoding.sampling import FILL_STREAM, stream_keys
from jaxllm.drafting.prompt_lookup import match_continuation
from jaxllm.models.freeze import Forward

__all__ = ["Jacobi", "JacobiState", "context_fillers"]

# Longest suffix that an n-gram filler looks up.
_MAX_NGRAM = 4


@pytree_dataclass
class JacobiState:
    """The current iterate.

    Attributes:
      guess_BG: int32 guesses of the tokens behind the pending one.
      length_B: int32 length of the row that they stand behind.
      left_B: int32, how many of them belong to the current block.
    """

    guess_BG: Array
    length_B: Array
    left_B: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jacobi(Drafter):
    """Iterates the model on a block of guesses; what stands still is right.

    The target's choices after the guesses are the next guesses, so a pass costs nothing
    beside its width, and every pass yields at least one token. With window 1 it is
    plain decoding. Sampling needs nothing of its own: a position's noise is fixed, so
    the iterated map is as deterministic as the greedy one.

    Attributes:
      window: n, nodes of the draft: the pending token and n - 1 guesses.
      mode: `slide` keeps n - 1 guesses at any time; `block` finishes a block of n
        tokens before it starts the next one, as the paper does.
      fill: Where fresh guesses come from: `context` draws tokens of the row at random;
        `ngram` copies what followed the last tokens earlier in the row, if anything.

    Source: Accelerating Transformer Inference for Translation via Parallel Decoding
      (arXiv 2305.10427), algorithm 2; CLLMs (arXiv 2403.00835), section 3.1.

    Differs from the paper: `slide` is ours; a finished block is followed at once by the
      next, without a pass that only confirms it.
    """

    window: int = 16
    mode: Literal["slide", "block"] = "slide"
    fill: Literal["context", "ngram"] = "context"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(
                f"cannot draft: jacobi.window is {self.window}, expected 1 or more. "
                f"Correct it."
            )

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, the window."""
        return self.window

    @property
    def depth(self) -> int:  # type: ignore[override]
        """G, the guesses."""
        return self.window - 1

    def init(
        self, params: Params, committed: Committed, prefill: Forward
    ) -> JacobiState:
        """Starts a block of fresh guesses."""
        return self._fresh(committed)

    def propose(
        self, params: Params, state: JacobiState, committed: Committed
    ) -> tuple[JacobiState, Draft]:
        """Returns the pending token and the guesses."""
        # A combinator may have moved on without telling.
        state = self._move(state, committed, state.guess_BG)
        tokens_BM = jnp.concatenate(
            [committed.pending_B[:, None], state.guess_BG], axis=1
        )
        valid_BM = jnp.arange(self.window) <= state.left_B[:, None]
        return state, Draft(tokens_BM, valid_BM)

    def observe(
        self,
        params: Params,
        state: JacobiState,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> JacobiState:
        """Takes the target's choices as the next iterate."""
        # What was not tested, in a draft that was cut short say, stays as it is.
        chosen_BM = _fit(verdict.chosen_BM, self.window)
        tested_BM = _fit(draft.valid_BM, self.window)
        kept_BM = _fit(state.guess_BG, self.window)
        iterate_BM = jnp.where(tested_BM, chosen_BM, kept_BM)
        return self._move(state, committed, iterate_BM)

    def _fresh(self, committed: Committed) -> JacobiState:
        """Returns a block of fillers behind what is committed."""
        none_BX = committed.tokens_BS[:, :0]
        guess_BG = self._behind(committed, none_BX, committed.length_B)
        left_B = jnp.full_like(committed.length_B, self.depth)
        return JacobiState(guess_BG, committed.length_B, left_B)

    def _move(
        self, state: JacobiState, committed: Committed, iterate_BX: Array
    ) -> JacobiState:
        """Returns the state behind what is committed now.

        Args:
          state: Of before.
          committed: What is known now.
          iterate_BX: int32 tokens of the positions from the state's length on.
        """
        guess_BG = self._behind(committed, iterate_BX, state.length_B)
        if self.mode == "slide":
            return JacobiState(guess_BG, committed.length_B, state.left_B)
        left_B = state.left_B - (committed.length_B - state.length_B)
        over_B, fresh = left_B <= 0, self._fresh(committed)
        return JacobiState(
            jnp.where(over_B[:, None], fresh.guess_BG, guess_BG),
            committed.length_B,
            jnp.where(over_B, fresh.left_B, left_B),
        )

    def _behind(self, committed: Committed, known_BX: Array, start_B: Array) -> Array:
        """Returns G guesses: a known stretch as far as it goes, then fillers.

        Args:
          committed: What the guesses stand behind.
          known_BX: int32 tokens.
          start_B: int32 position of the first of them.
        """
        index_G = jnp.arange(self.depth, dtype=jnp.int32)
        position_BG = committed.length_B[:, None] + index_G
        count = known_BX.shape[1]
        at_BG = position_BG - start_B[:, None]
        if count == 0 or self.depth == 0:
            known_BG = jnp.zeros_like(at_BG)
        else:
            at = jnp.clip(at_BG, 0, count - 1)
            known_BG = jnp.take_along_axis(known_BX, at, axis=1)
        stands_BG = (at_BG >= 0) & (at_BG < count)
        kept_B = jnp.cumprod(stands_BG.astype(jnp.int32), axis=1).sum(axis=1)
        fresh_BG = self.fillers(committed, known_BG, kept_B)
        return jnp.where(index_G < kept_B[:, None], known_BG, fresh_BG)

    def fillers(self, committed: Committed, known_BG: Array, kept_B: Array) -> Array:
        """Returns fresh guesses for all G positions.

        Args:
          committed: What the guesses stand behind.
          known_BG: int32 guesses.
          kept_B: int32, how many of them stand; the others will be replaced.
        """
        index_G = jnp.arange(self.depth, dtype=jnp.int32)
        position_BG = committed.length_B[:, None] + index_G
        random_BG = context_fillers(committed, position_BG)
        if self.fill == "context" or self.depth == 0:
            return random_BG
        virtual = committed.extend(known_BG, kept_B)
        found_BG, match_B = match_continuation(
            virtual.tokens_BS,
            virtual.length_B,
            length=self.depth,
            max_ngram=_MAX_NGRAM,
        )
        # Filler i of the result stands at guess kept + i.
        at_BG = jnp.clip(index_G - kept_B[:, None], 0, self.depth - 1)
        found_BG = jnp.take_along_axis(found_BG, at_BG, axis=1)
        return jnp.where(match_B[:, None] > 0, found_BG, random_BG)


def _fit(x_BX: Array, width: int) -> Array:
    """Cuts or pads to a width."""
    return jnp.pad(x_BX[:, :width], ((0, 0), (0, max(0, width - x_BX.shape[1]))))


def context_fillers(committed: Committed, position_BX: Array) -> Array:
    """Draws tokens of the row, each determined by the row's key and a position.

    Args:
      committed: The rows.
      position_BX: int32 positions to be filled.

    Returns:
      int32 `[B, X]`.
    """
    slots = committed.tokens_BS.shape[1]
    length_B = jnp.clip(committed.length_B, 1, slots).astype(jnp.uint32)
    key_B = stream_keys(committed.row_key_B, FILL_STREAM)

    def pick(key: Array, position: Array, length: Array) -> Array:
        bits = jax.random.bits(jax.random.fold_in(key, position), (), jnp.uint32)
        return (bits % length).astype(jnp.int32)

    at_BX = jax.vmap(jax.vmap(pick, (None, 0, None)))(key_B, position_BX, length_B)
    return jnp.take_along_axis(committed.tokens_BS, at_BX, axis=1)

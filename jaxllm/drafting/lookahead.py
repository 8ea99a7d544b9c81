"""Lookahead decoding: a Jacobi window writes n-grams, and the fitting ones are drafts.

Letters: B rows, M draft nodes, W columns of the window, L levels of it (n - 1), G
n-grams of a first token, H slots of the pool.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.bound import MEMORY
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Params, Verdict
from jaxllm.drafting.jacobi import context_fillers
from jaxllm.drafting.prompt_lookup import merge_chains
from jaxllm.models.freeze import Forward

__all__ = ["Lookahead", "LookaheadState", "Pool"]


@pytree_dataclass
class Pool:
    """N-grams that the target has written, of each row.

    Attributes:
      key_BH: int32 first token of the n-grams in a slot, -1 where there is none. A
        token's slot is its id modulo H; a newcomer drives another token out.
      gram_BHGL: int32 tokens behind the first.
      count_BH: int32, how many were written; the newest G are there.
    """

    key_BH: Array
    gram_BHGL: Array
    count_BH: Array

    def find(self, token_B: Array) -> tuple[Array, Array]:
        """Returns the n-grams behind a token, newest first.

        Returns:
          int32 `[B, G, L]`, and which of them there are, `[B, G]`.
        """
        key_B, gram_BGL, count_B = self._slot(token_B)
        G = gram_BGL.shape[1]
        age_BG = jnp.broadcast_to(jnp.arange(G), gram_BGL.shape[:2])
        at_BG = (count_B[:, None] - 1 - age_BG) % G
        found_BGL = jnp.take_along_axis(gram_BGL, at_BG[..., None], axis=1)
        there_BG = (age_BG < count_B[:, None]) & (key_B == token_B)[:, None]
        return found_BGL, there_BG

    def add(self, token_B: Array, gram_BL: Array, new_B: Array) -> "Pool":
        """Writes an n-gram of each row, over the oldest; one that is there stays.

        Args:
          token_B: int32 first tokens.
          gram_BL: int32 tokens behind them.
          new_B: Which rows write.
        """
        key_B, gram_BGL, count_B = self._slot(token_B)
        H, G = self.key_BH.shape[1], gram_BGL.shape[1]
        count_B = jnp.where(key_B == token_B, count_B, 0)
        there_BG = jnp.arange(G) < count_B[:, None]
        there_BG &= (gram_BGL == gram_BL[:, None]).all(axis=-1)
        new_B = new_B & ~there_BG.any(axis=1)
        row_B = jnp.arange(token_B.shape[0])
        slot_B = jnp.where(new_B, token_B % H, H)
        return Pool(
            self.key_BH.at[row_B, slot_B].set(token_B, mode="drop"),
            self.gram_BHGL.at[row_B, slot_B, count_B % G].set(gram_BL, mode="drop"),
            self.count_BH.at[row_B, slot_B].set(count_B + 1, mode="drop"),
        )

    def _slot(self, token_B: Array) -> tuple[Array, Array, Array]:
        row_B = jnp.arange(token_B.shape[0])
        slot_B = token_B % self.key_BH.shape[1]
        return (
            self.key_BH[row_B, slot_B],
            self.gram_BHGL[row_B, slot_B],
            self.count_BH[row_B, slot_B],
        )


@pytree_dataclass
class LookaheadState:
    """The window and the pool.

    Attributes:
      window_BWL: int32; the token at level l of column i stands i + l + 1 behind the
        pending one.
      age_BW: int32, how many levels of a column the target has written.
      length_B: int32 length of the rows that the window stands behind.
      pool: The n-grams.
    """

    window_BWL: Array
    age_BW: Array
    length_B: Array
    pool: Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookahead(Drafter):
    """Drafts n-grams that the target wrote itself, in a window ahead of the text.

    The draft is one tree. The pooled n-grams that begin with the pending token are
    branches below it, equal beginnings shared. The window hangs there too: its first
    level is a chain, and each column another chain below its first token. The
    target's choice at the end of a column completes an n-gram, which goes into the
    pool, and becomes the column's last level while the first one is dropped.

    Attributes:
      window: W, columns; the paper's W.
      ngram: n, tokens of an n-gram, 2 or more; the paper's N.
      pool: G, n-grams that are kept of each first token; the paper's G.
      slots: H, first tokens that the pool holds, of each row.

    The pool starts empty unless a memory was loaded. Each row has its own, so that
    its drafts do not depend on its batch; the memory keeps of every slot that row's
    n-grams which wrote most. A step that runs a part of the tree teaches nothing: let
    `adaptive` choose between 1 and the whole width.

    Source: Break the Sequential Dependency of LLM Inference Using Lookahead Decoding
      (arXiv 2402.02057), section 3.

    Differs from the paper: any node may be accepted, the window's too, so no mask of
      its own is needed; when several tokens are accepted the columns move along; all
      levels start at once, and a column writes n-grams as soon as all tokens but the
      first are the target's.
    """

    window: int = 5
    ngram: int = 4
    pool: int = 7
    slots: int = 512
    tree = True

    def __post_init__(self) -> None:
        least = {"window": 1, "ngram": 2, "pool": 1, "slots": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                raise ConfigError(
                    f"cannot draft: lookahead.{name} is {value}, expected {low} or "
                    f"more. Correct it."
                )

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, the pending token, the pooled n-grams and the window."""
        return 1 + (self.pool + self.window) * self.levels

    @property
    def depth(self) -> int:  # type: ignore[override]
        """A whole n-gram, or the window's first level to its end."""
        return max(self.levels, self.window)

    @property
    def levels(self) -> int:
        """L."""
        return self.ngram - 1

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Starts with an empty memory."""
        first_H = jnp.zeros((self.slots,), jnp.int32)
        return self, {MEMORY: _pool_of(self._empty_pool(1), first_H)}

    def init(
        self, params: Params, committed: Committed, prefill: Forward
    ) -> LookaheadState:
        """Starts every row with the memory and a window of the prompt's tokens."""
        rows = committed.length_B.shape[0]
        pool = self._empty_pool(rows)
        if MEMORY in params["drafter"]:
            known = params["drafter"][MEMORY]
            spread = {
                name: jnp.broadcast_to(x, (rows, *x.shape)) for name, x in known.items()
            }
            pool = Pool(spread["key"], spread["gram"], spread["count"])
        return LookaheadState(
            window_BWL=self._fillers(committed),
            age_BW=jnp.zeros((rows, self.window), jnp.int32),
            length_B=committed.length_B,
            pool=pool,
        )

    def propose(
        self, params: Params, state: LookaheadState, committed: Committed
    ) -> tuple[LookaheadState, Draft]:
        """Returns the tree of fitting n-grams and the window."""
        unseen_B = jnp.zeros_like(committed.length_B, bool)
        state = self._move(state, committed, state.window_BWL, unseen_B)
        gram_BGL, there_BG = state.pool.find(committed.pending_B)
        pooled = merge_chains(committed.pending_B, gram_BGL, there_BG)
        assert pooled.parents_BM is not None
        tokens_BX = state.window_BWL.reshape(state.window_BWL.shape[0], -1)
        parents_BX = jnp.broadcast_to(self._window_parents(), tokens_BX.shape)
        return state, Draft(
            jnp.concatenate([pooled.tokens_BM, tokens_BX], axis=1),
            jnp.concatenate([pooled.valid_BM, jnp.ones_like(tokens_BX, bool)], axis=1),
            jnp.concatenate([pooled.parents_BM, parents_BX], axis=1).astype(jnp.int32),
        )

    def _window_parents(self) -> np.ndarray:
        """Returns the parents of the window's nodes, column after column."""
        first = 1 + self.pool * self.levels
        parents = first - 1 + np.arange(self.window * self.levels)
        heads = np.arange(self.window) * self.levels
        parents[heads] = first + heads - self.levels
        parents[0] = 0
        return parents

    def observe(
        self,
        params: Params,
        state: LookaheadState,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> LookaheadState:
        """Pools the n-grams that columns complete, and moves the window."""
        first = 1 + self.pool * self.levels
        shape = state.window_BWL.shape
        # A step may show somebody else's draft, or a part of this one.
        same_BWL = draft.tokens_BM[:, first:].reshape(shape) == state.window_BWL
        same_BWL &= draft.valid_BM[:, first:].reshape(shape)
        seen_BW = same_BWL.all(axis=2)
        seen_B = seen_BW.all(axis=1)
        chosen_BW = verdict.chosen_BM[:, first:].reshape(shape)[..., -1]
        window_BWL = state.window_BWL
        next_BWL = jnp.concatenate([window_BWL[..., 1:], chosen_BW[..., None]], axis=2)
        pool = state.pool
        for i in range(self.window):
            # Its first token may be a filler: what follows is the target's anyway.
            whole_B = state.age_BW[:, i] >= self.levels - 1
            pool = pool.add(window_BWL[:, i, 0], next_BWL[:, i], seen_B & whole_B)
        window_BWL = jnp.where(seen_B[:, None, None], next_BWL, window_BWL)
        age_BW = state.age_BW + seen_B[:, None]
        state = dataclasses.replace(state, age_BW=age_BW, pool=pool)
        return self._move(state, committed, window_BWL, seen_B)

    def _move(
        self,
        state: LookaheadState,
        committed: Committed,
        window_BWL: Array,
        risen_B: Array,
    ) -> LookaheadState:
        """Returns the state with the columns moved to where they stand now.

        Args:
          state: Of before.
          committed: What is known now.
          window_BWL: int32 tokens.
          risen_B: Rows whose columns have dropped a level, which is a move by one.
        """
        shift_B = committed.length_B - state.length_B - risen_B
        index_W = jnp.arange(self.window)
        at_BW = index_W + jnp.maximum(shift_B, 0)[:, None]
        stays_BW = at_BW < self.window
        at_BW = jnp.minimum(at_BW, self.window - 1)
        moved_BWL = jnp.take_along_axis(window_BWL, at_BW[..., None], axis=1)
        age_BW = jnp.take_along_axis(state.age_BW, at_BW, axis=1)
        return LookaheadState(
            jnp.where(stays_BW[..., None], moved_BWL, self._fillers(committed)),
            jnp.where(stays_BW, age_BW, 0),
            committed.length_B,
            state.pool,
        )

    def _fillers(self, committed: Committed) -> Array:
        """Returns a fresh window of the row's own tokens."""
        count = self.window * self.levels
        index_X = jnp.arange(count, dtype=jnp.int32)
        # Numbers that no other step uses.
        at_BX = committed.length_B[:, None] * count + index_X
        fresh_BX = context_fillers(committed, at_BX)
        return fresh_BX.reshape(-1, self.window, self.levels)

    def _empty_pool(self, rows: int) -> Pool:
        H, G, L = self.slots, self.pool, self.levels
        return Pool(
            jnp.full((rows, H), -1, jnp.int32),
            jnp.zeros((rows, H, G, L), jnp.int32),
            jnp.zeros((rows, H), jnp.int32),
        )

    def learned(self, params: Any, state: LookaheadState) -> Any:
        """Returns for every slot the n-grams of the row that wrote most there."""
        row_H = jnp.argmax(state.pool.count_BH, axis=0)
        return {**params, MEMORY: _pool_of(state.pool, row_H)}


def _pool_of(pool: Pool, row_H: Array) -> dict[str, Array]:
    """Returns each slot of some row."""
    slot_H = jnp.arange(row_H.shape[0])
    return {
        "key": pool.key_BH[row_H, slot_H],
        "gram": pool.gram_BHGL[row_H, slot_H],
        "count": pool.count_BH[row_H, slot_H],
    }

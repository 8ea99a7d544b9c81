"""ADED: a table of trigrams drafts trees, and learns from what the target thinks.

Letters: B rows, S slots of a row, M draft nodes, J path length, H slots of the table, R
candidates of a context, N updates of a step, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.bound import MEMORY
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Params, Verdict
from jaxllm.decoding.sampling import best
from jaxllm.drafting.ngram_counts import count_prompts
from jaxllm.drafting.ngrams import TrigramTable, empty_table, load_table, slot_of
from jaxllm.drafting.trigram_search import Beliefs, best_first, puct
from jaxllm.models.freeze import Forward

__all__ = ["Trigram", "TrigramState", "adapt", "adapt_reference"]


@pytree_dataclass
class TrigramState:
    """What the rows of a batch have learned together.

    Attributes:
      table: The table.
      length_B: int32 known tokens of each row when it was last looked at.
    """

    table: TrigramTable
    length_B: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trigram(Drafter):
    """Searches a table of trigrams for a tree, and corrects the table as it goes.

    All rows of a batch share one table. It goes on to the next batch, and can be saved
    and loaded (`BoundDrafter.save_memory`, `load_memory`).

    Attributes:
      nodes: M, nodes of a draft.
      depth: D, most proposals on one path; no more than M - 1.
      search: `best_first` takes the nodes that the table gives the best chance;
        `puct` searches as the paper does.
      iterations: Nodes that `puct` visits.
      eta: How far a step moves the table towards the target; 0 leaves it as it is.
      adapt: Whether the table learns at all.
      learn: What it learns from: the accepted `path`, or all nodes of the `tree`.
      table: File or shipped table to begin with. Without one the drafter begins with
        counts of the prompts.
      slots: H, without a file; a file brings its own.
      rank: R, without a file.
      lean: As in `PromptLookup`.

    Source: Adaptive Draft-Verification for Efficient LLM Decoding (arXiv 2407.12021).

    Differs from the paper: inspired by it, our wiring; its code is not public. The
      table is a direct map of fixed size with a backoff to bigrams, which learn too.
      `best_first` is the exact optimum of what `puct` approximates, and the default.
    """

    nodes: int = 8
    depth: int = 4
    search: Literal["best_first", "puct"] = "best_first"
    iterations: int = 32
    eta: float = 0.3
    adapt: bool = True
    learn: Literal["path", "tree"] = "path"
    table: str = ""
    slots: int = 2**14
    rank: int = 4
    lean: bool = True
    tree = True

    def __post_init__(self) -> None:
        if self.nodes < 2 or self.depth < 1 or not 0 <= self.eta <= 1:
            raise ConfigError(
                f"cannot draft: trigram has nodes {self.nodes}, depth {self.depth} and "
                f"eta {self.eta:g}, expected nodes of 2 or more, a depth of 1 or more "
                f"and an eta from 0 to 1. Correct them."
            )
        if self.search == "puct" and self.iterations < self.nodes - 1:
            raise ConfigError(
                f"cannot draft: trigram.iterations is {self.iterations}, expected at "
                f"least {self.nodes - 1}, one for each node. Correct it."
            )
        # A longer path would not fit into the nodes.
        object.__setattr__(self, "depth", min(self.depth, self.nodes - 1))

    @property
    def learns(self) -> bool:
        """Whether the table changes."""
        return self.adapt and self.eta > 0

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Loads the table; its vocabulary has to be the model's."""
        if self.table:
            return self, {MEMORY: load_table(self.table, lm.config.vocabulary)}
        return self, {MEMORY: empty_table(lm.config.vocabulary, self.slots, self.rank)}

    def init(
        self, params: Params, committed: Committed, prefill: Forward
    ) -> TrigramState:
        """Takes the table up, and without a file counts the prompts into it."""
        table = params["drafter"][MEMORY]
        if not self.table:
            table = count_prompts(table, committed.tokens_BS, committed.length_B)
        return TrigramState(table, committed.length_B)

    def propose(
        self, params: Params, state: TrigramState, committed: Committed
    ) -> tuple[TrigramState, Draft]:
        """Searches the table below the last two tokens of each row."""
        beliefs = Beliefs.of(state.table, committed, self.depth)
        u_BJ, v_BJ = contexts(committed, committed.length_B, 1)
        size = {"nodes": self.nodes, "depth": self.depth}
        if self.search == "puct":
            size["iterations"] = self.iterations
            draft = puct(beliefs, u_BJ[:, 0], v_BJ[:, 0], **size)
        else:
            draft = best_first(beliefs, u_BJ[:, 0], v_BJ[:, 0], **size)
        return dataclasses.replace(state, length_B=committed.length_B), draft

    def observe(
        self,
        params: Params,
        state: TrigramState,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> TrigramState:
        """Moves the table towards the target's probabilities."""
        table = state.table
        if self.learns:
            if self.learn == "path":
                seen = _along_path(state, committed, draft, verdict, forward)
            else:
                seen = _in_tree(state, committed, draft, forward)
            table = adapt(table, *seen, eta=self.eta)
        return TrigramState(table, committed.length_B)

    def learned(self, params: Any, state: TrigramState) -> Any:
        """Returns the parameters with the table as it is now."""
        return {**params, MEMORY: state.table}


def contexts(committed: Committed, length_B: Array, count: int) -> tuple[Array, Array]:
    """Returns the contexts of the tokens from position `length` on, `[B, count]`.

    The first ends in the last of `length_B` tokens. -1 stands before the first token.
    """
    last_BJ = length_B[:, None] - 1 + jnp.arange(count, dtype=jnp.int32)
    tokens_BJ = jnp.take_along_axis(
        committed.tokens_BS,
        jnp.concatenate([jnp.maximum(last_BJ[:, :1] - 1, 0), last_BJ], axis=1),
        axis=1,
        mode="clip",
    )
    u_BJ = jnp.where(last_BJ > 0, tokens_BJ[:, :-1], -1)
    return u_BJ, tokens_BJ[:, 1:]


def _along_path(
    state: TrigramState,
    committed: Committed,
    draft: Draft,
    verdict: Verdict,
    forward: Forward,
) -> tuple[Array, Array, Array, Array]:
    """Returns contexts, logits and validity of the nodes whose tokens are known."""
    path_BJ = verdict.path_BJ
    count = path_BJ.shape[1]
    u_BJ, v_BJ = contexts(committed, state.length_B, count)
    grown_B1 = (committed.length_B - state.length_B)[:, None]
    known_BJ = jnp.arange(count) < jnp.minimum(
        grown_B1, verdict.num_accepted_B[:, None] + 1
    )
    # In a combinator the path may have been cut down to this drafter's nodes.
    known_BJ &= jnp.take_along_axis(draft.tokens_BM, path_BJ, axis=1) == v_BJ
    logits_BJV = jnp.take_along_axis(forward.logits_BTV, path_BJ[..., None], axis=1)
    return _flat(u_BJ, v_BJ, logits_BJV, known_BJ)


def _in_tree(
    state: TrigramState, committed: Committed, draft: Draft, forward: Forward
) -> tuple[Array, Array, Array, Array]:
    """Returns contexts, logits and validity of all nodes."""
    before_B1, _ = contexts(committed, state.length_B, 1)
    v_BM = draft.tokens_BM
    if draft.parents_BM is None:
        u_BM = jnp.concatenate([before_B1, v_BM[:, :-1]], axis=1)
    else:
        up_BM = jnp.maximum(draft.parents_BM[:, 1:], 0)
        u_BM = jnp.concatenate(
            [before_B1, jnp.take_along_axis(v_BM, up_BM, axis=1)], axis=1
        )
    active_B1 = (committed.length_B > state.length_B)[:, None]
    return _flat(u_BM, v_BM, forward.logits_BTV, draft.valid_BM & active_B1)


def _flat(*arrays: Array) -> Any:
    """Joins rows and nodes to one axis, the rows in order."""
    return tuple(x.reshape(-1, *x.shape[2:]) for x in arrays)


def adapt(
    table: TrigramTable,
    u_N: Array,
    v_N: Array,
    logits_NV: Array,
    valid_N: Array,
    *,
    eta: float,
) -> TrigramTable:
    """Moves contexts towards what the target thinks of them, one after the other.

    A candidate's probability becomes `(1 - eta) prob + eta p`. If the target's
    likeliest token is no candidate, it replaces the least likely one, with `eta p`. A
    context that the table lacks takes its slot, without candidates. The bigram of the
    second token learns in the same way.

    Args:
      table: The table.
      u_N: int32 first tokens of contexts; nothing is learned about a trigram from -1.
      v_N: int32 second tokens.
      logits_NV: float32 logits of the target behind each context.
      valid_N: Which updates count; those with logits that are not finite do not.
      eta: From 0 to 1.

    Returns:
      The table; updates of one slot follow one another in the order given.

    Source: Adaptive Draft-Verification (arXiv 2407.12021), the adaptive update.
    """
    total_N = jax.nn.logsumexp(logits_NV, axis=-1)
    V, top_N = logits_NV.shape[-1], best(logits_NV)
    valid_N &= jnp.isfinite(total_N)
    slot_N = jnp.where(
        valid_N & (u_N >= 0), slot_of(u_N, v_N, table.slots), table.slots
    )
    row_N = jnp.where(valid_N, v_N, V)
    turns = _turns(slot_N, table.slots), _turns(row_N, V)
    last = jnp.maximum(turns[0].max(), turns[1].max())

    p_top_N = jnp.exp(logits_NV.max(axis=-1) - total_N)
    blend = functools.partial(_blend, logits_NV, total_N, (top_N, p_top_N), eta)

    def turn(carry: Any) -> Any:
        """Does the updates that have as many before them in their slot."""
        now, table = carry
        at_N = jnp.where(turns[0] == now, slot_N, table.slots)
        key_N2 = jnp.stack([u_N, v_N], axis=1)
        found_N2 = table.key_H2[slot_N]
        hit_N1 = (found_N2 == key_N2).all(axis=1)[:, None]
        three = blend(
            jnp.where(hit_N1, table.next_HR[slot_N], -1),
            jnp.where(hit_N1, table.prob_HR[slot_N], 0.0),
        )
        of_N = jnp.where(turns[1] == now, row_N, V)
        two = blend(table.bigram_next_VR[row_N], table.bigram_prob_VR[row_N])
        return now + 1, dataclasses.replace(
            table,
            # Written through what was read: a write that does not follow the reads
            # would be made on a copy of the table.
            key_H2=table.key_H2.at[at_N].set(
                jnp.where(hit_N1, found_N2, key_N2), mode="drop"
            ),
            next_HR=table.next_HR.at[at_N].set(three[0], mode="drop"),
            prob_HR=table.prob_HR.at[at_N].set(three[1], mode="drop"),
            bigram_next_VR=table.bigram_next_VR.at[of_N].set(two[0], mode="drop"),
            bigram_prob_VR=table.bigram_prob_VR.at[of_N].set(two[1], mode="drop"),
        )

    carry = (jnp.int32(0), table)
    return jax.lax.while_loop(lambda carry: carry[0] <= last, turn, carry)[1]


def _blend(
    logits_NV: Array,
    total_N: Array,
    top: tuple[Array, Array],
    eta: float,
    next_NR: Array,
    prob_NR: Array,
) -> tuple[Array, Array]:
    """Returns candidates and probabilities after an update of each.

    Args:
      logits_NV: float32 logits of the target.
      total_N: Their log-sum-exp.
      top: Its likeliest tokens and their probabilities, `[N]`.
      eta: As for `adapt`.
      next_NR: The candidates, -1 where there is none.
      prob_NR: Their probabilities.
    """
    top_N1, p_top_N1 = (x[:, None] for x in top)
    listed_NR = next_NR >= 0
    logit_NR = jnp.take_along_axis(logits_NV, next_NR, axis=1, mode="clip")
    p_NR = jnp.exp(logit_NR - total_N[:, None])
    prob_NR = jnp.where(listed_NR, (1 - eta) * prob_NR + eta * p_NR, 0.0)
    least_N1 = jnp.argmin(jnp.where(listed_NR, prob_NR, -1.0), axis=1)[:, None]
    absent_N1 = (next_NR != top_N1).all(axis=1)[:, None]
    new_NR = absent_N1 & (jnp.arange(next_NR.shape[1]) == least_N1)
    return (
        jnp.where(new_NR, top_N1, next_NR),
        jnp.where(new_NR, eta * p_top_N1, prob_NR),
    )


def _turns(slot_N: Array, none: int) -> Array:
    """Returns how many updates of the same slot come before each; -1 for no update."""
    index_N = jnp.arange(slot_N.shape[0])
    same_NN = (slot_N[:, None] == slot_N) & (index_N[:, None] > index_N)
    return jnp.where(slot_N == none, -1, same_NN.sum(axis=1, dtype=jnp.int32))


def adapt_reference(
    table: TrigramTable,
    contexts: Sequence[tuple[int, int]],
    logits_NV: Any,
    *,
    eta: float,
) -> TrigramTable:
    """Updates a table in numpy, one context after the other; the oracle of `adapt`.

    Args:
      table: The table.
      contexts: Pairs (u, v).
      logits_NV: float32 logits behind them.
      eta: From 0 to 1.
    """
    out = jax.tree.map(np.array, table)

    def blend(next_R: Any, prob_R: Any, p_V: Any) -> None:
        listed_R = next_R >= 0
        prob_R[listed_R] = (1 - eta) * prob_R[listed_R] + eta * p_V[next_R[listed_R]]
        top = int(np.argmax(p_V))
        if top not in next_R.tolist():
            least = int(np.argmin(np.where(listed_R, prob_R, -1)))
            next_R[least], prob_R[least] = top, eta * p_V[top]

    for (u, v), logits_V in zip(contexts, np.asarray(logits_NV), strict=True):
        p_V = np.exp(logits_V - logits_V.max())
        p_V = p_V / p_V.sum()
        slot = int(slot_of(np.asarray([u]), np.asarray([v]), table.slots)[0])
        if u >= 0:
            if out.key_H2[slot].tolist() != [u, v]:
                out.key_H2[slot] = (u, v)
                out.next_HR[slot], out.prob_HR[slot] = -1, 0
            blend(out.next_HR[slot], out.prob_HR[slot], p_V)
        blend(out.bigram_next_VR[v], out.bigram_prob_VR[v], p_V)
    return out

"""What a drafter, a verifier and the engine say to each other.

Everything that emits tokens is a drafter under one verifier. Node 0 of every draft is
the *pending* token: the last known one, whose keys and values are not in the cache yet.

Letters: B rows, S slots, M draft nodes, V vocabulary, J path length (depth + 1).
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from jaxllm.attention.masks import CAUSAL, Mask, ancestor, ancestors_of
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.sampling import Sampler, make_sampler
from jaxllm.models.freeze import Forward

__all__ = ["Committed", "Counts", "Draft", "Drafter", "Verdict", "join_counts"]

Params = dict[str, Any]

Counts = dict[str, Array]
"""What inner models did since the start, by level: int32 `[B, 2]`, their forwards and
the tokens that these ran for the row."""


def join_counts(*parts: Counts) -> Counts:
    """Adds the counts of several drafters."""
    joined: Counts = {}
    for part in parts:
        for level, count_B2 in part.items():
            joined[level] = joined[level] + count_B2 if level in joined else count_B2
    return joined


@pytree_dataclass
class Committed:
    """What is known for good.

    Attributes:
      tokens_BS: int32 prompt and output, left aligned; garbage from `length_B` on.
      length_B: int32 known tokens, the pending one included.
      row_key_B: Typed key of each row.
      sampler: How the rows choose; greedily when None.
      prompt_B: int32 tokens of the prompt; none when None.
    """

    tokens_BS: Array
    length_B: Array
    row_key_B: Array
    sampler: Sampler | None = None
    prompt_B: Array | None = None

    @property
    def pending_B(self) -> Array:
        """The last known token of each row."""
        at = jnp.maximum(self.length_B - 1, 0)[:, None]
        return jnp.take_along_axis(self.tokens_BS, at, axis=1)[:, 0]

    @property
    def choice(self) -> Sampler:
        """How the rows choose."""
        if self.sampler is None:
            return make_sampler(self.length_B.shape[0])
        return self.sampler

    def extend(self, tokens_BJ: Array, count_B: Array) -> "Committed":
        """Returns the rows grown by tokens; a combinator hands them to its parts.

        Args:
          tokens_BJ: int32 tokens behind the last known one.
          count_B: int32, how many of them each row takes. What would stand past the
            last slot is dropped.
        """
        rows, slots = self.tokens_BS.shape
        index_J = jnp.arange(tokens_BJ.shape[1])
        slot_BJ = self.length_B[:, None] + index_J
        slot_BJ = jnp.where(index_J < count_B[:, None], slot_BJ, slots)
        row_B1 = jnp.arange(rows)[:, None]
        return dataclasses.replace(
            self,
            tokens_BS=self.tokens_BS.at[row_B1, slot_BJ].set(tokens_BJ, mode="drop"),
            length_B=self.length_B + count_B,
        )


@pytree_dataclass
class Draft:
    """A proposal: a chain or a tree whose root is the pending token.

    Attributes:
      tokens_BM: int32; node 0 is the pending token.
      valid_BM: Which nodes are proposals; node 0 always is. A child of an invalid node
        is invalid.
      parents_BM: int32, -1 for node 0, else smaller than the node's own index. None for
        a chain: node i's parent is i - 1.
      log_q_BMV: Log-probabilities that the nodes were drawn from, for rejection only.
    """

    tokens_BM: Array
    valid_BM: Array
    parents_BM: Array | None = None
    log_q_BMV: Array | None = None

    @property
    def depth_BM(self) -> Array:
        """int32 distance of each node from node 0."""
        nodes = self.tokens_BM.shape[1]
        if self.parents_BM is None:
            index = jnp.arange(nodes, dtype=jnp.int32)
            return jnp.broadcast_to(index, self.tokens_BM.shape)
        depth = [jnp.zeros_like(self.parents_BM[:, 0])]
        for node in range(1, nodes):
            so_far = jnp.stack(depth, axis=1)
            parent = self.parents_BM[:, node : node + 1]
            depth.append(1 + jnp.take_along_axis(so_far, parent, axis=1)[:, 0])
        return jnp.stack(depth, axis=1)

    @property
    def mask(self) -> Mask:
        """Who sees whom among the nodes."""
        if self.parents_BM is None:
            return CAUSAL
        return ancestor(ancestors_of(self.parents_BM))


@pytree_dataclass
class Verdict:
    """What the verifier accepted.

    Attributes:
      path_BJ: int32 nodes from the root down the accepted path, padded by repeating
        the last.
      num_accepted_B: int32 accepted proposals, 0 to depth; the emitted tokens are those
        and then `next_token_B`.
      next_token_B: int32 the target's own token after the path.
      chosen_BM: int32 what the target would choose after every node; its iterate, in
        the words of Jacobi decoding.
    """

    path_BJ: Array
    num_accepted_B: Array
    next_token_B: Array
    chosen_BM: Array

    def block_BJ(self, draft: Draft) -> Array:
        """Returns int32 tokens behind the pending one, `num_accepted_B + 1` of each.

        Token j is the child of node j of the path: the next node, or the target's own.
        """
        index_J = jnp.arange(self.path_BJ.shape[1])
        drafted_BJ = jnp.take_along_axis(draft.tokens_BM, self.path_BJ, axis=1)
        return jnp.where(
            index_J < self.num_accepted_B[:, None],
            jnp.roll(drafted_BJ, -1, axis=1),
            self.next_token_B[:, None],
        )


class Drafter:
    """Base of every drafter: a frozen, hashable dataclass of options, without arrays.

    The engine calls `bind` once on the host, then `init`, and in every step `propose`,
    the target's forward, and `observe`, all inside one jitted loop. `params` is
    `{"target": ..., "drafter": ...}`.

    Attributes:
      nodes: M, nodes of every draft, the pending one included.
      depth: Most proposals on one path; J = depth + 1.
      tree: Whether drafts have parents; a chain has none.
      collect: Names that the target's forward shall collect into `aux`.
      prompt_hidden: Whether `init` needs the hidden states of the whole prompt.
      reads_hidden: Whether it reads the target's hidden states, so that it cannot draft
        for another model.
      lean: Whether a step in which no row has a proposal runs the pending tokens alone:
        cheaper, but equal to plain decoding of M query rows up to rounding only.
      variants: Drafters with the same state, one of which runs each step; `select`
        says which. Most have one, themselves.
    """

    nodes: int
    depth: int
    tree: bool = False
    lean: bool = False
    collect: ClassVar[tuple[str, ...]] = ()
    prompt_hidden: ClassVar[bool] = False
    reads_hidden: ClassVar[bool] = False
    forward: ClassVar[Any] = None
    """`forward(params, state, draft, context) -> Forward`; the target's when None."""

    @property
    def variants(self) -> tuple["Drafter", ...]:
        """See the class; the deepest has this drafter's depth."""
        return (self,)

    def select(self, state: Any) -> Array:
        """Returns int32, the variant that runs the next step of the whole batch."""
        return jnp.int32(0)

    def bind(self, lm: Any) -> tuple["Drafter", Any]:
        """Prepares for a model, on the host: loads files, checks tokenizers.

        Args:
          lm: The target `LanguageModel`.

        Returns:
          The drafter to run, and its parameters.
        """
        return self, {}

    def init(self, params: Params, committed: Committed, prefill: Forward) -> Any:
        """Returns the drafter's state after the prompt.

        Args:
          params: Parameters of target and drafter.
          committed: The prompts.
          prefill: Forward of `prompt[:-1]`: `hidden_BTD` at prompt positions when
            `prompt_hidden`, else `[B, 1, D]` at the last of them (zeros for a prompt
            of one token); `logits_BTV` is empty.
        """
        return ()

    def propose(
        self, params: Params, state: Any, committed: Committed
    ) -> tuple[Any, Draft]:
        """Returns the next draft, from the state and what is committed."""
        raise NotImplementedError

    def observe(
        self,
        params: Params,
        state: Any,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> Any:
        """Returns the state after a step; `committed` holds the emitted tokens."""
        return state

    def cost(self, params: Params) -> float:
        """Returns roughly what a proposal costs, in target passes of one query row.

        Args:
          params: Of target and drafter; shapes will do.
        """
        return 0.05

    def counts(self, state: Any) -> Counts:
        """Returns what inner models have done so far."""
        return {}

    def learned(self, params: Any, state: Any) -> Any:
        """Returns the drafter's parameters with what it learned in a batch.

        An online drafter starts the next batch with them, and they can be saved.

        Args:
          params: The drafter's own parameters.
          state: After the batch.
        """
        return params

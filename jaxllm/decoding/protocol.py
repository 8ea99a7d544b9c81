"""What a drafter, a verifier and the engine say to each other.

Everything that emits tokens is a drafter under one verifier. Node 0 of every draft is
the *pending* token: the last known one, whose keys and values are not in the cache yet.

Letters: B rows, S slots, M draft nodes, V vocabulary, J path length (depth + 1).
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from jaxllm.core.pytree import pytree_dataclass
from jaxllm.models.freeze import Forward

__all__ = ["Committed", "Draft", "Drafter", "Verdict"]

Params = dict[str, Any]


@pytree_dataclass
class Committed:
    """What is known for good.

    Attributes:
      tokens_BS: int32 prompt and output, left aligned; garbage from `length_B` on.
      length_B: int32 known tokens, the pending one included.
      row_key_B: Typed key of each row.
    """

    tokens_BS: Array
    length_B: Array
    row_key_B: Array

    @property
    def pending_B(self) -> Array:
        """The last known token of each row."""
        at = jnp.maximum(self.length_B - 1, 0)[:, None]
        return jnp.take_along_axis(self.tokens_BS, at, axis=1)[:, 0]


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


@pytree_dataclass
class Verdict:
    """What the verifier accepted.

    Attributes:
      path_BJ: int32 nodes from the root down the accepted path, padded by repeating
        the last.
      num_accepted_B: int32 accepted proposals, 0 to depth; the emitted tokens are those
        and then `next_token_B`.
      next_token_B: int32 the target's own token after the path.
    """

    path_BJ: Array
    num_accepted_B: Array
    next_token_B: Array


class Drafter:
    """Base of every drafter: a frozen, hashable dataclass of options, without arrays.

    The engine calls `bind` once on the host, then `init`, and in every step `propose`,
    the target's forward, and `observe`, all inside one jitted loop. `params` is
    `{"target": ..., "drafter": ...}`.

    Attributes:
      nodes: M, nodes of every draft, the pending one included.
      depth: Most proposals on one path; J = depth + 1.
      collect: Names that the target's forward shall collect into `aux`.
      prompt_hidden: Whether `init` needs the hidden states of the whole prompt.
    """

    nodes: int
    depth: int
    collect: ClassVar[tuple[str, ...]] = ()
    prompt_hidden: ClassVar[bool] = False
    forward: ClassVar[Any] = None
    """`forward(params, state, draft, context) -> Forward`; the target's when None."""

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
            `prompt_hidden`, else of no position; `logits_BTV` is empty.
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

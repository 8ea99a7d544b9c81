"""What the engine knows of a constraint on the text that it writes.

Letters: B rows, M draft nodes, V vocabulary, E end tokens.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.protocol import Draft

__all__ = ["Constraint", "constrain", "follow", "walk_states"]


class Constraint(Protocol):
    """Which tokens may come next: a registered dataclass, its tables are leaves.

    End tokens are the engine's business: they are allowed where the text may end.

    A constraint that has to see the whole draft at once has a method
    `walk(state, draft) -> (allowed_BMV, accepting_BM, states)` besides, which is called
    in place of the others; `states` are those at every node, leaves `[B, M, ...]`.
    """

    def init(self, rows: int) -> Any:
        """Returns the state of B rows that have written nothing; leaves `[B, ...]`."""

    def allowed(self, state: Any) -> Array:
        """Returns bool `[B, V]`, the tokens that may come next."""

    def advance(self, state: Any, token_B: Array) -> Any:
        """Returns the state after a token; any state for one that is not allowed."""

    def accepting(self, state: Any) -> Array:
        """Returns bool `[B]`, whether the text may end here."""


def constrain(
    constraint: Constraint, state: Any, draft: Draft, logits_BMV: Array, eos_E: Array
) -> tuple[Array, Array, Any]:
    """Walks a constraint down a draft and masks the logits of every node.

    Args:
      constraint: The rule.
      state: Before the draft, `[B, ...]`; the pending token is behind it.
      draft: Chain or tree.
      logits_BMV: The target's logits.
      eos_E: int32 end tokens; -1 for none.

    Returns:
      The logits, -inf where a token is not allowed; bool `[B, M]`, nodes behind which
      nothing at all may come, whose logits are left alone; and the state at every
      node, leaves `[B, M, ...]`.

    Raises:
      ConfigError: The constraint was made for another vocabulary.
    """
    walk = getattr(constraint, "walk", None)
    if walk is not None:
        allowed_BMV, accepting_BM, states = walk(state, draft)
    else:
        allowed_BMV, accepting_BM, states = _walk(constraint, state, draft)
    V = logits_BMV.shape[-1]
    if allowed_BMV.shape[-1] != V:
        raise ConfigError(
            f"cannot constrain: the constraint: is for {allowed_BMV.shape[-1]} tokens, "
            f"expected {V}, the model's vocabulary. Make it for this model."
        )
    token_V = jnp.arange(V)
    ends_V = (token_V[:, None] == eos_E).any(axis=1)
    allowed_BMV = jnp.where(ends_V, accepting_BM[..., None], allowed_BMV)
    stuck_BM = ~allowed_BMV.any(axis=-1)
    masked = jnp.where(allowed_BMV | stuck_BM[..., None], logits_BMV, -jnp.inf)
    return masked, stuck_BM, states


def walk_states(constraint: Constraint, state: Any, draft: Draft) -> Any:
    """Returns the state at every node of a draft, leaves `[B, M, ...]`.

    Args:
      constraint: The rule; only its `advance` is asked.
      state: Behind the pending token, `[B, ...]`.
      draft: Chain or tree.
    """
    rows, nodes = draft.tokens_BM.shape
    row_B = jnp.arange(rows)
    states = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:, None], (rows, nodes, *x.shape[1:])), state
    )

    def visit(node: Array, states: Any) -> Any:
        if draft.parents_BM is None:
            parent_B = jnp.full((rows,), node - 1)
        else:
            parent_B = draft.parents_BM[:, node]
        at = jax.tree.map(lambda x: x[row_B, parent_B], states)
        after = constraint.advance(at, draft.tokens_BM[:, node])
        return jax.tree.map(lambda x, y: x.at[:, node].set(y), states, after)

    return jax.lax.fori_loop(1, nodes, visit, states)


def _walk(constraint: Constraint, state: Any, draft: Draft) -> tuple[Array, Array, Any]:
    rows, nodes = draft.tokens_BM.shape
    states = walk_states(constraint, state, draft)
    # Every node as a row of its own, so that the constraint is asked once.
    each = jax.tree.map(lambda x: x.reshape(rows * nodes, *x.shape[2:]), states)
    allowed_BMV = constraint.allowed(each).reshape(rows, nodes, -1)
    return allowed_BMV, constraint.accepting(each).reshape(rows, nodes), states


def follow(
    constraint: Constraint, states: Any, node_B: Array, next_token_B: Array
) -> Any:
    """Returns the state after the accepted path and the token behind it.

    Args:
      constraint: The rule.
      states: At every node, leaves `[B, M, ...]`.
      node_B: int32, the last accepted node.
      next_token_B: int32.
    """
    row_B = jnp.arange(node_B.shape[0])
    at = jax.tree.map(lambda x: x[row_B, node_B], states)
    return constraint.advance(at, next_token_B)

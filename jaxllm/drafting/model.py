"""Speculative decoding: a smaller model drafts a chain.

Letters: B rows, S slots, M draft nodes, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.protocol import Committed, Draft, Params
from jaxllm.decoding.sampling import draw
from jaxllm.drafting.draft_net import NetDrafter, NetState

__all__ = ["ModelDrafter"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDrafter(NetDrafter):
    """Speculative decoding: a small model writes ahead, the target checks.

    Attributes:
      length: Tokens drafted in a step.
      confidence: Stops drafting a row once the model gives its own token less
        probability than this; a step ends early when all rows have stopped.

    Source: Fast Inference from Transformers via Speculative Decoding (arXiv
      2211.17192); assisted generation's confidence threshold.

    Differs from the paper: under `match` the drafter draws with the target's noise,
      so that the two agree as often as their distributions allow.
    """

    length: int = 4
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ConfigError(
                f"cannot draft: model.length is {self.length}, expected 0 or more. "
                f"Correct it."
            )

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, the pending token and the draft."""
        return self.length + 1

    @property
    def depth(self) -> int:  # type: ignore[override]
        """The length."""
        return self.length

    def propose(
        self, params: Params, state: NetState, committed: Committed
    ) -> tuple[NetState, Draft]:
        """Catches up with what was accepted, then drafts token after token."""
        net, sampler = self.bound_net, committed.choice
        rows, _ = committed.tokens_BS.shape
        if self.length == 0:
            root_BM = committed.pending_B[:, None]
            return state, Draft(root_BM, jnp.ones_like(root_BM, bool))
        # Two tokens are missing after a draft that was accepted whole: its last token
        # was never fed.
        state, logits_B1V = net.catch_up(params, state, committed, chunk=2)
        V = logits_B1V.shape[-1]
        tokens_BM = jnp.zeros((rows, self.nodes), jnp.int32)
        tokens_BM = tokens_BM.at[:, 0].set(committed.pending_B)
        valid_BM = jnp.zeros((rows, self.nodes), bool).at[:, 0].set(True)
        log_q_BMV = jnp.zeros((rows, self.nodes if sampler.rejects else 0, V))

        def write(i: Array, carry: Any, logits_B1V: Array) -> Any:
            """Draws node i from the logits at node i - 1."""
            tokens_BM, valid_BM, log_q_BMV, going_B = carry
            position_B1 = (committed.length_B + i - 1)[:, None]
            token_B1, log_q_B1V = draw(
                logits_B1V, position_B1, committed.row_key_B, sampler
            )
            if log_q_B1V is not None:
                log_q_BMV = log_q_BMV.at[:, i].set(log_q_B1V[:, 0])
            if self.confidence > 0:
                p_B1V = jax.nn.softmax(logits_B1V, axis=-1)
                p_B1 = jnp.take_along_axis(p_B1V, token_B1[..., None], axis=2)[..., 0]
                going_B &= p_B1[:, 0] >= self.confidence
            tokens_BM = tokens_BM.at[:, i].set(token_B1[:, 0])
            return tokens_BM, valid_BM.at[:, i].set(going_B), log_q_BMV, going_B

        going_B = jnp.ones((rows,), bool)
        carry = (tokens_BM, valid_BM, log_q_BMV, going_B)
        carry = write(jnp.int32(1), carry, logits_B1V)

        def more(loop: Any) -> Array:
            i, _, (_, _, _, going_B) = loop
            return (i < self.nodes) & going_B.any()

        def body(loop: Any) -> Any:
            i, state, carry = loop
            token_B1 = jax.lax.dynamic_slice_in_dim(carry[0], i - 1, 1, axis=1)
            state, logits_B1V = net.extend(params, state, token_B1)
            return i + 1, state, write(i, carry, logits_B1V)

        loop = (jnp.int32(2), state, carry)
        _, state, carry = jax.lax.while_loop(more, body, loop)
        tokens_BM, valid_BM, log_q_BMV, _ = carry
        # What was fed beyond the pending token: the drafted tokens, in their slots.
        fed = committed.extend(tokens_BM[:, 1:], jnp.full((rows,), self.length))
        state = dataclasses.replace(state, fed_BS=fed.tokens_BS)
        log_q = log_q_BMV if sampler.rejects else None
        return state, Draft(tokens_BM, valid_BM, log_q_BMV=log_q)

"""Plain decoding: a draft of the pending token alone.

Letters: B rows, M nodes.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxllm.decoding.protocol import Committed, Draft, Drafter

__all__ = ["Autoregressive"]


@dataclasses.dataclass(frozen=True)
class Autoregressive(Drafter):
    """One token a pass.

    Attributes:
      query_width: Nodes of the draft, of which one is valid. Plain decoding at the
        width of another drafter runs the same shapes, so its logits are equal bit for
        bit.
    """

    query_width: int = 1
    depth = 0

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, which is the query width."""
        return self.query_width

    def propose(
        self, params: dict[str, Any], state: Any, committed: Committed
    ) -> tuple[Any, Draft]:
        """Returns the pending token, padded to the width."""
        tokens_BM = jnp.pad(
            committed.pending_B[:, None], ((0, 0), (0, self.query_width - 1))
        )
        valid_BM = jnp.broadcast_to(jnp.arange(self.query_width) == 0, tokens_BM.shape)
        return state, Draft(tokens_BM, valid_BM)

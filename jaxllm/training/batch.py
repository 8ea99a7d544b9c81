"""What a step learns from: rows of tokens that may hold several documents.

Letters: B rows, T tokens of a row.
"""

import jax.numpy as jnp
from jax import Array

from jaxllm.attention.masks import packed
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.models import Context

__all__ = ["Batch"]


@pytree_dataclass
class Batch:
    """Packed rows; every leaf has rows on its first axis, so that a batch can be cut.

    Attributes:
      tokens_BT: int32.
      segment_BT: int32 document that a token belongs to, from 1 in every row; 0 is
        padding.
      position_BT: int32 position of a token in its document.
      weight_BT: float32, what predicting the token counts. 0 where nothing stands
        before it in its document, for padding, and for prompts that are not learned.
    """

    tokens_BT: Array
    segment_BT: Array
    position_BT: Array
    weight_BT: Array

    def context(self) -> Context:
        """Returns what a forward over all tokens needs: no document sees another."""
        document_BT = jnp.where(self.segment_BT > 0, self.segment_BT, -1)
        return Context(
            positions_BT=self.position_BT,
            valid_BT=self.segment_BT > 0,
            mask=packed(document_BT, document_BT),
        )

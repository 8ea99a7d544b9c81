"""Repetition and presence penalties, as functions of each node's own text.

Letters: B rows, S slots, M draft nodes, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.decoding.protocol import Committed, Draft
from jaxllm.decoding.sampling import Sampler

__all__ = ["penalize"]


def penalize(
    logits_BMV: Array, draft: Draft, committed: Committed, sampler: Sampler
) -> Array:
    """Applies penalties to the target's logits at every node of a chain.

    The text of a node is what is committed and the draft down to the node itself, so a
    token is penalized exactly as if the draft had been decoded one by one. Nothing is
    remembered between steps: what was rejected cannot leave a trace.

    Args:
      logits_BMV: float32.
      draft: A chain.
      committed: Tokens and lengths; `prompt_B` tokens are the prompt's.
      sampler: The rows' penalties.

    Returns:
      `[B, M, V]` float32.

    Source: CTRL (arXiv 1909.05858) section 4.1.
    """
    rows, V = logits_BMV.shape[0], logits_BMV.shape[-1]
    slot_S = jnp.arange(committed.tokens_BS.shape[1])
    known_BS = slot_S < committed.length_B[:, None]
    row_B1 = jnp.arange(rows)[:, None]

    def mentioned(which_BS: Array) -> Array:
        none_BV = jnp.zeros((rows, V), bool)
        return none_BV.at[row_B1, committed.tokens_BS].max(which_BS, mode="drop")

    # Node 0 is the pending token, which is committed.
    drafted_BMV = jax.nn.one_hot(draft.tokens_BM, V, dtype=jnp.int32)
    drafted_BMV = drafted_BMV * draft.valid_BM[..., None]
    path_BMV = jnp.cumsum(drafted_BMV.at[:, 0].set(0), axis=1) > 0
    seen_BMV = mentioned(known_BS)[:, None] | path_BMV
    penalty = sampler.repetition_B[:, None, None]
    turned = jnp.where(logits_BMV > 0, logits_BMV / penalty, logits_BMV * penalty)
    logits_BMV = jnp.where(seen_BMV, turned, logits_BMV)
    prompt_B = 0 if committed.prompt_B is None else committed.prompt_B[:, None]
    written_BMV = mentioned(known_BS & (slot_S >= prompt_B))[:, None] | path_BMV
    return logits_BMV - sampler.presence_B[:, None, None] * written_BMV

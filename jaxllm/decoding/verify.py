"""Verification: which proposals are the tokens that the target would have chosen.

`match` accepts a node while it equals the target's own choice at its parent. Emitted
tokens are always the target's choices, so the output equals plain decoding with the
same key, token for token, for any drafter, tree and temperature.

Letters: B rows, M draft nodes, V vocabulary, J path length (depth + 1).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.decoding.protocol import Committed, Draft, Verdict
from jaxllm.decoding.sampling import Sampler, choose

__all__ = ["match", "match_reference"]


def match(
    draft: Draft,
    logits_BMV: Array,
    sampler: Sampler,
    committed: Committed,
    *,
    depth: int,
) -> Verdict:
    """Accepts the path of nodes that equal the target's choices.

    Args:
      draft: Chain or tree.
      logits_BMV: The target's float32 logits at every node.
      sampler: The rows' options.
      committed: Lengths and keys; node i stands at position `length - 1 + depth_i`.
      depth: Longest path; J = depth + 1.

    Returns:
      The verdict. Of several children with the chosen token the first is taken.

    Source: specs of drafter-invariant verification (arXiv 2408.07978).
    """
    position_BM = committed.length_B[:, None] + draft.depth_BM
    chosen_BM = choose(logits_BMV, position_BM, committed.row_key_B, sampler)
    return match_choices(draft, chosen_BM, depth=depth)


def match_choices(draft: Draft, chosen_BM: Array, *, depth: int) -> Verdict:
    """Accepts the path of nodes that equal given choices, one for each node."""
    rows, nodes = draft.tokens_BM.shape
    if draft.parents_BM is None:
        equal = draft.tokens_BM[:, 1:] == chosen_BM[:, :-1]
        run = jnp.cumprod((equal & draft.valid_BM[:, 1:]).astype(jnp.int32), axis=1)
        accepted_B = run[:, :depth].sum(axis=1)
        path_BJ = jnp.minimum(jnp.arange(depth + 1), accepted_B[:, None])
    else:
        node_B = jnp.zeros((rows,), jnp.int32)
        accepted_B, path = jnp.zeros_like(node_B), [node_B]
        index = jnp.arange(nodes)
        for _ in range(depth):
            choice_B = jnp.take_along_axis(chosen_BM, node_B[:, None], 1)
            child_BM = (
                (draft.parents_BM == node_B[:, None])
                & (draft.tokens_BM == choice_B)
                & draft.valid_BM
                & (index > 0)
            )
            found_B = child_BM.any(axis=1)
            first_B = jnp.argmax(child_BM, axis=1).astype(jnp.int32)
            # A row that finds no child stays, and finds none in later rounds either.
            node_B = jnp.where(found_B, first_B, node_B)
            accepted_B = accepted_B + found_B
            path.append(node_B)
        path_BJ = jnp.stack(path, axis=1)
    last_B = jnp.take_along_axis(path_BJ, accepted_B[:, None], axis=1)
    next_B = jnp.take_along_axis(chosen_BM, last_B, axis=1)[:, 0]
    return Verdict(
        path_BJ.astype(jnp.int32),
        accepted_B.astype(jnp.int32),
        next_B.astype(jnp.int32),
    )


def match_reference(
    tokens: list[int], parents: list[int], valid: list[bool], chosen: list[int]
) -> tuple[list[int], int]:
    """Walks one row's tree in plain Python; the oracle of `match`.

    Returns:
      The accepted path, root included, and the token after it.
    """
    path = [0]
    while True:
        children = [
            i
            for i in range(1, len(tokens))
            if parents[i] == path[-1] and valid[i] and tokens[i] == chosen[path[-1]]
        ]
        if not children:
            return path, int(np.asarray(chosen[path[-1]]))
        path.append(children[0])

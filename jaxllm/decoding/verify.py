"""Verification: which proposals are the tokens that the target would have chosen.

`match` accepts a node while it equals the target's own choice at its parent. Emitted
tokens are always the target's choices, so the output equals plain decoding with the
same key, token for token, for any drafter, tree and temperature. `reject` is the
textbook rule for chains: its output has the target's distribution, but depends on what
was drafted.

Letters: B rows, M draft nodes, V vocabulary, J path length (depth + 1).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.rng import position_gumbel
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Verdict
from jaxllm.decoding.sampling import (
    RESIDUAL_STREAM,
    TEST_STREAM,
    Sampler,
    best,
    choose,
    log_probabilities,
    stream_keys,
)

__all__ = ["check_verifier", "match", "match_reference", "reject", "verify"]


def check_verifier(drafter: Drafter, sampler: Sampler) -> None:
    """Refuses what a tree cannot have.

    Raises:
      ConfigError: Rejection or penalties are asked for with a drafter of trees.
    """
    if not drafter.tree:
        return
    name = type(drafter).__name__
    if sampler.verify == "reject":
        raise ConfigError(
            f"cannot verify: {name} drafts trees, expected a chain: a rejected child "
            f"changes what its siblings are tested against. Leave --verify=match, "
            f"which is exact for trees."
        )
    if sampler.penalized:
        raise ConfigError(
            f"cannot penalize: {name} drafts trees, expected a chain: every node "
            f"would need the counts of its own path. Choose a drafter of chains, or "
            f"leave the penalties out."
        )


def verify(
    draft: Draft,
    logits_BMV: Array,
    sampler: Sampler,
    committed: Committed,
    *,
    depth: int,
) -> Verdict:
    """Verifies by the sampler's rule; arguments and result as for `match`."""
    rule = reject if sampler.rejects else match
    return rule(draft, logits_BMV, sampler, committed, depth=depth)


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

    Source: drafter-invariant speculative decoding (arXiv 2408.07978).
    """
    position_BM = committed.length_B[:, None] + draft.depth_BM
    chosen_BM = choose(logits_BMV, position_BM, committed.row_key_B, sampler)
    return match_choices(draft, chosen_BM, depth=depth)


def match_choices(draft: Draft, chosen_BM: Array, *, depth: int) -> Verdict:
    """Accepts the path of nodes that equal given choices, one for each node."""
    rows, nodes = draft.tokens_BM.shape
    if draft.parents_BM is None:
        equal = draft.tokens_BM[:, 1:] == chosen_BM[:, :-1]
        accepted_B, path_BJ = _accept_run(equal & draft.valid_BM[:, 1:], depth)
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
    return _verdict(path_BJ, accepted_B, next_B, chosen_BM)


def reject(
    draft: Draft,
    logits_BMV: Array,
    sampler: Sampler,
    committed: Committed,
    *,
    depth: int,
) -> Verdict:
    """Accepts each node of a chain with probability `min(1, p / q)`.

    At the first rejection the next token comes from the part of the target's
    distribution that the drafter's does not cover, `norm(max(p - q, 0))`; after a chain
    accepted whole, from p. A draft without `log_q_BMV` was not drawn: its q is 1 at its
    token. The tests use noise of their own, independent of the drafter's.

    Args:
      draft: Chain, with the distributions that its nodes were drawn from.
      logits_BMV: The target's float32 logits at every node.
      sampler: The rows' options; the same filters that plain sampling applies.
      committed: Lengths and keys.
      depth: Longest path; J = depth + 1.

    Source: Fast Inference from Transformers via Speculative Decoding (arXiv
      2211.17192), algorithm 1; arXiv 2302.01318, algorithm 2.
    """
    nodes, V = logits_BMV.shape[1:]
    length_B, key_B = committed.length_B, committed.row_key_B
    position_BM = length_B[:, None] + jnp.arange(nodes, dtype=jnp.int32)
    log_p_BMV = log_probabilities(logits_BMV, sampler)
    token_BM = draft.tokens_BM[:, 1:, None]
    p_BM = jnp.exp(jnp.take_along_axis(log_p_BMV[:, :-1], token_BM, axis=2)[..., 0])
    if draft.log_q_BMV is None:
        q_BM = jnp.ones_like(p_BM)
    else:
        log_q_BMV = draft.log_q_BMV[:, 1:]
        q_BM = jnp.exp(jnp.take_along_axis(log_q_BMV, token_BM, axis=2)[..., 0])
    # u q < p, not u < p / q: q may be 0 after filters, and p = 0 must never pass.
    u_BM = _uniform(stream_keys(key_B, TEST_STREAM), position_BM[:, :-1])
    passed_BM = (u_BM * q_BM < p_BM) & draft.valid_BM[:, 1:]
    accepted_B, path_BJ = _accept_run(passed_BM, depth)

    def at(x_BMV: Array, node_B: Array) -> Array:
        return jnp.take_along_axis(x_BMV, node_B[:, None, None], axis=1)[:, 0]

    p_BV = jnp.exp(at(log_p_BMV, accepted_B))
    child_B = jnp.minimum(accepted_B + 1, nodes - 1)
    child_token_B = jnp.take_along_axis(draft.tokens_BM, child_B[:, None], axis=1)
    if draft.log_q_BMV is None:
        q_BV = jax.nn.one_hot(child_token_B[:, 0], V)
    else:
        q_BV = jnp.exp(at(draft.log_q_BMV, child_B))
    tested_B = jnp.take_along_axis(draft.valid_BM, child_B[:, None], axis=1)[:, 0]
    tested_B &= accepted_B < min(depth, nodes - 1)
    rest_BV = jnp.where(tested_B[:, None], jnp.maximum(p_BV - q_BV, 0.0), p_BV)
    # Through rounding nothing may be left; p is then as good as its own residual.
    empty_B1 = rest_BV.sum(axis=1, keepdims=True) <= 0
    rest_BV = jnp.where(empty_B1, p_BV, rest_BV)
    position_B1 = (length_B + accepted_B)[:, None]
    next_B = _draw_residual(rest_BV, position_B1, stream_keys(key_B, RESIDUAL_STREAM))
    chosen_BM = choose(logits_BMV, position_BM, key_B, sampler)
    return _verdict(path_BJ, accepted_B, next_B, chosen_BM)


def _draw_residual(rest_BV: Array, position_B1: Array, key_B: Array) -> Array:
    """Draws from what is left, in proportion; it need not sum to 1."""
    noise_B1V = position_gumbel(key_B, position_B1, rest_BV.shape[-1])
    return best(jnp.log(rest_BV) + noise_B1V[:, 0])


def _uniform(key_B: Array, position_BM: Array) -> Array:
    """Returns uniform numbers in [0, 1) of absolute positions, `[B, M]` float32."""

    def noise(key: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(jax.vmap(noise, (None, 0)))(key_B, position_BM)


def _accept_run(passed_BM: Array, depth: int) -> tuple[Array, Array]:
    """Returns how many proposals of a chain pass before one fails, and the path."""
    run_BM = jnp.cumprod(passed_BM.astype(jnp.int32), axis=1)
    accepted_B = run_BM[:, :depth].sum(axis=1)
    return accepted_B, jnp.minimum(jnp.arange(depth + 1), accepted_B[:, None])


def _verdict(
    path_BJ: Array, accepted_B: Array, next_B: Array, chosen_BM: Array
) -> Verdict:
    return Verdict(
        path_BJ.astype(jnp.int32),
        accepted_B.astype(jnp.int32),
        next_B.astype(jnp.int32),
        chosen_BM.astype(jnp.int32),
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

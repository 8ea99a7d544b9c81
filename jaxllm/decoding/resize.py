"""A step seen with another number of nodes: cut to fewer, or padded with invalid ones.

A part of a combinator sees a step as if the draft had been of its own width.

Letters: B rows, M draft nodes, J path length (depth + 1).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.decoding.protocol import Draft, Drafter, Verdict
from jaxllm.models.freeze import Forward

__all__ = ["as_seen_by", "resize_draft", "resize_forward", "resize_verdict"]


def as_seen_by(
    drafter: Drafter, draft: Draft, verdict: Verdict, forward: Forward
) -> tuple[Draft, Verdict, Forward]:
    """Returns a step as a drafter would have seen it, of its own nodes and depth."""
    nodes = drafter.nodes
    return (
        resize_draft(draft, nodes, drafter.tree),
        resize_verdict(verdict, nodes, drafter.depth),
        resize_forward(forward, nodes),
    )


def resize_draft(draft: Draft, nodes: int, tree: bool) -> Draft:
    """Cuts or pads a draft; a chain among trees gets its parents, and loses them back.

    Args:
      draft: Of any number of nodes.
      nodes: M.
      tree: Whether it shall have parents.
    """
    rows, own = draft.tokens_BM.shape
    parents_BM = draft.parents_BM if tree else None
    if tree and parents_BM is None:
        parents_BM = jnp.broadcast_to(jnp.arange(-1, own - 1), (rows, own))
    resized = dataclasses.replace(draft, parents_BM=parents_BM)
    return jax.tree.map(lambda x: _resize(x, nodes), resized)


def resize_verdict(verdict: Verdict, nodes: int, depth: int) -> Verdict:
    """Cuts or pads a verdict; a path that is cut ends at the last node there is."""
    path_BJ = verdict.path_BJ[:, : depth + 1]
    deeper = depth + 1 - path_BJ.shape[1]
    path_BJ = jnp.pad(path_BJ, ((0, 0), (0, deeper)), mode="edge")
    return Verdict(
        path_BJ=jnp.minimum(path_BJ, nodes - 1),
        num_accepted_B=jnp.minimum(verdict.num_accepted_B, depth),
        next_token_B=verdict.next_token_B,
        chosen_BM=_resize(verdict.chosen_BM, nodes),
    )


def resize_forward(forward: Forward, nodes: int) -> Forward:
    """Cuts or pads what a forward gave, with zeros that nobody reads."""
    return Forward(
        _resize(forward.logits_BTV, nodes),
        _resize(forward.hidden_BTD, nodes),
        jax.tree.map(lambda x: _resize(x, nodes, axis=3), forward.new_kv),
        jax.tree.map(lambda x: _resize(x, nodes), forward.aux),
    )


def _resize(x: Array, nodes: int, axis: int = 1) -> Any:
    own = x.shape[axis]
    if own >= nodes:
        return jax.lax.slice_in_dim(x, 0, nodes, axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, nodes - own)
    return jnp.pad(x, widths)

"""Searches for the nodes of a draft that a trigram table believes in most.

Letters: B rows, M draft nodes, N nodes of a search, F nodes of one depth, R candidates
of a node, D depth of a tree (in this module not a model's width), V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.pytree import pytree_dataclass
from jaxllm.core.rng import position_gumbel
from jaxllm.decoding.protocol import Committed, Draft
from jaxllm.drafting.ngrams import TrigramTable, lookup
from jaxllm.drafting.trees import keep_best

__all__ = [
    "Beliefs",
    "best_first",
    "best_first_reference",
    "puct",
    "puct_reference",
]

# How much a search explores: the constants of MuZero.
EXPLORE_1, EXPLORE_2 = 1.25, 19652.0


@pytree_dataclass
class Beliefs:
    """How likely a table thinks tokens to be chosen, under the rows' samplers.

    A greedy row takes a candidate's share of all that are listed: the many unlikely
    tokens that no list holds are never the likeliest. For a row that samples, the
    target's own noise is added to the logarithm of a candidate's probability, and its
    share of the exponentiated sum takes the probability's place: a candidate that the
    noise favours rises.

    Attributes:
      table: The table.
      temperature_B: float32 of each row.
      noise_BDV: Noise of the positions that depth 1 to D stand at; none when all rows
        are greedy.
    """

    table: TrigramTable
    temperature_B: Array
    noise_BDV: Array | None

    @classmethod
    def of(cls, table: TrigramTable, committed: Committed, depth: int) -> "Beliefs":
        """Returns the beliefs about the next `depth` tokens of each row."""
        sampler, noise_BDV = committed.choice, None
        if not sampler.greedy:
            position_BD = committed.length_B[:, None] + jnp.arange(depth)
            noise_BDV = position_gumbel(
                committed.row_key_B, position_BD, table.vocabulary
            )
        return cls(table, sampler.temperature_B, noise_BDV)

    def about(self, u_BF: Array, v_BF: Array, depth_BF: Array) -> tuple[Array, Array]:
        """Returns what may follow nodes, and how likely it is to be chosen.

        Args:
          u_BF: int32 tokens before the nodes' own, -1 where there is none.
          v_BF: int32 tokens of the nodes.
          depth_BF: int32 distances from node 0, below D.

        Returns:
          int32 candidates `[B, F, R]`, -1 for none, and float32 values from 0 to 1.
        """
        next_BFR, p_BFR = lookup(self.table, u_BF, v_BF)
        listed_BF1 = p_BFR.sum(axis=-1, keepdims=True)
        sure_BFR = p_BFR / jnp.where(listed_BF1 > 0, listed_BF1, 1.0)
        if self.noise_BDV is None:
            return next_BFR, sure_BFR
        rows = jnp.arange(u_BF.shape[0])[:, None, None]
        noise_BFR = self.noise_BDV[rows, depth_BF[..., None], next_BFR]
        warm_B11 = self.temperature_B[:, None, None]
        # What the list leaves out may be chosen too; it counts as one more candidate.
        rest_BF1 = jnp.maximum(1 - listed_BF1, 1e-6)
        scale_B11 = 1 / jnp.where(warm_B11 > 0, warm_B11, 1.0)
        score_BFR = jnp.log(p_BFR) * scale_B11 + noise_BFR
        left_BF1 = jnp.log(rest_BF1) * scale_B11
        top_BF1 = jnp.maximum(score_BFR.max(axis=-1, keepdims=True), left_BF1)
        weight_BFR = jnp.exp(score_BFR - top_BF1)
        total_BF1 = weight_BFR.sum(-1, keepdims=True) + jnp.exp(left_BF1 - top_BF1)
        share_BFR = weight_BFR / total_BF1
        return next_BFR, jnp.where(warm_B11 > 0, share_BFR, sure_BFR)


def best_first(
    beliefs: Beliefs, u_B: Array, pending_B: Array, *, nodes: int, depth: int
) -> Draft:
    """Returns the tree with the most accepted tokens that the table can promise.

    A node's value is the product of the probabilities down its path, the chance that it
    is accepted. Values fall along paths, so the best M - 1 nodes of all form a tree.
    They are found depth by depth: a depth keeps no more nodes than can be among them.

    Args:
      beliefs: What the table thinks.
      u_B: int32 tokens before the pending ones, -1 where there is none.
      pending_B: int32 pending tokens.
      nodes: M.
      depth: D, at most M - 1.

    Returns:
      The tree. Of equal values the smaller depth comes first, then the child of the
      better parent, then the table's order.
    """
    rows = u_B.shape[0]
    u_BF, v_BF = u_B[:, None], pending_B[:, None]
    value_BF = jnp.ones((rows, 1), jnp.float32)
    index_BF = jnp.full((rows, 1), -1, jnp.int32)
    tokens, parents, values = [], [], []
    found = 0
    for d in range(depth):
        next_BFR, p_BFR = beliefs.about(u_BF, v_BF, jnp.full_like(u_BF, d))
        rank = next_BFR.shape[-1]
        value_BN = (value_BF[..., None] * p_BFR).reshape(rows, -1)
        # d ancestors of a node at this depth are better than it, and so are all nodes
        # before it here.
        keep = min(value_BN.shape[1], nodes - 1 - d)
        value_BF, best_BF = jax.lax.top_k(value_BN, keep)
        up_BF = best_BF // rank
        u_BF = jnp.take_along_axis(v_BF, up_BF, axis=1)
        v_BF = jnp.take_along_axis(next_BFR.reshape(rows, -1), best_BF, axis=1)
        v_BF = jnp.maximum(v_BF, 0)
        tokens.append(v_BF)
        values.append(value_BF)
        parents.append(jnp.take_along_axis(index_BF, up_BF, axis=1))
        index_BF = jnp.broadcast_to(
            found + jnp.arange(keep, dtype=jnp.int32), up_BF.shape
        )
        found += keep
    value_BN = jnp.concatenate(values, axis=1)
    return keep_best(
        pending_B,
        jnp.concatenate(tokens, axis=1),
        jnp.concatenate(parents, axis=1),
        jnp.where(value_BN > 0, value_BN, -jnp.inf),
        nodes,
    )


@pytree_dataclass
class _Search:
    """The tree of a search; node 0 is the pending token, node i the i-th visited.

    Attributes:
      u_BN: int32 tokens before the nodes' own.
      v_BN: int32 tokens of the nodes.
      parent_BN: int32.
      depth_BN: int32.
      value_BN: float32 products of the values down the path.
      visits_BN: int32, how often a node was passed or reached; 0 where there is none.
      total_BN: float32 sum of what was found at or below the node.
      next_BNR: int32 candidates.
      prior_BNR: float32 values of the candidates; 0 for none, and at depth D.
      child_BNR: int32 nodes of the candidates, 0 where there is none yet.
    """

    u_BN: Array
    v_BN: Array
    parent_BN: Array
    depth_BN: Array
    value_BN: Array
    visits_BN: Array
    total_BN: Array
    next_BNR: Array
    prior_BNR: Array
    child_BNR: Array


def puct(
    beliefs: Beliefs,
    u_B: Array,
    pending_B: Array,
    *,
    nodes: int,
    depth: int,
    iterations: int,
) -> Draft:
    """Returns the nodes that a search by PUCT visits most.

    Every iteration goes down from the pending token, at each node to the candidate of
    the largest `Q + P sqrt(n) / (1 + n_a) (c1 + log((n + c2 + 1) / c2))`, adds the
    first candidate that has no node yet, takes the product of the values down its path
    as its worth, and averages that into Q of all nodes on the path. A path that can
    grow no more is visited again.

    Args:
      beliefs: What the table thinks.
      u_B: int32 tokens before the pending ones, -1 where there is none.
      pending_B: int32 pending tokens.
      nodes: M.
      depth: D, at most M - 1.
      iterations: Nodes visited; M - 1 or more.

    Returns:
      The M - 1 nodes visited most; ties go to the one found earlier.

    Source: Adaptive Draft-Verification (arXiv 2407.12021), draft search; MuZero
      (arXiv 1911.08265), appendix B, for the rule and its constants.
    """
    # The logarithm and the root of a few known numbers, n visits of a node.
    weigh = jnp.asarray(exploration(iterations + 1))
    search = _start(beliefs, u_B, pending_B, iterations)
    rows = u_B.shape[0]

    def pick(x_BNX: Array, node_B: Array) -> Array:
        at = node_B.reshape(-1, *[1] * (x_BNX.ndim - 1))
        return jnp.take_along_axis(x_BNX, at, axis=1)[:, 0]

    def iterate(i: Array, search: _Search) -> _Search:
        best_BN, open_BN = _preferred(search, weigh)
        node_B = jnp.zeros((rows,), jnp.int32)
        grows_B = jnp.zeros((rows,), bool)
        going_B = jnp.ones((rows,), bool)
        index_N = jnp.arange(search.v_BN.shape[1], dtype=jnp.int32)
        passed_BN = jnp.broadcast_to(index_N == 0, search.v_BN.shape)
        # Follows the preferred candidates to one without a node, or to an end.
        for _ in range(depth):
            going_B &= pick(open_BN, node_B) & ~grows_B
            child_B = pick(search.child_BNR, node_B)
            child_B = jnp.take_along_axis(child_B, pick(best_BN, node_B)[:, None], 1)
            grows_B |= going_B & (child_B[:, 0] == 0)
            node_B = jnp.where(going_B & ~grows_B, child_B[:, 0], node_B)
            passed_BN |= index_N == node_B[:, None]
        return _grow(beliefs, search, i, node_B, best_BN, grows_B, passed_BN, depth)

    search = jax.lax.fori_loop(1, iterations + 1, iterate, search)
    visits_BN = search.visits_BN[:, 1:].astype(jnp.float32)
    return keep_best(
        pending_B,
        search.v_BN[:, 1:],
        search.parent_BN[:, 1:] - 1,
        jnp.where(visits_BN > 0, visits_BN, -jnp.inf),
        nodes,
    )


def exploration(visits: int) -> np.ndarray:
    """Returns `sqrt(n) (c1 + log((n + c2 + 1) / c2))` for n from 0 on, float32."""
    n = np.arange(visits + 1)
    grown = EXPLORE_1 + np.log((n + EXPLORE_2 + 1) / EXPLORE_2)
    return (np.sqrt(n) * grown).astype(np.float32)


def _start(beliefs: Beliefs, u_B: Array, pending_B: Array, iterations: int) -> _Search:
    rows, N = u_B.shape[0], iterations + 1
    next_B1R, prior_B1R = beliefs.about(
        u_B[:, None], pending_B[:, None], jnp.zeros((rows, 1), jnp.int32)
    )
    rank = next_B1R.shape[-1]
    none_BN = jnp.zeros((rows, N), jnp.int32)
    return _Search(
        u_BN=none_BN.at[:, 0].set(u_B),
        v_BN=none_BN.at[:, 0].set(pending_B),
        parent_BN=none_BN,
        depth_BN=none_BN,
        value_BN=jnp.zeros((rows, N), jnp.float32).at[:, 0].set(1.0),
        visits_BN=none_BN.at[:, 0].set(1),
        total_BN=jnp.zeros((rows, N), jnp.float32),
        next_BNR=jnp.full((rows, N, rank), -1, jnp.int32).at[:, 0].set(next_B1R[:, 0]),
        prior_BNR=jnp.zeros((rows, N, rank)).at[:, 0].set(prior_B1R[:, 0]),
        child_BNR=jnp.zeros((rows, N, rank), jnp.int32),
    )


def _preferred(search: _Search, weigh: Array) -> tuple[Array, Array]:
    """Returns the candidate that each node prefers, and whether it has any."""
    rows, N, rank = search.child_BNR.shape
    flat_BN = search.child_BNR.reshape(rows, -1)

    def of_children(x_BN: Array) -> Array:
        found = jnp.take_along_axis(x_BN, flat_BN, axis=1)
        return jnp.where(flat_BN > 0, found, 0).reshape(rows, N, rank)

    visits_BNR = of_children(search.visits_BN)
    mean_BNR = of_children(search.total_BN) / jnp.maximum(visits_BNR, 1)
    bold_BN1 = weigh[search.visits_BN][..., None]
    score_BNR = mean_BNR + search.prior_BNR * (bold_BN1 / (1 + visits_BNR))
    score_BNR = jnp.where(search.prior_BNR > 0, score_BNR, -jnp.inf)
    return jnp.argmax(score_BNR, axis=-1), (search.prior_BNR > 0).any(axis=-1)


def _grow(
    beliefs: Beliefs,
    search: _Search,
    i: Array,
    node_B: Array,
    best_BN: Array,
    grows_B: Array,
    passed_BN: Array,
    depth: int,
) -> _Search:
    """Adds node i below the end of a path where it can grow; backs its worth up."""
    row_B = jnp.arange(node_B.shape[0])
    choice_B = best_BN[row_B, node_B]
    u_B = search.v_BN[row_B, node_B]
    v_B = jnp.maximum(search.next_BNR[row_B, node_B, choice_B], 0)
    depth_B = search.depth_BN[row_B, node_B] + 1
    value_B = search.value_BN[row_B, node_B]
    below_B = value_B * search.prior_BNR[row_B, node_B, choice_B]
    worth_B = jnp.where(grows_B, below_B, value_B)
    next_B1R, prior_B1R = beliefs.about(
        u_B[:, None], v_B[:, None], jnp.minimum(depth_B, depth - 1)[:, None]
    )
    leaf_B1 = (depth_B >= depth)[:, None]
    child_B = jnp.where(grows_B, i, search.child_BNR[row_B, node_B, choice_B])
    passed_BN |= grows_B[:, None] & (jnp.arange(passed_BN.shape[1]) == i)
    return _Search(
        u_BN=search.u_BN.at[:, i].set(u_B),
        v_BN=search.v_BN.at[:, i].set(v_B),
        parent_BN=search.parent_BN.at[:, i].set(node_B),
        depth_BN=search.depth_BN.at[:, i].set(depth_B),
        value_BN=search.value_BN.at[:, i].set(below_B),
        visits_BN=search.visits_BN + passed_BN,
        total_BN=search.total_BN + jnp.where(passed_BN, worth_B[:, None], 0.0),
        next_BNR=search.next_BNR.at[:, i].set(next_B1R[:, 0]),
        prior_BNR=search.prior_BNR.at[:, i].set(
            jnp.where(leaf_B1, 0.0, prior_B1R[:, 0])
        ),
        child_BNR=search.child_BNR.at[row_B, node_B, choice_B].set(child_B),
    )


Candidates = Callable[[int, int, int], Sequence[tuple[int, float]]]
"""What may follow a node: from the token before it, its own, and its depth."""


@dataclasses.dataclass
class _Node:
    """A node of a plain search."""

    u: int
    v: int
    parent: int
    depth: int
    value: np.float32
    visits: int = 0
    total: Any = 0.0
    children: dict[int, int] = dataclasses.field(default_factory=dict)


def _kept(found: list[_Node], worth: list[Any], nodes: int) -> list[tuple[int, int]]:
    """Returns the token and the parent of node 0 and of the best of the others."""
    order = sorted(range(1, len(found)), key=lambda i: (-worth[i], i))
    kept = [0, *sorted(order[: nodes - 1])]
    return [(found[i].v, kept.index(found[i].parent) if i else -1) for i in kept]


def best_first_reference(
    candidates: Candidates, u: int, pending: int, *, nodes: int, depth: int
) -> list[tuple[int, int]]:
    """Sorts all paths there are, in plain Python; the oracle of `best_first`.

    Args:
      candidates: Tokens that may follow a node, with their probabilities.
      u: The token before the pending one.
      pending: The pending token.
      nodes: M.
      depth: D.

    Returns:
      The token and the parent of every valid node.
    """
    found = [_Node(u, pending, -1, 0, np.float32(1))]
    level = [0]
    for d in range(depth):
        children = [
            _Node(found[i].v, token, i, d + 1, found[i].value * np.float32(p))
            for i in level
            for token, p in candidates(found[i].u, found[i].v, d)
            if p > 0
        ]
        children.sort(key=lambda node: -node.value)
        level = list(range(len(found), len(found) + len(children)))
        found += children
    return _kept(found, [node.value for node in found], nodes)


def puct_reference(
    candidates: Candidates,
    u: int,
    pending: int,
    *,
    nodes: int,
    depth: int,
    iterations: int,
) -> list[tuple[int, int]]:
    """Searches one row in plain Python; the oracle of `puct`. Returns as above."""
    weigh = exploration(iterations + 1)
    found = [_Node(u, pending, -1, 0, np.float32(1), visits=1)]

    def options(node: _Node) -> Sequence[tuple[int, float]]:
        if node.depth == depth:
            return []
        return [(t, p) for t, p in candidates(node.u, node.v, node.depth) if p > 0]

    def score(node: _Node, choice: int, p: float) -> np.float32:
        at = node.children.get(choice)
        visits = found[at].visits if at else 0
        mean = found[at].total / np.float32(visits) if at else np.float32(0)
        return mean + np.float32(p) * (weigh[node.visits] / np.float32(1 + visits))

    for _ in range(iterations):
        path = [0]
        while True:
            node = found[path[-1]]
            offered = options(node)
            if not offered:
                break
            scores = [score(node, i, p) for i, (_, p) in enumerate(offered)]
            choice = int(np.argmax(scores))
            if choice in node.children:
                path.append(node.children[choice])
                continue
            token, p = offered[choice]
            value = node.value * np.float32(p)
            node.children[choice] = len(found)
            found.append(_Node(node.v, token, path[-1], node.depth + 1, value))
            path.append(len(found) - 1)
            break
        for i in path:
            found[i].visits += 1
            found[i].total += found[path[-1]].value
    return _kept(found, [node.visits for node in found], nodes)

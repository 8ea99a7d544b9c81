"""Graph-structured drafting: hypotheses that meet are expanded once.

Letters: B rows, M draft nodes, N graph nodes so far, F frontier, W draft width, E graph
nodes that were expanded.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.protocol import Committed, Draft, Params
from jaxllm.drafting.draft_net import NetDrafter, NetState
from jaxllm.drafting.tree import Expansion

__all__ = ["GraphDrafter", "unroll"]

_NEVER = -jnp.inf


@pytree_dataclass
class Graph:
    """Nodes in order of creation, and the edges below those that were expanded.

    Attributes:
      token_BN: int32 token of every candidate that ever was; node 0 is the pending one.
      before_BN: int32 token above it.
      above_BNN: bool, entry (i, j): j is i or stands above it on its first path.
      alive_BN: Which candidates became nodes.
      score_BN: float32 log confidence of the path on which a node was created.
      edge_BEW: int32 node that each candidate of an expanded node leads to; -1 none.
      sure_BEW: float32 log confidence of that candidate.
      expanded_BN: int32 index among the expanded nodes; -1 for the others.
    """

    token_BN: Array
    before_BN: Array
    above_BNN: Array
    alive_BN: Array
    score_BN: Array
    edge_BEW: Array
    sure_BEW: Array
    expanded_BN: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphDrafter(NetDrafter):
    """GSD: a drafting model's hypotheses as a graph, unrolled to a tree to be verified.

    A candidate that repeats a node elsewhere (the same token behind the same tokens) is
    not made again: an edge leads to the node that is there, whose continuations stand
    for both. That saves forwards of the drafting model only. A node with two pasts has
    no single hidden state, so the target verifies a tree of paths.

    Attributes:
      nodes: M, nodes that the target verifies, the pending one included.
      depth: D, levels of the graph.
      width: W, candidates of a node.
      frontier: F, nodes that a level expands; W when None.
      merge_order: How many tokens before must agree too: 0 or 1; -1 merges nothing.
      node_threshold: A candidate less likely than this is verified but not expanded.
      sibling_threshold: A candidate less likely than this share of its best sibling is
        dropped.

    Source: Graph-Structured Speculative Decoding (arXiv 2407.16207), section 3.

    Differs from the paper: the unrolled tree is filled by path confidence instead of
      breadth first, a node may have any number of merged edges, and sampled decoding is
      exact (the published acceptance of single nodes is not).
    """

    nodes: int = 8
    depth: int = 4
    width: int = 3
    frontier: int | None = None
    merge_order: int = 0
    node_threshold: float = 0.0
    sibling_threshold: float = 0.0
    tree = True

    def __post_init__(self) -> None:
        bounds = {
            "nodes": (2, 4096),
            "depth": (1, 64),
            "width": (1, 64),
            "merge_order": (-1, 1),
            "node_threshold": (0, 1),
            "sibling_threshold": (0, 1),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"cannot draft: graph.{name} is {getattr(self, name)}, expected "
                    f"{low} to {high}. Correct it."
                )

    def propose(
        self, params: Params, state: NetState, committed: Committed
    ) -> tuple[NetState, Draft]:
        """Grows the graph, a forward of the model for each level, and unrolls it."""
        growth = Expansion(self.bound_net, params, state, committed)
        growth.start(chunk=self.depth + 1)
        pending_B = committed.pending_B
        graph = self._root(pending_B)
        frontier_BF = jnp.zeros((pending_B.shape[0], 1), jnp.int32)
        for depth in range(1, self.depth + 1):
            tokens_BFW, sure_BFW = growth.candidates(depth, self.width)
            first = graph.token_BN.shape[1]
            graph = self._add(graph, frontier_BF, tokens_BFW, sure_BFW)
            if depth == self.depth:
                break
            fresh_BC = graph.score_BN[:, first:]
            p_BC = jnp.exp(sure_BFW).reshape(fresh_BC.shape)
            open_BC = graph.alive_BN[:, first:] & (p_BC >= self.node_threshold)
            fresh_BC = jnp.where(open_BC, fresh_BC, _NEVER)
            size = min(self.frontier or self.width, fresh_BC.shape[1])
            best_BF, index_BF = jax.lax.top_k(fresh_BC, size)
            real_BF = jnp.isfinite(best_BF)
            frontier_BF = (first + index_BF).astype(jnp.int32)
            growth.level(
                jnp.take_along_axis(graph.token_BN, frontier_BF, axis=1),
                index_BF // self.width,
                depth,
                real_BF,
            )
            frontier_BF = jnp.where(real_BF, frontier_BF, -1)
        return growth.state, unroll(graph, self.nodes, self.depth)

    def _root(self, pending_B: Array) -> Graph:
        rows = pending_B.shape[0]
        one = jnp.ones((rows, 1), jnp.int32)
        return Graph(
            token_BN=pending_B[:, None],
            before_BN=-one,
            above_BNN=jnp.ones((rows, 1, 1), bool),
            alive_BN=jnp.ones((rows, 1), bool),
            score_BN=jnp.zeros((rows, 1)),
            edge_BEW=jnp.zeros((rows, 0, self.width), jnp.int32),
            sure_BEW=jnp.zeros((rows, 0, self.width)),
            expanded_BN=-one,
        )

    def _add(
        self, graph: Graph, frontier_BF: Array, tokens_BFW: Array, sure_BFW: Array
    ) -> Graph:
        """Adds the candidates below a frontier, merging those that repeat a node."""
        rows, count = graph.token_BN.shape
        size = tokens_BFW.shape[1] * self.width
        real_BF = frontier_BF >= 0
        parent_BF = jnp.maximum(frontier_BF, 0)

        def below(x_BN: Array) -> Array:
            """Returns the parents' values for every candidate."""
            x_BF = jnp.take_along_axis(x_BN, parent_BF, axis=1)
            return jnp.repeat(x_BF, self.width, axis=1)

        token_BC = tokens_BFW.reshape(rows, size)
        best_BFW = jnp.exp(sure_BFW - sure_BFW[..., :1])
        kept_BFW = (best_BFW >= self.sibling_threshold) & jnp.isfinite(sure_BFW)
        kept_BC = (kept_BFW & real_BF[..., None]).reshape(rows, size)
        before_BC = below(graph.token_BN)
        above_BFN = jnp.take_along_axis(graph.above_BNN, parent_BF[..., None], axis=1)
        above_BCN = jnp.repeat(above_BFN, self.width, axis=1)

        def same(token_BN: Array, before_BN: Array) -> Array:
            equal = token_BC[:, :, None] == token_BN[:, None, :]
            if self.merge_order == 1:
                equal &= before_BC[:, :, None] == before_BN[:, None, :]
            return equal

        merged_BC = jnp.zeros_like(kept_BC)
        target_BC = count + jnp.arange(size, dtype=jnp.int32)
        target_BC = jnp.broadcast_to(target_BC, (rows, size))
        if self.merge_order >= 0:
            old_BCN = same(graph.token_BN, graph.before_BN)
            old_BCN &= graph.alive_BN[:, None] & ~above_BCN
            met_BC = old_BCN.any(axis=2)
            fresh_BC = kept_BC & ~met_BC
            # Of those that repeat each other in this level the first is made.
            twin_BCC = same(token_BC, before_BC) & fresh_BC[:, None]
            twin_BC = jnp.argmax(twin_BCC, axis=2)
            merged_BC = met_BC | (twin_BC < jnp.arange(size))
            old_BC = jnp.argmax(old_BCN, axis=2)
            target_BC = jnp.where(met_BC, old_BC, count + twin_BC).astype(jnp.int32)
        alive_BC = kept_BC & ~merged_BC
        score_BC = below(graph.score_BN) + sure_BFW.reshape(rows, size)
        shape = tokens_BFW.shape
        edge_BFW = jnp.where(kept_BC, target_BC, -1).reshape(shape)
        row_B1 = jnp.arange(rows)[:, None]
        place_BF = jnp.where(real_BF, frontier_BF, count)
        expanded = graph.edge_BEW.shape[1] + jnp.arange(shape[1], dtype=jnp.int32)
        expanded_BN = graph.expanded_BN.at[row_B1, place_BF].set(expanded, mode="drop")
        none_BC = jnp.full((rows, size), -1, jnp.int32)
        above_BNN = jnp.concatenate([graph.above_BNN, above_BCN], axis=1)
        own = jnp.arange(count + size)[:, None] == count + jnp.arange(size)
        own_BNC = jnp.broadcast_to(own, (rows, count + size, size))

        def join(old: Array, new: Array) -> Array:
            return jnp.concatenate([old, new], axis=1)

        return Graph(
            token_BN=join(graph.token_BN, token_BC),
            before_BN=join(graph.before_BN, before_BC),
            above_BNN=jnp.concatenate([above_BNN, own_BNC], axis=2),
            alive_BN=join(graph.alive_BN, alive_BC),
            score_BN=join(graph.score_BN, score_BC),
            edge_BEW=join(graph.edge_BEW, edge_BFW),
            sure_BEW=join(graph.sure_BEW, sure_BFW),
            expanded_BN=join(expanded_BN, none_BC),
        )


def unroll(graph: Graph, nodes: int, depth: int) -> Draft:
    """Turns a graph into the tree of its surest paths.

    Paths may pass a node again and again where edges make a circle; the depth ends
    them. Every path spells one of the graph, and siblings differ in their token.

    Args:
      graph: Nodes and edges.
      nodes: M of the tree, node 0 included.
      depth: Most edges of a path.

    Returns:
      The tree; parents stand before their children.
    """
    rows = graph.token_BN.shape[0]
    row_B = jnp.arange(rows)
    width = graph.edge_BEW.shape[2]

    def offers(node_B: Array, score_B: Array, depth_B: Array) -> Array:
        """Returns the scores of the paths that go on below a graph node."""
        at_B = graph.expanded_BN[row_B, jnp.maximum(node_B, 0)]
        safe_B = jnp.maximum(at_B, 0)
        sure_BW = score_B[:, None] + graph.sure_BEW[row_B, safe_B]
        ends_B = (at_B < 0) | (node_B < 0) | (depth_B >= depth)
        shut_BW = ends_B[:, None] | (graph.edge_BEW[row_B, safe_B] < 0)
        return jnp.where(shut_BW, _NEVER, sure_BW)

    zero_BM = jnp.zeros((rows, nodes), jnp.int32)
    offer_BMW = jnp.full((rows, nodes, width), _NEVER)
    zero_B = jnp.zeros((rows,), jnp.int32)
    offer_BMW = offer_BMW.at[:, 0].set(offers(zero_B, jnp.zeros((rows,)), zero_B))
    state = {
        "token": zero_BM.at[:, 0].set(graph.token_BN[:, 0]),
        "parent": zero_BM.at[:, 0].set(-1),
        "node": zero_BM,
        "depth": zero_BM,
        "valid": (zero_BM == 1).at[:, 0].set(True),
        "offer": offer_BMW,
    }

    def take(i: Array, state: dict[str, Array]) -> dict[str, Array]:
        flat = state["offer"].reshape(rows, nodes * width)
        best_B = jnp.argmax(flat, axis=1)
        score_B = flat[row_B, best_B]
        valid_B = jnp.isfinite(score_B)
        parent_B, rank_B = best_B // width, best_B % width
        from_B = graph.expanded_BN[row_B, state["node"][row_B, parent_B]]
        node_B = graph.edge_BEW[row_B, jnp.maximum(from_B, 0), rank_B]
        node_B = jnp.where(valid_B, node_B, -1)
        depth_B = state["depth"][row_B, parent_B] + 1
        offer = state["offer"].at[row_B, parent_B, rank_B].set(_NEVER)
        token_B = graph.token_BN[row_B, jnp.maximum(node_B, 0)]
        return {
            "token": state["token"].at[:, i].set(token_B),
            "parent": state["parent"].at[:, i].set(jnp.where(valid_B, parent_B, 0)),
            "node": state["node"].at[:, i].set(node_B),
            "depth": state["depth"].at[:, i].set(depth_B),
            "valid": state["valid"].at[:, i].set(valid_B),
            "offer": offer.at[:, i].set(offers(node_B, score_B, depth_B)),
        }

    state = jax.lax.fori_loop(1, nodes, take, state)
    return Draft(state["token"], state["valid"], state["parent"])

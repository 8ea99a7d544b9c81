"""Trees of draft nodes: which shape is worth most, and which candidates to keep.

Letters: B rows, M draft nodes, N candidates, W draft width, D depth of a tree (in this
module not a model's width).
"""

import dataclasses
import heapq
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.protocol import Draft

__all__ = ["StaticTree", "keep_best"]


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """The shape of a tree, known before anything is compiled.

    Attributes:
      parents: The parent of every node, -1 for node 0.
      ranks: Which of its parent's candidates a node is, from 0; -1 for node 0.
      depths: Distance of every node from node 0.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def nodes(self) -> int:
        """M."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """D of the deepest node."""
        return max(self.depths)

    @property
    def width(self) -> int:
        """W, the most candidates that are asked of a node."""
        return max(self.ranks) + 1

    def inner(self, depth: int) -> tuple[int, ...]:
        """Returns the nodes at a depth that have children."""
        parents = set(self.parents)
        return tuple(
            i for i, d in enumerate(self.depths) if d == depth and i in parents
        )

    @classmethod
    def from_accuracy(
        cls, accuracy_DR: Sequence[Sequence[float]], nodes: int
    ) -> "StaticTree":
        """Returns the tree of most expected tokens a pass.

        A node's value is the chance that it is accepted: the product of the accuracies
        down its path. Values fall along paths, so taking the best nodes one after
        another gives the optimum.

        Args:
          accuracy_DR: For each depth the chance that the candidate of each rank is the
            target's token, given that the path above it was right.
          nodes: M, node 0 included.

        Raises:
          ConfigError: There are not so many nodes, or an accuracy is no probability.

        Source: Medusa (arXiv 2401.10774), section 2.3.3; Sequoia (arXiv 2402.12374)
          solves the same problem with a model of time.
        """
        _check_accuracy(accuracy_DR)
        parents, ranks, depths, values = [-1], [-1], [0], [1.0]
        heap: list[tuple[float, int, int, int]] = []

        def offer(parent: int, rank: int) -> None:
            depth = depths[parent]
            if depth < len(accuracy_DR) and rank < len(accuracy_DR[depth]):
                value = values[parent] * accuracy_DR[depth][rank]
                heapq.heappush(heap, (-value, depth, parent, rank))

        offer(0, 0)
        while len(parents) < nodes:
            if not heap:
                raise ConfigError(
                    f"cannot draft: the tree has {len(parents)} nodes at most, "
                    f"expected {nodes}. Give accuracies of more ranks or depths, or "
                    f"lower nodes."
                )
            value, depth, parent, rank = heapq.heappop(heap)
            parents.append(parent)
            ranks.append(rank)
            depths.append(depth + 1)
            values.append(-value)
            offer(parent, rank + 1)
            offer(len(parents) - 1, 0)
        return cls(tuple(parents), tuple(ranks), tuple(depths))

    def expected_tokens(self, accuracy_DR: Sequence[Sequence[float]]) -> float:
        """Returns the tokens a pass that the accuracies promise: 1 + sum of values."""
        values = [1.0]
        for i in range(1, self.nodes):
            step = accuracy_DR[self.depths[i] - 1][self.ranks[i]]
            values.append(values[self.parents[i]] * step)
        return float(sum(values))

    def draft(self, pending_B: Array, tokens: Sequence[Array]) -> Draft:
        """Fills the shape.

        Args:
          pending_B: int32 tokens of node 0.
          tokens: int32 `[B]` of every other node, in order.
        """
        tokens_BM = jnp.stack([pending_B, *tokens], axis=1)
        parents_BM = jnp.broadcast_to(jnp.asarray(self.parents), tokens_BM.shape)
        return Draft(tokens_BM, jnp.ones_like(tokens_BM, bool), parents_BM)


def _check_accuracy(accuracy_DR: Sequence[Sequence[float]]) -> None:
    table = [np.asarray(row, float) for row in accuracy_DR]
    for depth, row in enumerate(table):
        if not row.size or (row < 0).any() or row.sum() > 1 + 1e-6:
            raise ConfigError(
                f"cannot draft: accuracies at depth {depth + 1} are {row.tolist()}, "
                f"expected one or more probabilities that sum to at most 1. Measure "
                f"them again."
            )


def keep_best(
    pending_B: Array,
    tokens_BN: Array,
    parents_BN: Array,
    score_BN: Array,
    nodes: int,
) -> Draft:
    """Keeps the best candidates of a tree that grew too large.

    Args:
      pending_B: int32 tokens of node 0.
      tokens_BN: int32 tokens of the candidates, parents before children.
      parents_BN: int32 index of the parent among the candidates, -1 for node 0.
      score_BN: float32; never above the parent's. -inf keeps a candidate out.
      nodes: M, node 0 included.

    Returns:
      Node 0 and the M - 1 best in order of creation; ties go to the earlier, so an
      ancestor is never left out.

    Source: EAGLE-2 (arXiv 2406.16858), section 4.2.
    """
    rows, count = tokens_BN.shape
    best_BM = jnp.sort(jax.lax.top_k(score_BN, min(nodes - 1, count))[1], axis=1)
    # The place of every candidate among those kept; node 0 stands before them.
    row_B1 = jnp.arange(rows)[:, None]
    place_BN = jnp.zeros((rows, count + 1), jnp.int32)
    place_BN = place_BN.at[row_B1, best_BM + 1].set(
        jnp.arange(1, best_BM.shape[1] + 1, dtype=jnp.int32)
    )
    parents_BM = jnp.take_along_axis(parents_BN, best_BM, axis=1)
    parents_BM = jnp.take_along_axis(place_BN, parents_BM + 1, axis=1)
    valid_BM = jnp.isfinite(jnp.take_along_axis(score_BN, best_BM, axis=1))
    # A candidate that is left out hangs from node 0, where nobody sees it.
    parents_BM = jnp.where(valid_BM, parents_BM, 0)
    tokens_BM = jnp.take_along_axis(tokens_BN, best_BM, axis=1)

    def whole(x_BM: Array, first: Array | int) -> Array:
        head = jnp.broadcast_to(jnp.asarray(first, x_BM.dtype), (rows,))[:, None]
        short = nodes - 1 - x_BM.shape[1]
        return jnp.pad(jnp.concatenate([head, x_BM], axis=1), ((0, 0), (0, short)))

    parents_BM = whole(parents_BM, -1)
    return Draft(whole(tokens_BM, pending_B), whole(valid_BM, True), parents_BM)

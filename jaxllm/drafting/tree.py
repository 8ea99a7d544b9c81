"""A drafting model's tree of likely continuations, of a fixed or a growing shape.

Letters: B rows, M draft nodes, N candidates so far, F frontier (nodes that a level
expands), W draft width, V vocabulary, D depth of the tree.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.attention.cache import DenseCache, NewKV
from jaxllm.attention.masks import Mask, ancestor
from jaxllm.attention.segments import Segment
from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.protocol import Committed, Draft, Params
from jaxllm.decoding.sampling import candidates
from jaxllm.drafting.draft_net import DraftNet, NetDrafter, NetState, add_pass
from jaxllm.drafting.trees import StaticTree, keep_best

__all__ = ["Expansion", "TreeDrafter"]

RANKS = (0.6, 0.15, 0.07, 0.04, 0.03)
"""Chance that the r-th candidate of a small story model is the target's token."""


@pytree_dataclass
class NodeCache:
    """What a level of draft nodes attends to: the text, and the nodes above it.

    Attributes:
      text: The committed tokens.
      k: For each stack the expanded nodes' keys `[l, B, K, E, H]`, E of them.
      v: Their values.
      position_BE: int32 their positions.
      sees_BFE: bool, which of them each node of the level sees.
    """

    text: DenseCache
    k: tuple[Array, ...]
    v: tuple[Array, ...]
    position_BE: Array
    sees_BFE: Array

    @property
    def capacity(self) -> int:
        """Slots of the text."""
        return self.text.capacity

    @property
    def length_B(self) -> Array:
        """Valid slots of the text."""
        return self.text.length_B

    def segments(self, stack: int, layer: Array | int) -> tuple[Segment, ...]:
        """Returns the text's segments and one of expanded nodes."""
        nodes = Segment(
            k_UKSH=self.k[stack],
            v_UKSH=self.v[stack],
            layer=layer,
            position_US=self.position_BE,
            mask=Mask("ancestor", (self.sees_BFE,)),
        )
        return (*self.text.segments(stack, layer), nodes)

    def append(self, *_: Any, **__: Any) -> "NodeCache":
        """Refuses: nodes are kept for one step only."""
        raise NotImplementedError("draft nodes are never appended")


class Expansion:
    """The levels of one tree as they are expanded by a drafting model.

    Not a tree of JAX: it lives while a step is traced.

    Attributes:
      net: The drafting model.
      state: Its state; counts grow with every level.
      committed: What is known.
      logits_BFV: The logits after the nodes of the last level.
    """

    def __init__(
        self, net: DraftNet, params: Params, state: NetState, committed: Committed
    ):
        self.net, self.params, self.committed = net, params, committed
        self.state = state
        self.logits_BFV: Array | None = None
        self.kv: list[NewKV] = []
        self.positions: list[Array] = []
        self.sees_BFE: Array | None = None

    def start(self, chunk: int) -> None:
        """Catches up; the level is then the pending token alone."""
        self.state, self.logits_BFV = self.net.catch_up(
            self.params, self.state, self.committed, chunk
        )
        rows = self.committed.length_B.shape[0]
        # The pending token stands in the cache, not among the nodes.
        self.sees_BFE = jnp.zeros((rows, 1, 0), bool)

    def candidates(self, depth: int, width: int) -> tuple[Array, Array]:
        """Returns tokens and their log confidence `[B, F, W]` below the last level.

        Args:
          depth: Of these tokens.
          width: W.
        """
        position_B1 = (self.committed.length_B + depth - 1)[:, None]
        assert self.logits_BFV is not None
        position_BF = jnp.broadcast_to(position_B1, self.logits_BFV.shape[:2])
        return candidates(
            self.logits_BFV,
            position_BF,
            self.committed.row_key_B,
            self.committed.choice,
            width,
        )

    def level(
        self, tokens_BF: Array, parent_BF: Array, depth: int, real_BF: Array
    ) -> None:
        """Expands the next level.

        Args:
          tokens_BF: int32.
          parent_BF: int32 index of each node's parent in the level before.
          depth: Of these nodes.
          real_BF: Which of them are worth counting.
        """
        rows, count = tokens_BF.shape
        length_B = self.committed.length_B
        position_BF = jnp.broadcast_to((length_B - 1 + depth)[:, None], (rows, count))
        assert self.sees_BFE is not None
        sees_BFE = jnp.take_along_axis(self.sees_BFE, parent_BF[..., None], axis=1)
        alone_BFF = jnp.broadcast_to(jnp.eye(count, dtype=bool), (rows, count, count))
        forward = self.net.forward(
            self.params,
            tokens_BF,
            position_BF,
            self._cache(sees_BFE),
            ancestor(alone_BFF),
        )
        self.kv.append(forward.new_kv)
        self.positions.append(position_BF)
        self.logits_BFV = forward.logits_BTV
        self.sees_BFE = jnp.concatenate([sees_BFE, alone_BFF], axis=2)
        self.state = add_pass(self.state, real_BF.sum(axis=1))

    def _cache(self, sees_BFE: Array) -> Any:
        if not self.kv:
            return self.state.cache
        pairs = [[p for p in kv if p is not None] for kv in self.kv]
        stacks = list(zip(*pairs, strict=True))
        return NodeCache(
            text=self.state.cache,
            k=tuple(jnp.concatenate([p[0] for p in s], axis=3) for s in stacks),
            v=tuple(jnp.concatenate([p[1] for p in s], axis=3) for s in stacks),
            position_BE=jnp.concatenate(self.positions, axis=1),
            sees_BFE=sees_BFE,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeDrafter(NetDrafter):
    """A drafting model's most likely continuations as a tree.

    Attributes:
      nodes: M, nodes that the target verifies, the pending one included.
      depth: D of the tree.
      width: W, candidates of a node.
      frontier: F, nodes that a level expands; W when None.
      shape: `dynamic` keeps the nodes that the model is surest of in this step;
        `static` the shape that is best for the given accuracies.
      accuracy: For `static`: the chance of each rank, the same at every depth.

    Source: EAGLE-2 (arXiv 2406.16858) for the dynamic tree, Medusa (arXiv 2401.10774)
      and Sequoia (arXiv 2402.12374) for the static one.
    """

    nodes: int = 8
    depth: int = 4
    width: int = 3
    frontier: int | None = None
    shape: Literal["dynamic", "static"] = "dynamic"
    accuracy: tuple[float, ...] = RANKS
    tree = True

    def __post_init__(self) -> None:
        least = {"nodes": 2, "depth": 1, "width": 1, "frontier": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(
                    f"cannot draft: tree.{name} is {value}, expected {low} or more. "
                    f"Correct it."
                )
        if self.shape == "static":
            self.static_tree()

    def static_tree(self) -> StaticTree:
        """Returns the shape that the accuracies ask for."""
        return StaticTree.from_accuracy((self.accuracy,) * self.depth, self.nodes)

    def propose(
        self, params: Params, state: NetState, committed: Committed
    ) -> tuple[NetState, Draft]:
        """Grows the tree, a forward of the model for each level."""
        growth = Expansion(self.bound_net, params, state, committed)
        growth.start(chunk=self.depth + 1)
        if self.shape == "static":
            draft = self._fill(growth)
        else:
            draft = self._grow(growth)
        return growth.state, draft

    def _fill(self, growth: Expansion) -> Draft:
        """Fills a static shape: every level expands its inner nodes."""
        tree = self.static_tree()
        tokens: dict[int, Array] = {}
        above: tuple[int, ...] = (0,)
        for depth in range(1, tree.depth + 1):
            found_BFW, _ = growth.candidates(depth, tree.width)
            for node in range(tree.nodes):
                if tree.depths[node] == depth:
                    at = above.index(tree.parents[node])
                    tokens[node] = found_BFW[:, at, tree.ranks[node]]
            inner = tree.inner(depth)
            if not inner:
                break
            tokens_BF = jnp.stack([tokens[i] for i in inner], axis=1)
            parents = jnp.asarray([above.index(tree.parents[i]) for i in inner])
            growth.level(
                tokens_BF,
                jnp.broadcast_to(parents, tokens_BF.shape),
                depth,
                jnp.ones_like(tokens_BF, bool),
            )
            above = inner
        ordered = [tokens[i] for i in range(1, tree.nodes)]
        return tree.draft(growth.committed.pending_B, ordered)

    def _grow(self, growth: Expansion) -> Draft:
        """Expands the surest nodes of every level, then keeps the surest of all."""
        rows = growth.committed.length_B.shape[0]
        frontier = self.frontier or self.width
        score_BF = jnp.zeros((rows, 1))
        index_BF = jnp.full((rows, 1), -1, jnp.int32)
        tokens, parents, scores, created = [], [], [], 0
        for depth in range(1, self.depth + 1):
            token_BFW, sure_BFW = growth.candidates(depth, self.width)
            score_BFW = score_BF[..., None] + sure_BFW
            flat = (rows, token_BFW.shape[1] * self.width)
            parent_BFW = jnp.broadcast_to(index_BF[..., None], token_BFW.shape)
            tokens.append(token_BFW.reshape(flat))
            parents.append(parent_BFW.reshape(flat))
            scores.append(score_BFW.reshape(flat))
            if depth == self.depth:
                break
            score_BF, best_BF = jax.lax.top_k(scores[-1], min(frontier, flat[1]))
            tokens_BF = jnp.take_along_axis(tokens[-1], best_BF, axis=1)
            index_BF = (created + best_BF).astype(jnp.int32)
            growth.level(
                tokens_BF, best_BF // self.width, depth, jnp.isfinite(score_BF)
            )
            created += flat[1]
        return keep_best(
            growth.committed.pending_B,
            jnp.concatenate(tokens, axis=1),
            jnp.concatenate(parents, axis=1),
            jnp.concatenate(scores, axis=1),
            self.nodes,
        )

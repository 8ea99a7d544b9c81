"""Shapes and selections of trees against exhaustive and plain references."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import ConfigError
from jaxllm.drafting.trees import StaticTree, keep_best

ACCURACY = [[0.6, 0.2, 0.1], [0.5, 0.3], [0.4]]


def every_path(accuracy_DR) -> dict[tuple[int, ...], float]:
    values = {}
    for depth in range(1, len(accuracy_DR) + 1):
        for path in itertools.product(*(range(len(r)) for r in accuracy_DR[:depth])):
            values[path] = float(
                np.prod([accuracy_DR[d][r] for d, r in enumerate(path)])
            )
    return values


@pytest.mark.parametrize("nodes", [2, 3, 5, 8, 12])
def test_the_best_tree_is_the_best_set_of_paths(nodes) -> None:
    tree = StaticTree.from_accuracy(ACCURACY, nodes)
    best = sorted(every_path(ACCURACY).values(), reverse=True)[: nodes - 1]
    assert tree.expected_tokens(ACCURACY) == pytest.approx(1 + sum(best))
    assert tree.nodes == nodes
    for i in range(1, nodes):
        assert tree.parents[i] < i
        assert tree.depths[i] == tree.depths[tree.parents[i]] + 1


def test_a_chain_is_a_tree_of_one_rank() -> None:
    tree = StaticTree.from_accuracy([[0.5]] * 4, 5)
    assert tree.parents == (-1, 0, 1, 2, 3)
    assert tree.ranks == (-1, 0, 0, 0, 0)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="the tree has 3 nodes at most, expected 4"):
        StaticTree.from_accuracy([[0.5, 0.2]], 4)
    with pytest.raises(ConfigError, match=r"depth 2 are \[0.8, 0.4\]"):
        StaticTree.from_accuracy([[0.5], [0.8, 0.4]], 2)


def keep_best_reference(tokens, parents, scores, nodes):
    """The paths of the best candidates, one row, in plain Python."""
    order = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    kept = [i for i in order[: nodes - 1] if np.isfinite(scores[i])]

    def path(i):
        return () if i < 0 else (*path(parents[i]), int(tokens[i]))

    return {path(i) for i in kept}


@st.composite
def trees(draw):
    count = draw(st.integers(1, 12))
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    steps = [draw(st.sampled_from([0.0, 0.5, 1.0, np.inf])) for _ in range(count)]
    scores = []
    for i, parent in enumerate(parents):
        scores.append((0.0 if parent < 0 else scores[parent]) - steps[i])
    # Tokens tell candidates apart, so that a path names one node.
    return np.arange(count) + 1, np.asarray(parents), np.asarray(scores)


@settings(max_examples=40)
@given(trees(), st.integers(2, 14))
def test_keeping_the_best_keeps_their_ancestors(tree, nodes) -> None:
    tokens, parents, scores = tree
    draft = keep_best(
        jnp.zeros((1,), jnp.int32),
        jnp.asarray(tokens, jnp.int32)[None],
        jnp.asarray(parents, jnp.int32)[None],
        jnp.asarray(scores, jnp.float32)[None],
        nodes,
    )
    token, parent, valid = (
        np.asarray(x[0]) for x in (draft.tokens_BM, draft.parents_BM, draft.valid_BM)
    )
    assert len(token) == nodes
    assert valid[0] and parent[0] == -1
    assert (parent[1:] < np.arange(1, nodes)).all()

    def path(i):
        return () if i == 0 else (*path(parent[i]), int(token[i]))

    found = {path(i) for i in range(1, nodes) if valid[i]}
    assert found == keep_best_reference(tokens, parents, scores, nodes)
    assert all(valid[parent[i]] for i in range(1, nodes) if valid[i])

"""Graphs of hypotheses: without merging they are trees, with it they spell paths."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.errors import ConfigError
from jaxllm.drafting.graph import Graph, unroll
from tests.decoding.toys import TEMPERATURES
from tests.drafting.toy_methods import ids, run, steps, toy_lm

EARLY = "model=target,layers=1"


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "options",
    [pytest.param("", marks=pytest.mark.slow), ",depth=3,width=4,frontier=5,nodes=14"],
)
def test_without_merging_it_is_the_dynamic_tree(options, temperature) -> None:
    tree = run(f"tree:{EARLY}{options}", temperature=temperature)
    graph = run(f"graph:{EARLY},merge_order=-1{options}", temperature=temperature)
    assert ids(tree) == ids(graph)
    assert steps(tree) == steps(graph)
    for a, b in zip(tree, graph, strict=True):
        assert a.stats["draft_tokens"] == b.stats["draft_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1])
def test_merging_keeps_the_text_and_expands_no_more_nodes(order) -> None:
    size = "depth=4,width=5,frontier=5,nodes=12"
    tree = run(f"graph:{EARLY},merge_order=-1,{size}", temperature=1.0)
    graph = run(f"graph:{EARLY},merge_order={order},{size}", temperature=1.0)
    assert ids(tree) == ids(graph)
    for a, b in zip(tree, graph, strict=True):
        level = "target[:1]"
        per_pass = [
            r.stats["draft_tokens"][level] / r.stats["draft_passes"][level]
            for r in (a, b)
        ]
        assert per_pass[1] <= per_pass[0] + 1e-9


def graph_of(tokens, edges, sure) -> Graph:
    """A graph of one row in which every node is expanded."""
    count, width = len(tokens), len(edges[0])
    return Graph(
        token_BN=jnp.asarray([tokens], jnp.int32),
        before_BN=jnp.zeros((1, count), jnp.int32),
        above_BNN=jnp.zeros((1, count, count), bool),
        alive_BN=jnp.ones((1, count), bool),
        score_BN=jnp.zeros((1, count)),
        edge_BEW=jnp.asarray([edges], jnp.int32).reshape(1, count, width),
        sure_BEW=jnp.asarray([sure], jnp.float32).reshape(1, count, width),
        expanded_BN=jnp.arange(count, dtype=jnp.int32)[None],
    )


def unroll_reference(tokens, edges, sure, nodes, depth):
    """The surest paths, found by listing all of them."""
    paths = []

    def visit(node, path, score):
        if len(path) == depth:
            return
        for target, step in zip(edges[node], sure[node], strict=True):
            if target >= 0:
                further = (*path, tokens[target])
                paths.append((score + step, further))
                visit(target, further, score + step)

    visit(0, (), 0.0)
    paths.sort(key=lambda x: -x[0])
    return {path for _, path in paths[: nodes - 1]}


@pytest.mark.parametrize("seed", range(6))
def test_unrolling_takes_the_surest_paths(seed) -> None:
    rng = np.random.default_rng(seed)
    count, width, nodes, depth = 6, 3, 10, 4
    tokens = list(range(10, 10 + count))
    # Edges may lead anywhere, also back: the depth ends a path.
    edges = [rng.permutation(count)[:width].tolist() for _ in range(count)]
    edges = [[-1 if rng.random() < 0.2 else e for e in row] for row in edges]
    sure = (-rng.random((count, width)) - 0.01).tolist()
    draft = unroll(graph_of(tokens, edges, sure), nodes, depth)
    token, parent, valid = (
        np.asarray(x[0]) for x in (draft.tokens_BM, draft.parents_BM, draft.valid_BM)
    )

    def path(i):
        return () if i == 0 else (*path(parent[i]), int(token[i]))

    found = [path(i) for i in range(1, nodes) if valid[i]]
    assert len(set(found)) == len(found)
    assert set(found) == unroll_reference(tokens, edges, sure, nodes, depth)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"graph\.merge_order is 2, expected -1 to 1"):
        jaxllm.bind(toy_lm(), "graph:merge_order=2")

"""Verification against a walk of the tree in plain Python."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.attention import ancestors_of
from jaxllm.decoding import Draft, match_reference
from jaxllm.decoding.verify import match_choices


@st.composite
def trees(draw):
    """Draws a batch of trees over four tokens, so that many nodes match."""
    rows, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    token = st.integers(0, 3)
    found = []
    for _ in range(rows):
        parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, nodes)]
        valid = [True]
        for parent in parents[1:]:
            valid.append(valid[parent] and draw(st.booleans() | st.just(True)))
        tokens = draw(st.lists(token, min_size=nodes, max_size=nodes))
        chosen = draw(st.lists(token, min_size=nodes, max_size=nodes))
        found.append((tokens, parents, valid, chosen))
    return found


@given(trees())
def test_tree_equals_the_walk(rows) -> None:
    tokens, parents, valid, chosen = (jnp.asarray(x) for x in zip(*rows, strict=True))
    depth = len(rows[0][0]) - 1
    verdict = match_choices(Draft(tokens, valid, parents), chosen, depth=depth)
    for row, given_row in enumerate(rows):
        path, token = match_reference(*given_row)
        count = int(verdict.num_accepted_B[row])
        assert verdict.path_BJ[row, : count + 1].tolist() == path
        assert set(verdict.path_BJ[row, count:].tolist()) == {path[-1]}
        assert int(verdict.next_token_B[row]) == token


@given(trees())
def test_chain_equals_the_walk(rows) -> None:
    nodes = len(rows[0][0])
    parents = list(range(-1, nodes - 1))
    rows = [(t, parents, [True, *v[1:]], c) for t, _, v, c in rows]
    # A chain's valid nodes trail off: a child of an invalid node is invalid.
    rows = [(t, p, np.cumprod(v).astype(bool).tolist(), c) for t, p, v, c in rows]
    tokens, _, valid, chosen = (jnp.asarray(x) for x in zip(*rows, strict=True))
    verdict = match_choices(Draft(tokens, valid), chosen, depth=nodes - 1)
    for row, given_row in enumerate(rows):
        path, token = match_reference(*given_row)
        count = int(verdict.num_accepted_B[row])
        assert verdict.path_BJ[row, : count + 1].tolist() == path
        assert int(verdict.next_token_B[row]) == token


@given(trees())
def test_depth_counts_ancestors(rows) -> None:
    tokens, parents, valid, _ = (jnp.asarray(x) for x in zip(*rows, strict=True))
    depth_BM = Draft(tokens, valid, parents).depth_BM
    np.testing.assert_array_equal(depth_BM, ancestors_of(parents).sum(-1) - 1)

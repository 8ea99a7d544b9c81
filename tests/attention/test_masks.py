"""Letters: B rows, T queries, S keys, M draft nodes."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.attention import (
    CAUSAL,
    FULL,
    Mask,
    allowed,
    ancestor,
    ancestors_of,
    packed,
)

B, T, S = 2, 3, 5
QUERY_POSITION_BT = np.asarray([[3, 0, 4], [7, 2, 2]], np.int32)
KEY_POSITION_BS = np.asarray([[0, 1, 2, 3, 4], [9, 2, 7, 0, 1]], np.int32)
QUERY_DOCUMENT_BT = np.asarray([[0, 1, -1], [2, 2, 0]], np.int32)
KEY_DOCUMENT_BS = np.asarray([[0, 0, 1, 1, -1], [2, 0, 2, 2, 0]], np.int32)
ANCESTOR_BTS = np.random.default_rng(0).random((B, T, S)) < 0.5

PACKED = packed(jnp.asarray(QUERY_DOCUMENT_BT), jnp.asarray(KEY_DOCUMENT_BS))
MASKS = {
    "full": FULL,
    "causal": CAUSAL,
    "ancestor": ancestor(jnp.asarray(ANCESTOR_BTS)),
    "packed": PACKED,
    "causal & ancestor": CAUSAL & ancestor(jnp.asarray(ANCESTOR_BTS)),
    "full & packed & ancestor": FULL & PACKED & ancestor(jnp.asarray(ANCESTOR_BTS)),
}


def may_see(kind, b, t, s):
    """One entry of a mask, by its definition."""
    query, key = QUERY_POSITION_BT[b, t], KEY_POSITION_BS[b, s]
    document = QUERY_DOCUMENT_BT[b, t]
    if kind == "full":
        return True
    if kind == "causal":
        return key <= query
    if kind == "ancestor":
        return ANCESTOR_BTS[b, t, s]
    if kind == "packed":
        return document >= 0 and document == KEY_DOCUMENT_BS[b, s] and key <= query
    return all(may_see(part, b, t, s) for part in kind.split(" & "))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_its_definition_written_out(kind, compiled):
    form = jax.jit(allowed) if compiled else allowed
    matrix = form(MASKS[kind], QUERY_POSITION_BT, KEY_POSITION_BS)
    assert matrix.dtype == bool
    expected = [
        [[may_see(kind, b, t, s) for s in range(S)] for t in range(T)] for b in range(B)
    ]
    np.testing.assert_array_equal(np.broadcast_to(matrix, (B, T, S)), expected)


def test_a_padding_query_sees_not_even_padding():
    matrix = allowed(PACKED, QUERY_POSITION_BT, KEY_POSITION_BS)
    assert not matrix[0, 2].any()
    assert KEY_DOCUMENT_BS[0, 4] == QUERY_DOCUMENT_BT[0, 2] == -1


def test_the_keys_of_one_user_serve_every_row():
    matrix = allowed(CAUSAL, QUERY_POSITION_BT, KEY_POSITION_BS[:1])
    expected = KEY_POSITION_BS[0] <= QUERY_POSITION_BT[:, :, None]
    np.testing.assert_array_equal(matrix, expected)


def test_an_unknown_kind_is_a_bug():
    with pytest.raises(AssertionError, match="diagonal"):
        allowed(Mask("diagonal"), QUERY_POSITION_BT, KEY_POSITION_BS)


def test_a_mask_is_a_small_tree():
    assert jax.tree.leaves(FULL) == []
    assert hash(CAUSAL) == hash(Mask("causal"))
    assert len(jax.tree.leaves(CAUSAL & PACKED)) == 2


def walk_to_the_root(parents_M):
    """Each node with everything above it, as a matrix."""
    nodes = len(parents_M)
    reach_MM = np.zeros((nodes, nodes), bool)
    for node in range(nodes):
        above = node
        reach_MM[node, node] = True
        while parents_M[above] not in (-1, above):
            above = parents_M[above]
            reach_MM[node, above] = True
    return reach_MM


@st.composite
def forests(draw):
    """Two forests of one size; a node that is its own parent is padding."""
    nodes = draw(st.sampled_from([1, 2, 3, 8, 21]))
    parent = [st.integers(-1, node) for node in range(nodes)]
    return [[draw(p) for p in parent] for _ in range(2)]


in_one_go = jax.jit(ancestors_of)


@hypothesis.given(parents_BM=forests())
@hypothesis.settings(max_examples=50)
def test_ancestors_are_found_by_walking_to_the_root(parents_BM):
    reach_BMM = in_one_go(jnp.asarray(parents_BM, jnp.int32))
    assert reach_BMM.dtype == bool
    expected = [walk_to_the_root(parents_M) for parents_M in parents_BM]
    np.testing.assert_array_equal(reach_BMM, expected)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 9, 17, 65])
def test_a_chain_sees_all_that_came_before(nodes):
    parents_BM = jnp.arange(-1, nodes - 1, dtype=jnp.int32)[None]
    reach_MM = in_one_go(parents_BM)[0]
    np.testing.assert_array_equal(reach_MM, np.tri(nodes, dtype=bool))

"""A tree in two: nothing is lost, and each side holds its own arrays only."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.core.partition import join, path_names, split
from jaxllm.quantization import Int8

NAMES = st.sampled_from(["kernel", "bias", "scale"])
TREES = st.recursive(
    st.integers(0, 9).map(jnp.float32),
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.none()
    ),
    max_leaves=8,
)


@given(TREES, st.sets(NAMES))
def test_what_is_split_is_joined_again(tree, chosen):
    first, second = split(tree, lambda path, x: bool(chosen & set(path)))
    whole = join(first, second)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    assert jax.tree.leaves(whole) == jax.tree.leaves(tree)
    assert jax.tree.leaves(join(second, first)) == jax.tree.leaves(tree)
    for keys, _ in jax.tree_util.tree_leaves_with_path(first):
        assert chosen & set(path_names(keys))
    for keys, _ in jax.tree_util.tree_leaves_with_path(second):
        assert not chosen & set(path_names(keys))


def test_a_path_names_keys_indices_and_fields():
    leaf = Int8().quantize(jnp.ones((4, 4)))
    seen = {}
    split({"a": ({"kernel": leaf},)}, lambda path, x: seen.setdefault(path, x) is x)
    assert list(seen) == [("a", 0, "kernel", "values"), ("a", 0, "kernel", "scale")]
    assert seen["a", 0, "kernel", "values"] is leaf.values


def test_a_gradient_by_one_side_has_its_form():
    tree = {"w": jnp.float32(3), "n": jnp.int32(2), "v": jnp.float32(5)}
    trained, frozen = split(tree, lambda path, x: path == ("w",))

    def loss(trained):
        whole = join(trained, frozen)
        return whole["w"] ** whole["n"] * whole["v"]

    assert jax.jit(jax.grad(loss))(trained) == {"w": 30, "n": None, "v": None}


def test_sides_that_overlap_or_differ_are_refused():
    with pytest.raises(ValueError, match="both sides"):
        join({"a": 1, "b": None}, {"a": 2, "b": 3})
    with pytest.raises(ValueError):
        join({"a": 1}, {"b": 2})

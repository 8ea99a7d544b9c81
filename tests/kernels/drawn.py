"""Operands for the matmul kernels, drawn for abstract arguments, and their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def drawn(tree, seed=0):
    """Arrays of the shapes and dtypes of a tree: normal floats, all integers."""
    rng = np.random.default_rng(seed)

    def draw(a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            limits = jnp.iinfo(a.dtype)
            low, high = max(limits.min, -127), min(limits.max, 255)
            return jnp.asarray(rng.integers(low, high + 1, a.shape), a.dtype)
        return jnp.asarray(rng.normal(size=a.shape), a.dtype)

    return jax.tree.map(draw, tree)


def difference(got, expected):
    """The largest difference, relative to the largest number expected."""
    got, expected = np.float64(got), np.float64(expected)
    assert got.shape == expected.shape
    return np.max(np.abs(got - expected)) / np.max(np.abs(expected))


def slow(*values):
    """Parameters of a test that runs in the slow stage only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(shapes, *quick):
    """Shapes as parameters, all slow but those named: a program takes most of a second.

    All of them run in the slow stage and the quick ones in every one.
    """
    assert set(quick) <= {shape.name for shape in shapes}
    return [
        pytest.param(
            shape,
            id=shape.name,
            marks=() if shape.name in quick else pytest.mark.slow,
        )
        for shape in shapes
    ]

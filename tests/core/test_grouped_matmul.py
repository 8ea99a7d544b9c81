"""Letters: M rows, D and F the axes of a weight, E groups, L layers."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.core import grouped_matmul, grouped_matmul_reference, pytree_dataclass
from jaxllm.core.einsum import _ragged

D, F = 5, 3


def ragged(x_MD, w_EDF, group_sizes_E):
    """The form for TPUs, with the rows past the groups cleared as there."""
    y_MF = _ragged(x_MD, w_EDF, group_sizes_E)
    inside_M = jnp.arange(x_MD.shape[0]) < group_sizes_E.sum()
    return jnp.where(inside_M[:, None], y_MF, 0).astype(x_MD.dtype)


FORMS = {
    "default": jax.jit(grouped_matmul),
    "reference": jax.jit(grouped_matmul_reference),
    "ragged": jax.jit(ragged),
}
# Rows and groups: one of each, fewer rows than groups, blocks of 4 and 32 rows.
SIZES = [(1, 1), (3, 8), (12, 4), (70, 2)]


@pytree_dataclass
class Halved:
    """A leaf that stands for half an array and cannot multiply groups."""

    double: jax.Array

    def dequantize(self, dtype):
        return (self.double / 2).astype(dtype)


class Counted(Halved):
    def grouped_matmul(self, x_MD, group_sizes_E):
        return x_MD, self, group_sizes_E


@functools.cache
def operands(rows, groups, dtype=jnp.float32):
    """Whole numbers small enough for every sum to be exact."""
    random = np.random.default_rng(rows)
    x_MD = random.integers(-4, 5, (rows, D))
    w_EDF = random.integers(-4, 5, (groups, D, F))
    return jnp.asarray(x_MD, dtype), jnp.asarray(w_EDF, dtype)


def row_by_row(x_MD, w_EDF, group_sizes_E):
    x_MD, w_EDF = np.asarray(x_MD, np.float32), np.asarray(w_EDF, np.float32)
    y_MF = np.zeros((x_MD.shape[0], w_EDF.shape[2]), np.float32)
    row = 0
    for group, size in enumerate(group_sizes_E):
        for _ in range(size):
            y_MF[row] = x_MD[row] @ w_EDF[group]
            row += 1
    return y_MF


@st.composite
def problems(draw):
    rows, groups = draw(st.sampled_from(SIZES))
    cut = st.integers(0, rows)
    cuts = sorted(draw(st.lists(cut, min_size=groups, max_size=groups)))
    return rows, groups, [b - a for a, b in zip([0, *cuts], cuts, strict=False)]


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(problem=problems())
@hypothesis.example((12, 4, [3, 3, 3, 3]))
@hypothesis.example((12, 4, [12, 0, 0, 0]))
@hypothesis.example((12, 4, [0, 0, 0, 12]))
@hypothesis.example((12, 4, [0, 5, 0, 7]))
@hypothesis.example((12, 4, [0, 2, 0, 1]))
@hypothesis.example((12, 4, [0, 0, 0, 0]))
@hypothesis.example((1, 1, [1]))
@hypothesis.example((1, 1, [0]))
@hypothesis.example((3, 8, [0, 0, 1, 0, 1, 0, 0, 1]))
@hypothesis.example((70, 2, [1, 69]))
@hypothesis.example((70, 2, [33, 37]))
@hypothesis.settings(max_examples=40)
def test_every_row_meets_the_matrix_of_its_group(form, problem):
    rows, groups, sizes = problem
    x_MD, w_EDF = operands(rows, groups)
    y_MF = FORMS[form](x_MD, w_EDF, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_array_equal(y_MF, row_by_row(x_MD, w_EDF, sizes))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_accumulates_in_float32(form):
    x_MD = jnp.ones((4, 1024), jnp.bfloat16)
    w_EDF = jnp.full((2, 1024, 1), 2.0**-9, jnp.bfloat16).at[:, 0].set(1.0)
    y_MF = FORMS[form](x_MD, w_EDF, jnp.asarray([1, 2]))
    assert y_MF.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_MF[:, 0], [3.0, 3.0, 3.0, 0.0])


def test_one_group_is_a_plain_product():
    x_MD, w_EDF = operands(12, 1)
    y_MF = grouped_matmul(x_MD, w_EDF, jnp.asarray([12]))
    np.testing.assert_array_equal(y_MF, x_MD @ w_EDF[0])


def test_garbage_past_the_groups_is_not_read():
    x_MD, w_EDF = operands(12, 4)
    sizes = [2, 0, 5, 1]
    y_MF = grouped_matmul(x_MD.at[8:].set(jnp.nan), w_EDF, jnp.asarray(sizes))
    np.testing.assert_array_equal(y_MF, row_by_row(x_MD, w_EDF, sizes))


@pytest.mark.parametrize("form", ["default", "ragged"])
@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [0, 12, 0, 0], [0, 4, 0, 3]])
def test_gradients_equal_those_of_the_reference(form, sizes):
    x_MD, w_EDF = operands(12, 4)
    c_MF = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (12, F)), jnp.float32)
    sizes_E = jnp.asarray(sizes)

    def gradient(multiply):
        def loss(x_MD, w_EDF):
            return (multiply(x_MD, w_EDF, sizes_E) * c_MF).sum()

        return jax.grad(loss, (0, 1))(x_MD, w_EDF)

    x_bar, w_bar = gradient(FORMS[form])
    x_expected, w_expected = gradient(grouped_matmul_reference)
    np.testing.assert_array_equal(x_bar, x_expected)
    np.testing.assert_array_equal(w_bar, w_expected)
    assert np.any(np.asarray(w_bar))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_leaf_is_dequantized_in_the_dtype_of_the_rows(dtype):
    x_MD, w_EDF = operands(12, 4, dtype)
    sizes = [3, 0, 4, 2]
    for multiply in (grouped_matmul, grouped_matmul_reference):
        y_MF = multiply(x_MD, Halved(w_EDF), jnp.asarray(sizes))
        assert y_MF.dtype == dtype
        np.testing.assert_array_equal(y_MF, row_by_row(x_MD, w_EDF / 2, sizes))


def test_a_leaf_that_multiplies_groups_is_asked():
    x_MD, w_EDF = operands(12, 4)
    leaf, sizes_E = Counted(w_EDF), jnp.asarray([3, 3, 3, 3])
    got = grouped_matmul(x_MD, leaf, sizes_E)
    assert got[0] is x_MD
    assert got[1] is leaf
    assert got[2] is sizes_E


def test_stacked_experts_are_scanned():
    x_MD, w_EDF = operands(12, 4)
    w_LEDF = jnp.stack([w_EDF, -w_EDF])
    sizes = [5, 0, 1, 6]

    @jax.jit
    def scanned(leaf):
        def layer(carry, leaf):
            return carry, grouped_matmul(x_MD, leaf, jnp.asarray(sizes))

        return jax.lax.scan(layer, 0, leaf)[1]

    y_MF = row_by_row(x_MD, w_EDF, sizes)
    for leaf in (w_LEDF, Halved(2 * w_LEDF)):
        np.testing.assert_array_equal(scanned(leaf), [y_MF, -y_MF])


def test_only_a_tpu_is_given_the_ragged_product():
    shapes = (
        jax.ShapeDtypeStruct((64, 16), jnp.float32),
        jax.ShapeDtypeStruct((4, 16, 8), jnp.float32),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    for platform in ("cpu", "cuda", "tpu"):
        traced = jax.jit(grouped_matmul).trace(*shapes)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("ragged_dot" in text) == (platform == "tpu"), platform

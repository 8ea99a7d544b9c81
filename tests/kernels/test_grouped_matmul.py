"""`grouped_matmul`: every form against a loop over groups, for ragged groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxllm import core
from pallas_kernels.dispatch import Target
from pallas_kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_blocked,
    grouped_matmul_ragged,
    grouped_matmul_reference,
)
from pallas_kernels.grouped_matmul.shapes import SHAPES, Shape, obstacle
from pallas_kernels.quant_matmul import IntWeight
from pallas_kernels.quant_matmul.shapes import Shape as Matrix
from tests.kernels.drawn import difference, drawn, slow, slow_but

QUICK = (
    "5-of-37x100x70-w16-float32",
    "4-of-50x300x130-w8-int8",
)
LIMIT = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-6}
# Layers of a stack have a test of their own.
SMALL = [
    s
    for s in SHAPES
    if s.experts * s.matrix.depth * s.matrix.features < 2**21 and not s.matrix.layers
]


def plain(experts, rows, depth=40, features=24, **rest):
    matrix = Matrix(
        **{"dtype": "float32", "bits": 16, **rest},
        rows=rows,
        depth=depth,
        features=features,
    )
    return Shape(experts=experts, matrix=matrix)


def by_loop(x, w, sizes):
    """Group by group, in float64."""
    y, start = np.zeros((x.shape[0], w.shape[-1])), 0
    for size, w_DF in zip(sizes, np.float64(w), strict=True):
        stop = min(start + int(size), x.shape[0])
        y[start:stop] = np.float64(x[start:stop]) @ w_DF
        start = stop
    return y


@pytest.mark.parametrize("shape", slow_but(SMALL, *QUICK))
def test_forms_agree(shape):
    x, w, _, x_scale = drawn(shape.arguments())
    E, M = shape.experts, shape.matrix.rows
    some = np.random.default_rng(1).multinomial(M - 1, np.ones(E) / E)
    args = (x, w, jnp.asarray(some, jnp.int32), x_scale)  # the last row has no group
    call = functools.partial(grouped_matmul, out_dtype=jnp.float32)
    expected = jax.jit(functools.partial(call, implementation="reference"))(*args)
    assert not expected[-1].any()
    for implementation in ("interpret", None):
        got = jax.jit(functools.partial(call, implementation=implementation))(*args)
        assert difference(got, expected) < LIMIT[shape.matrix.dtype]


RAGGED = plain(4, 21)


@functools.cache
def compiled(form):
    if form == "interpret":
        form = functools.partial(
            grouped_matmul, implementation=form, block={"rows": 8, "features": 128}
        )
    return jax.jit(form)


@given(st.lists(st.integers(0, 30), min_size=4, max_size=4))
@example([0, 0, 0, 0])
@example([21, 0, 0, 0])
@example([0, 0, 0, 21])
@example([0, 8, 0, 8])
@example([7, 9, 1, 4])
@example([30, 30, 0, 1])
@settings(max_examples=8)
def test_any_sizes_give_the_product_group_by_group(sizes):
    x, w, _, _ = drawn(RAGGED.arguments())
    expected = by_loop(x, w, sizes)
    inside = min(sum(sizes), 21)
    # Nothing is read of rows and matrices that meet no other.
    x = x.at[inside:].set(jnp.nan)
    unused = [size == 0 or sum(sizes[:e]) >= 21 for e, size in enumerate(sizes)]
    w = jnp.where(jnp.array(unused)[:, None, None], jnp.nan, w)
    for form in (grouped_matmul_reference, grouped_matmul_blocked, "interpret"):
        got = np.asarray(compiled(form)(x, w, jnp.array(sizes)))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, expected, atol=1e-5 * 40)
        assert not got[inside:].any()


@pytest.mark.parametrize("sizes", [[4, 0, 3], [1, 2, 1]], ids=str)
def test_the_ragged_form_and_the_door_of_the_core_agree(sizes):
    x, w, _, _ = drawn(plain(3, 7).arguments(), seed=1)
    expected = by_loop(x, w, sizes)
    sizes = jnp.array(sizes)
    for form in (
        grouped_matmul_ragged,
        core.grouped_matmul,
    ):
        assert difference(jax.jit(form)(x, w, sizes), expected) < 1e-5


@pytest.mark.slow
def test_any_block_gives_the_same():
    # Tiles of depth that do not divide: what lies past a floating matrix may be NaN.
    shape = plain(3, 70, 300, 200)
    x, w, _, _ = drawn(shape.arguments(), seed=2)
    sizes = jnp.array([33, 0, 35])
    expected = grouped_matmul_reference(x, w, sizes)
    for rows, features, depth in ((8, 128, 128), (64, 512, 256)):
        block = {"rows": rows, "features": features, "depth": depth}
        call = functools.partial(
            grouped_matmul, implementation="interpret", block=block
        )
        assert difference(jax.jit(call)(x, w, sizes), expected) < 1e-5


def test_a_row_does_not_depend_on_the_other_groups():
    x, w, _, _ = drawn(plain(3, 40).arguments(), seed=3)
    alone = jax.jit(grouped_matmul)(x[5:7], w, jnp.array([0, 2, 0]))
    together = jax.jit(grouped_matmul)(x, w, jnp.array([5, 3, 20]))
    np.testing.assert_allclose(alone, together[5:7], rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_reference():
    x, w, _, _ = drawn(plain(3, 12).arguments(), seed=4)
    sizes = jnp.array([5, 0, 6])

    def loss(form, x, w):
        return (form(x, w, sizes) ** 2).sum()

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, form), argnums=(0, 1)))(x, w)
        for form in (grouped_matmul, grouped_matmul_reference)
    )
    for g, e in zip(got, expected, strict=True):
        assert difference(g, e) < 1e-5
    assert not got[1][1].any()


@pytest.mark.parametrize("bits", [slow(16), 8])
def test_layers_of_a_stack_inside_loops_and_shard_map(bits):
    shape = plain(3, 10, 128, 128, bits=bits, layers=2)
    x, w, _, _ = drawn(shape.arguments(), seed=5)
    if bits == 8:
        w = w._replace(scale=w.scale / 1000)
    sizes = jnp.array([3, 0, 6])

    def network(implementation, x, w):
        def layer(x, i):
            y = grouped_matmul(x, w, sizes, layer=i, implementation=implementation)
            return y, None

        def twice(state):
            return state[0] + 1, jax.lax.scan(layer, state[1], jnp.arange(2))[0]

        return jax.lax.while_loop(lambda s: s[0] < 2, twice, (0, x))[1]

    expected = jax.jit(functools.partial(network, "reference"))(x, w)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for implementation in ("interpret", None):
        mapped = jax.shard_map(
            functools.partial(network, implementation),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        assert difference(jax.jit(mapped)(x, w), expected) < 1e-5


def test_a_named_implementation_fails_where_it_cannot_run():
    x, w, sizes, _ = drawn(plain(3, 7).arguments())
    for name in ("tpu", "gpu"):  # this is a CPU; there is no kernel for GPUs
        with pytest.raises(NotImplementedError, match="grouped_matmul"):
            grouped_matmul(x, w, sizes, implementation=name)
    weight = IntWeight(jnp.zeros((3, 40, 8), jnp.int8), *[jnp.ones((3, 1, 8))] * 2)
    with pytest.raises(ValueError, match="zero points"):
        grouped_matmul(x, weight, sizes, implementation="interpret")
    assert grouped_matmul(x, weight, sizes).shape == (7, 8)


def test_what_a_generation_cannot_run():
    int8 = plain(3, 7, bits=8, dtype="int8")
    assert "int8" in obstacle(int8, Target("tpu", "v4"))
    assert obstacle(int8, Target("tpu", "v5e")) is None
    assert "no groups" in obstacle(plain(0, 7), Target("tpu", "v5e"))


@pytest.mark.parametrize(
    ("w", "scale", "x_scale", "message"),
    [
        ((2, 40, 8), None, None, "weights"),
        ((3, 41, 8), None, None, "weights"),
        ((3, 40, 8), (3, 1, 9), None, "scale"),
        ((3, 40, 8), (3, 7, 8), None, "divisor of 40"),
        ((3, 40, 8), None, (6,), "expected one for each of 7 rows"),
    ],
)
def test_operands_that_do_not_belong_together(w, scale, x_scale, message):
    weight = jnp.zeros(w)
    if scale is not None:
        weight = IntWeight(jnp.zeros(w, jnp.int8), jnp.ones(scale))
    x_scale = None if x_scale is None else jnp.ones(x_scale)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.ones((7, 40)), weight, jnp.array([1, 2, 3]), x_scale)


def test_integer_rows_need_integer_weights():
    with pytest.raises(ValueError, match="floating weights and rows"):
        grouped_matmul(
            jnp.ones((7, 40), jnp.int8), jnp.ones((3, 40, 8)), jnp.array([1, 2, 3])
        )

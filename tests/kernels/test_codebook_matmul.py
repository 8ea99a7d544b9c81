"""`codebook_matmul`: the reference by hand, and the kernel against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.codebook_matmul import (
    CodebookWeight,
    codebook_matmul,
    codebook_matmul_reference,
)
from pallas_kernels.codebook_matmul.shapes import SHAPES, Shape, obstacle
from pallas_kernels.dispatch import Target
from pallas_kernels.quant_matmul import IntWeight, pack_int4, quant_matmul
from tests.kernels.drawn import difference, drawn, slow, slow_but

QUICK = (
    "1x300x70-c1x1x16x1-float32",
    "5x1280x200-c4x1x16x1-g128-selected-packed-float32",
    "3x768x136-c3x17x16x2-float32",
)
LIMIT = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-6}
# Layers of a stack have a test of their own.
SMALL = [s for s in SHAPES if s.depth * s.features < 2**19 and not s.layers]

reference = jax.jit(codebook_matmul_reference, static_argnames=("packed", "out_dtype"))


def operands(shape, seed=0):
    """Operands whose codes and selections are in range, and the codes unpacked."""
    x, weight, x_scale = drawn(shape.arguments(), seed)
    rng = np.random.default_rng(seed)
    U, _, C, Z = shape.codebook
    stack = (shape.layers,) if shape.layers else ()
    codes = rng.integers(0, C, (*stack, shape.depth // Z, shape.features))
    stored = jnp.asarray(codes, jnp.uint8)
    weight = weight._replace(codes=pack_int4(stored) if shape.packed else stored)
    if shape.selected:
        select = rng.integers(0, U, weight.select.shape)
        weight = weight._replace(select=jnp.asarray(select, jnp.int32))
    return (x, weight, x_scale), codes


def dense(shape, weight, codes):
    """The weight in float64, column by column and tuple by tuple."""
    U, W, _, Z = shape.codebook
    book = np.float64(weight.codebook)
    w = np.zeros((shape.depth, shape.features))
    group = shape.depth // max(shape.groups, 1)
    for row in range(0, shape.depth, Z):
        part = np.full(shape.features, row * U // shape.depth)
        if shape.selected:
            part = np.asarray(weight.select)[row // group]
        column = np.arange(shape.features) * W // shape.features
        w[row : row + Z] = book[part, column, codes[row // Z]].T
    if shape.groups:
        w *= np.repeat(np.float64(weight.scale), group, axis=0)
    return w


def interpreted(shape, args, **kwargs):
    function = functools.partial(codebook_matmul, implementation="interpret", **kwargs)
    return jax.jit(functools.partial(function, **shape.options))(*args)


@pytest.mark.parametrize("shape", slow_but(SMALL, *QUICK))
def test_kernel_equals_reference_equals_the_dense_product(shape):
    args, codes = operands(shape)
    exact = np.float64(args[0]) @ dense(shape, args[1], codes)
    if args[2] is not None:
        exact *= np.float64(args[2])[:, None]
    expected = reference(*args, packed=shape.packed, out_dtype=jnp.float32)
    got = interpreted(shape, args, out_dtype=jnp.float32)
    assert difference(expected, exact) < LIMIT[shape.dtype]
    assert difference(got, expected) < LIMIT[shape.dtype]


@pytest.mark.parametrize(
    ("codebook", "groups", "block"),
    [
        slow((1, 1, 16, 1), 7, (8, 128, 128)),
        ((7, 20, 16, 1), 0, (8, 128, 256)),
        slow((2, 20, 16, 1), 28, (8, 256, 999)),
    ],
)
def test_any_block_gives_the_same(codebook, groups, block):
    shape = Shape(
        rows=9,
        depth=896,
        features=160,
        codebook=codebook,
        groups=groups,
        dtype="float32",
    )
    args, _ = operands(shape, seed=1)
    sizes = dict(zip(("rows", "features", "depth"), block, strict=True))
    expected = reference(*args)
    assert difference(interpreted(shape, args, block=sizes), expected) < 1e-5


def test_a_grid_of_integers_is_an_integer_weight():
    # Codes 0..15 of the grid -8..7 are int4 values, in exact arithmetic.
    shape = Shape(
        rows=4,
        depth=512,
        features=128,
        codebook=(1, 1, 16, 1),
        groups=4,
        packed=True,
        dtype="int8",
    )
    (x, weight, x_scale), codes = operands(shape, seed=2)
    grid = jnp.arange(-8, 8, dtype=jnp.int8).reshape(1, 1, 16, 1)
    weight = weight._replace(codebook=grid)
    packed = pack_int4(jnp.asarray(codes) - 8)
    expected = quant_matmul(x, IntWeight(packed, weight.scale), x_scale)
    np.testing.assert_array_equal(reference(x, weight, x_scale, packed=True), expected)
    np.testing.assert_allclose(interpreted(shape, (x, weight, x_scale)), expected)


def test_layers_of_a_stack_inside_loops_and_shard_map():
    shape = Shape(
        rows=4,
        depth=256,
        features=256,
        codebook=(2, 4, 16, 2),
        dtype="float32",
        layers=2,
    )
    (x, weight, _), _ = operands(shape, seed=3)
    weight = weight._replace(codebook=weight.codebook / 10)

    def network(implementation, x, weight):
        def layer(x, i):
            y = codebook_matmul(x, weight, layer=i, implementation=implementation)
            return y, None

        def twice(state):
            return state[0] + 1, jax.lax.scan(layer, state[1], jnp.arange(2))[0]

        return jax.lax.while_loop(lambda s: s[0] < 2, twice, (0, x))[1]

    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jax.shard_map(
        functools.partial(network, "interpret"),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    expected = jax.jit(functools.partial(network, "reference"))(x, weight)
    assert difference(jax.jit(kernel)(x, weight), expected) < 1e-5


def test_a_named_implementation_fails_where_it_cannot_run():
    shape = Shape(rows=2, depth=128, features=128, codebook=(1, 1, 16, 1))
    args, _ = operands(shape)
    for name in ("tpu", "gpu"):  # this is a CPU; there is no kernel for GPUs
        with pytest.raises(NotImplementedError, match="codebook_matmul"):
            codebook_matmul(*args, implementation=name)
    large = Shape(rows=2, depth=128, features=128, codebook=(1, 1, 2048, 1))
    args, _ = operands(large)
    with pytest.raises(ValueError, match="exceed 1024"):
        codebook_matmul(*args, implementation="interpret")
    assert codebook_matmul(*args).shape == (2, 128)


@pytest.mark.parametrize(
    ("options", "generation", "reason"),
    [
        ({"dtype": "int8"}, "v4", "v4 multiplies no int8"),
        ({"dtype": "int8"}, "v5e", None),
        ({"dtype": "int8", "groups": 16}, "v5e", "floating activations"),
        ({"codebook": (1, 2, 16, 1), "features": 192}, "v5e", "do not divide 128"),
        ({"codebook": (64, 1, 16, 1)}, "v5e", "no multiple of 32"),
        ({"codebook": (3, 1, 16, 1), "depth": 4032}, "v5e", "do not nest"),
        ({"rows": 0}, "v5e", "empty"),
    ],
)
def test_what_a_generation_cannot_run(options, generation, reason):
    usual = {"rows": 4, "depth": 1024, "features": 128, "codebook": (1, 1, 16, 1)}
    found = obstacle(Shape(**(usual | options)), Target("tpu", generation))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("codes", "codebook", "scale", "select", "message"),
    [
        ((64,), (1, 1, 16, 2), None, None, "of 2 axes"),
        ((64, 8), (1, 1, 16), None, None, "a codebook of 4"),
        ((63, 8), (1, 1, 16, 2), None, None, "expected 64"),
        ((64, 8), (1, 3, 16, 2), None, None, "whole tuples and columns"),
        ((64, 8), (2, 2, 16, 2), (1, 8), (1, 8), "one for all columns"),
        ((64, 8), (1, 1, 16, 2), (128, 8), None, "groups of whole tuples"),
        ((64, 8), (2, 1, 16, 2), (2, 8), (1, 8), "as many selections"),
        ((64, 8), (2, 1, 16, 2), None, (1, 8), "select without a scale"),
    ],
)
def test_operands_that_do_not_belong_together(codes, codebook, scale, select, message):
    weight = CodebookWeight(
        jnp.zeros(codes, jnp.uint8),
        jnp.zeros(codebook),
        None if scale is None else jnp.ones(scale),
        None if select is None else jnp.zeros(select, jnp.int32),
    )
    with pytest.raises(ValueError, match=message):
        codebook_matmul(jnp.ones((2, 128)), weight)


def test_other_codes_and_row_scales_are_refused():
    weight = CodebookWeight(jnp.zeros((64, 8), jnp.int32), jnp.zeros((1, 1, 16, 2)))
    x = jnp.ones((2, 128))
    with pytest.raises(ValueError, match="expected uint8 codes"):
        codebook_matmul(x, weight)
    weight = weight._replace(codes=weight.codes.astype(jnp.uint8))
    with pytest.raises(ValueError, match="each of 2 rows"):
        codebook_matmul(x, weight, jnp.ones(3))
    wide = CodebookWeight(jnp.zeros((64, 8), jnp.uint8), jnp.zeros((1, 1, 32, 1)))
    with pytest.raises(ValueError, match="at most 16"):
        codebook_matmul(x, wide, packed=True)

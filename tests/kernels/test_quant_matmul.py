"""`quant_matmul`: the layout of int4, the reference, and the kernel against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxllm.quantization import Int8
from pallas_kernels.dispatch import Target
from pallas_kernels.quant_matmul import (
    IntWeight,
    pack_int4,
    quant_matmul,
    quant_matmul_reference,
    unpack_int4,
)
from pallas_kernels.quant_matmul.shapes import SHAPES, Shape, obstacle
from tests.kernels.drawn import difference, drawn, slow, slow_but

# Layers of a stack have a test of their own.
SMALL = [s for s in SHAPES if s.depth * s.features < 2**21 and not s.layers]
QUICK = (
    "5x1300x130-w8-float32",
    "2x192x130-w4-float32-g32",
    "16x2048x128-w8-int8-g128-zeros",
    "33x1300x130-w4-int8",
)
LIMIT = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-6}

reference = jax.jit(quant_matmul_reference, static_argnames="out_dtype")


def interpreted(shape, args, **kwargs):
    function = functools.partial(quant_matmul, implementation="interpret", **kwargs)
    return jax.jit(functools.partial(function, **shape.options))(*args)


def dense(shape, weight):
    """The weight in float64, by the definition."""
    values, scale, zero = (None if a is None else np.asarray(a) for a in weight)
    if shape.bits == 4:
        values = by_hand(values, shape.depth)
    size = shape.depth // shape.groups
    zero = np.zeros_like(scale) if zero is None else zero
    scale, zero = (np.repeat(np.float64(a), size, axis=0) for a in (scale, zero))
    return (values - zero) * scale


def by_hand(packed, depth):
    """Unpacks row by row, as the docstring of `pack_int4` says."""
    block = 256 if depth > 192 else -(-depth // 64) * 64
    rows = []
    for row in range(depth):
        start, i = row // block * block, row % block
        nibble = packed[start // 2 + i % (block // 2)] >> (4 * (i >= block // 2)) & 15
        rows.append(np.where(nibble > 7, np.int64(nibble) - 16, nibble))
    return np.stack(rows)


@pytest.mark.parametrize("depth", [1, 64, 65, 192, 193, 256, 300, 600])
def test_int4_lies_in_halves_of_blocks(depth):
    values = np.random.default_rng(0).integers(-8, 8, (depth, 3))
    packed = pack_int4(jnp.asarray(values))
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(by_hand(np.asarray(packed), depth), values)


@given(st.integers(1, 700), st.integers(1, 3), st.sampled_from([(), (2,), (2, 1)]))
@settings(max_examples=4)
def test_unpacking_inverts_packing(depth, features, stack):
    shape = (*stack, depth, features)
    values = np.random.default_rng(depth).integers(-8, 8, shape)
    packed = pack_int4(jnp.asarray(values, jnp.int8))
    assert packed.nbytes <= (depth + 255) * features * np.prod(stack, dtype=int) / 2
    back = unpack_int4(packed, depth)
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, values)


def test_codes_without_sign_pack_to_the_same_bits():
    codes = jnp.arange(16)[:, None]
    signed = (codes + 8) % 16 - 8
    np.testing.assert_array_equal(pack_int4(codes), pack_int4(signed))


@pytest.mark.parametrize("shape", slow_but(SMALL, *QUICK))
def test_kernel_equals_reference_equals_the_dense_product(shape):
    args = drawn(shape.arguments())
    exact = np.float64(args[0]) @ dense(shape, args[1])
    if args[2] is not None:
        exact *= np.float64(args[2])[:, None]
    expected = reference(*args, out_dtype=jnp.float32)
    got = interpreted(shape, args, out_dtype=jnp.float32)
    assert difference(expected, exact) < LIMIT[shape.dtype]
    assert difference(got, expected) < LIMIT[shape.dtype]
    if shape.dtype == "int8" and shape.groups == 1:
        # The integers are equal; two scales are multiplied in the same order.
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("options", "block"),
    [
        ({"depth": 896, "groups": 7, "bits": 4}, (8, 128, 256)),
        ({"depth": 1280, "groups": 20, "bits": 4}, (8, 128, 300)),
        slow({"depth": 900, "rows": 40, "features": 300}, (16, 128, 384)),
        # Groups longer than a tile, and a packed block longer than the last group.
        slow({"depth": 1536, "groups": 2}, (8, 128, 512)),
        slow({"depth": 384, "groups": 3, "bits": 4}, (8, 128, 999)),
    ],
)
def test_any_block_gives_the_same(options, block):
    shape = Shape(**({"rows": 3, "features": 130, "dtype": "float32"} | options))
    args = drawn(shape.arguments(), seed=2)
    sizes = dict(zip(("rows", "features", "depth"), block, strict=True))
    expected = reference(*args)
    assert difference(interpreted(shape, args, block=sizes), expected) < 1e-5


def test_integers_are_exact_in_any_block_and_batch():
    shape = Shape(rows=40, depth=900, features=130, dtype="int8")
    x, weight, x_scale = drawn(shape.arguments(), seed=3)
    whole = interpreted(shape, (x, weight, x_scale))
    sizes = {"rows": 32, "features": 128, "depth": 128}
    cut = interpreted(shape, (x[:33], weight, x_scale[:33]), block=sizes)
    np.testing.assert_array_equal(cut, whole[:33])


@pytest.mark.parametrize("bits", [slow(8), 4])
def test_layers_of_a_stack_inside_loops_and_shard_map(bits):
    # Groups of 128 in a depth of 384: the last packed block is not full.
    shape = Shape(
        rows=4, depth=384, features=384, groups=3, bits=bits, dtype="float32", layers=3
    )
    x, weight, _ = drawn(shape.arguments(), seed=5)
    weight = weight._replace(scale=weight.scale / 1000)

    def network(implementation, x, weight):
        def layer(x, i):
            y = quant_matmul(x, weight, layer=i, implementation=implementation)
            return y, None

        def twice(state):
            return state[0] + 1, jax.lax.scan(layer, state[1], jnp.arange(3))[0]

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


def test_a_layer_outside_the_stack_is_the_nearest():
    shape = Shape(rows=2, depth=128, features=128, layers=3, dtype="float32")
    x, weight, _ = drawn(shape.arguments(), seed=6)
    for implementation in ("reference", "interpret"):
        call = functools.partial(quant_matmul, implementation=implementation)
        of_layer = jax.jit(lambda i, call=call: call(x, weight, layer=i))
        for layer, nearest in ((-1, 0), (7, 2)):
            np.testing.assert_array_equal(of_layer(layer), of_layer(nearest))
        assert difference(of_layer(0), of_layer(2)) > 0.1


def test_the_result_has_the_dtype_asked_for():
    for dtype, out in (("bfloat16", jnp.bfloat16), ("int8", jnp.float32)):
        args = Shape(rows=2, depth=128, features=128, dtype=dtype).arguments()
        for implementation in ("reference", "interpret"):
            call = functools.partial(quant_matmul, implementation=implementation)
            assert jax.eval_shape(call, *args).dtype == out
            half = functools.partial(call, out_dtype=jnp.float16)
            assert jax.eval_shape(half, *args).dtype == jnp.float16


def test_a_named_implementation_fails_where_it_cannot_run():
    args = drawn(Shape(rows=2, depth=128, features=128).arguments())
    for name, error in (
        ("tpu", NotImplementedError),  # on a CPU
        ("gpu", NotImplementedError),  # there is none
        ("mosaic", ValueError),
    ):
        with pytest.raises(error, match="quant_matmul"):
            quant_matmul(*args, implementation=name)
    native = args[1]._replace(values=args[1].values.astype(jnp.int4))
    with pytest.raises(ValueError, match="left to XLA"):
        quant_matmul(args[0], native, implementation="interpret")
    assert quant_matmul(args[0], native).shape == (2, 128)


@pytest.mark.parametrize(
    ("options", "generation", "reason"),
    [
        ({"dtype": "int8"}, "v4", "v4 multiplies no int8"),
        ({"dtype": "int8"}, "v5e", None),
        ({"dtype": "bfloat16"}, "v4", None),
        ({"dtype": "float16"}, "v5e", "float16"),
        ({"dtype": "int8", "groups": 20}, "v6e", "floating activations"),
        ({"groups": 4, "depth": 1200}, "v6e", "no multiple of 128"),
        ({"groups": 128}, "v6e", "do not divide"),
        ({"rows": 0}, "v6e", "empty"),
    ],
)
def test_what_a_generation_cannot_run(options, generation, reason):
    shape = Shape(**({"rows": 4, "depth": 1280, "features": 128} | options))
    found = obstacle(shape, Target("tpu", generation))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("values", "scale", "x_scale", "message"),
    [
        ((64, 8), (1, 8), None, "expected 128 rows of values"),
        ((128, 8), (3, 8), None, "a divisor of the rows"),
        ((128, 8), (1, 4), None, "one column of scales"),
        ((128, 8), (8,), None, "expected 2 axes"),
        ((128, 8), (1, 8), (3,), "expected one for each of 2 rows"),
    ],
)
def test_operands_that_do_not_belong_together(values, scale, x_scale, message):
    weight = IntWeight(jnp.zeros(values, jnp.int8), jnp.ones(scale))
    x_scale = None if x_scale is None else jnp.ones(x_scale)
    with pytest.raises(ValueError, match=message):
        quant_matmul(jnp.ones((2, 128)), weight, x_scale)


def test_bytes_of_another_depth_and_unknown_dtypes_are_refused():
    with pytest.raises(ValueError, match="expected 32 for depth=50"):
        unpack_int4(jnp.zeros((64, 8), jnp.uint8), 50)
    weight = IntWeight(jnp.zeros((128, 8), jnp.int16), jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="int16"):
        quant_matmul(jnp.ones((2, 128)), weight)


@pytest.mark.parametrize("activations", [0, 8])
def test_a_quantized_leaf_has_this_layout(activations):
    x, w = drawn([jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 200), (200, 70))])
    leaf = Int8(activations=activations).quantize(w)
    expected = leaf.einsum("td,df->tf", x, jnp.float32)
    x_scale = None
    if activations:
        rounded = Int8().quantize(x, input_axis=1)
        x, x_scale = rounded.values, rounded.scale[:, 0]
    got = quant_matmul(x, IntWeight(leaf.values, leaf.scale), x_scale)
    assert difference(got, expected) < 1e-6

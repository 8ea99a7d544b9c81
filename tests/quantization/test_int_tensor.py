"""The int8 leaf: how far it is off, and that trees treat it like an array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ConfigError, Leaf, einsum, registry, take
from jaxllm.quantization import METHODS, Int8, IntTensor


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"), [((24, 10), -2), ((3, 24, 10), -2), ((50, 16), -1)]
)
def test_no_element_is_off_by_more_than_half_a_scale(shape, axis, dtype):
    weight = draw(shape, dtype=dtype)
    leaf = Int8().quantize(weight, input_axis=axis)
    assert leaf.values.dtype == jnp.int8 and leaf.scale.dtype == jnp.float32
    assert leaf.scale.shape == tuple(
        1 if i == len(shape) + axis else size for i, size in enumerate(shape)
    )
    off = np.abs(np.asarray(leaf.dequantize(jnp.float32) - weight.astype(jnp.float32)))
    assert (off <= np.asarray(leaf.scale) / 2 * (1 + 1e-5)).all()
    # The largest of every channel uses the whole grid.
    assert (np.abs(np.asarray(leaf.values)).max(axis) == 127).all()


def test_a_channel_of_zeros_stays_zero():
    weight = draw((8, 4)).at[:, 2].set(0)
    leaf = Int8().quantize(weight)
    # Nothing divides by a scale of zero: what NaN becomes as int8 is up to the device.
    assert (np.asarray(leaf.scale) > 0).all() and (leaf.values[:, 2] == 0).all()
    y = np.asarray(einsum("bd,df->bf", draw((3, 8)), leaf))
    assert np.isfinite(y).all() and (y[:, 2] == 0).all() and (y[:, 1] != 0).all()


def test_a_channel_of_numbers_near_the_smallest_is_finite():
    leaf = Int8().quantize(jnp.full((8, 4), 1e-44))
    assert np.isfinite(np.asarray(leaf.dequantize(jnp.float32))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    leaf = Int8().quantize(draw((8, 4)).at[3, 1].set(bad))
    finite = np.isfinite(np.asarray(leaf.dequantize(jnp.float32)))
    assert not finite[:, 1].all() and finite[:, [0, 2, 3]].all()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("eq", "shape", "axis"),
    [("btd,df->btf", (24, 10), -2), ("btd,vd->btv", (10, 24), -1)],
)
def test_a_product_equals_that_of_the_dequantized_weight(eq, shape, axis, dtype, rows):
    leaf = Int8().quantize(draw(shape), input_axis=axis)
    x = draw((1, rows, 24), 1, dtype)
    wanted = jnp.einsum(eq, x.astype(jnp.float32), leaf.dequantize(jnp.float32))
    y = einsum(eq, x, leaf, out_dtype=jnp.float32)
    np.testing.assert_allclose(np.asarray(y), np.asarray(wanted), rtol=1e-5, atol=1e-5)
    assert einsum(eq, x, leaf).dtype == dtype


def test_a_product_over_the_other_axis_is_right_too():
    leaf = Int8().quantize(draw((24, 10)))
    x = draw((2, 3, 10), 1)
    y = einsum("btf,df->btd", x, leaf)
    wanted = jnp.einsum("btf,df->btd", x, leaf.dequantize(jnp.float32))
    np.testing.assert_allclose(np.asarray(y), np.asarray(wanted), rtol=1e-5, atol=1e-5)


def test_a_result_in_another_order_is_scaled_by_the_right_channel():
    leaf = Int8().quantize(draw((4, 24, 10)))
    x = draw((4, 3, 24), 1)
    wanted = jnp.einsum("emd,edf->fem", x, leaf.dequantize(jnp.float32))
    for bits, near in ((0, 1e-5), (8, 0.2)):
        y = einsum("emd,edf->fem", x, IntTensor(leaf.values, leaf.scale, bits))
        np.testing.assert_allclose(np.asarray(y), np.asarray(wanted), atol=near)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(
    ("eq", "shape", "axis"),
    [("btd,df->btf", (96, 40), -2), ("btd,vd->btv", (40, 96), -1)],
)
def test_rounded_activations_multiply_as_integers(eq, shape, axis, rows):
    leaf = Int8(activations=8).quantize(draw(shape), input_axis=axis)
    x = draw((1, rows, 96), 1)
    y = np.asarray(einsum(eq, x, leaf))
    x_scale = np.abs(np.asarray(x)).max(-1, keepdims=True) / np.float32(127)
    exact = np.rint(np.asarray(x) / x_scale).astype(np.int64)
    values = np.asarray(leaf.values, np.int64)
    product = np.einsum(eq, exact, values) * x_scale
    wanted = product * np.asarray(leaf.scale).reshape(-1)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    # Near the product that is not rounded, but not it.
    plain = np.asarray(einsum(eq, x, IntTensor(leaf.values, leaf.scale)))
    off = np.abs(y - plain).max() / np.abs(plain).max()
    assert 1e-5 < off < 0.02


def test_rows_of_a_table_are_those_of_the_dequantized_table():
    leaf = Int8().quantize(draw((50, 16)), input_axis=-1)
    ids = jnp.asarray([[0, 49, 7], [-3, 50, 7]])
    for dtype in (jnp.float32, jnp.bfloat16):
        table = leaf.dequantize(dtype)
        rows = np.asarray(take(leaf, ids, dtype=dtype))
        wanted = np.asarray(table[jnp.asarray([[0, 49, 7], [0, 49, 7]])])
        assert rows.dtype == wanted.dtype and (rows == wanted).all()
    # A scale for each column serves as well.
    columns = Int8().quantize(draw((50, 16)), input_axis=-2)
    rows = take(columns, jnp.asarray([4, 49]), dtype=jnp.float32)
    assert (rows == columns.dequantize(jnp.float32)[jnp.asarray([4, 49])]).all()


def test_the_leaf_is_sliced_by_scan_and_vmap_like_an_array():
    leaf = Int8().quantize(draw((3, 24, 24)))
    x = draw((2, 24), 1)
    wanted = x
    for i in range(3):
        wanted = einsum("bd,df->bf", wanted, jax.tree.map(lambda a, i=i: a[i], leaf))

    def step(x, layer):
        return einsum("bd,df->bf", x, layer), None

    scanned = jax.jit(lambda x, leaf: jax.lax.scan(step, x, leaf)[0])(x, leaf)
    np.testing.assert_allclose(np.asarray(scanned), np.asarray(wanted), rtol=1e-5)

    each = jax.vmap(lambda layer: einsum("bd,df->bf", x, layer))(leaf)
    dense = jax.vmap(lambda w: x @ w)(leaf.dequantize(jnp.float32))
    np.testing.assert_allclose(
        np.asarray(each), np.asarray(dense), rtol=1e-4, atol=1e-5
    )


def test_the_leaf_survives_tree_operations():
    leaf = Int8(activations=8).quantize(draw((24, 10)))
    assert isinstance(leaf, Leaf)
    arrays, structure = jax.tree.flatten(leaf)
    again = jax.tree.unflatten(structure, [np.asarray(a) for a in arrays])
    assert again.activation_bits == 8 and again.shape == (24, 10)
    passed = jax.jit(lambda leaf: leaf)(leaf)
    assert passed.activation_bits == 8
    assert (np.asarray(passed.values) == again.values).all()
    names = [str(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(leaf)]
    assert names == [".values", ".scale"]


def test_bytes_are_those_of_the_arrays():
    leaf = Int8().quantize(draw((3, 256, 64)))
    assert leaf.nbytes == 3 * 256 * 64 + 3 * 64 * 4
    bits = 8 * leaf.nbytes / np.prod(leaf.shape)
    assert bits == 8 + 32 / 256
    shapes = jax.eval_shape(Int8().quantize, jax.ShapeDtypeStruct((3, 256, 64), "f4"))
    assert shapes.nbytes == leaf.nbytes and shapes.shape == leaf.shape


def test_integer_products_need_no_copy_of_the_weight_in_a_loop():
    # Weight-only: XLA:CPU converts the whole weight once, before the loop.
    def temporaries(activations):
        leaf = Int8(activations=activations).quantize(draw((512, 512)))

        def loop(x, leaf):
            def body(_, x):
                return jnp.tanh(einsum("bd,df->bf", x, leaf))

            return jax.lax.fori_loop(0, 10, body, x)

        compiled = jax.jit(loop).lower(draw((1, 512)), leaf).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    if jax.default_backend() != "cpu":
        pytest.skip("what XLA:CPU does")
    assert temporaries(8) < 512 * 512 // 4
    assert temporaries(0) >= 512 * 512


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantizing_needs_no_copy_of_the_weight(dtype, axis):
    weight = jax.ShapeDtypeStruct((512, 512), dtype)
    compiled = jax.jit(lambda w: Int8().quantize(w, input_axis=axis)).lower(weight)
    memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 512 // 4


def test_the_method_is_named_by_a_string():
    assert registry.build("int8", METHODS) == Int8()
    assert registry.build("int8:activations=8", METHODS) == Int8(activations=8)
    message = (
        "cannot quantize: int8 has activations=4, expected 0 or 8. "
        "Leave it out to keep activations as they are."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        registry.build("int8:activations=4", METHODS)

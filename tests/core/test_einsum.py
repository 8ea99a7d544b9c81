"""Letters: B rows, T tokens, D and F the axes of a weight, V vocabulary, L layers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import Leaf, contract, dense, einsum, pytree_dataclass, static, take

# The products that models make: projections, a tied head, attention's two.
EQUATIONS = {
    "td,df->tf": {"t": 3, "d": 8, "f": 5},
    "btd,df->btf": {"b": 2, "t": 3, "d": 8, "f": 5},
    "btd,vd->btv": {"b": 2, "t": 1, "d": 8, "v": 7},
    "ukqh,uksh->ukqs": {"u": 2, "k": 3, "q": 4, "h": 8, "s": 5},
    "ukqs,uksh->ukqh": {"u": 2, "k": 3, "q": 4, "h": 8, "s": 5},
}


@pytree_dataclass
class Doubled:
    """A leaf that stands for twice an array and notes what it was asked."""

    half: jax.Array
    asked: list = static(default_factory=list)

    @property
    def shape(self):
        return self.half.shape

    @property
    def nbytes(self):
        return self.half.nbytes

    def einsum(self, eq, x, out_dtype):
        self.asked.append(("einsum", eq, jnp.dtype(out_dtype)))
        return contract(eq, x, self.dequantize(x.dtype), out_dtype)

    def dequantize(self, dtype):
        self.asked.append(("dequantize", jnp.dtype(dtype)))
        return (2 * self.half).astype(dtype)


class Table(Doubled):
    def take(self, ids, dtype):
        self.asked.append(("take", ids.shape, jnp.dtype(dtype)))
        return (2 * self.half[ids]).astype(dtype)


def integers(seed, *shape, dtype=jnp.float32):
    """Small whole numbers, whose products and sums every dtype holds exactly."""
    values = np.random.default_rng(seed).integers(-3, 4, shape)
    return jnp.asarray(values, dtype)


def operands(eq, sizes, dtype):
    left, right = eq.split("->")[0].split(",")
    x = integers(0, *(sizes[a] for a in left), dtype=dtype)
    return x, integers(1, *(sizes[a] for a in right), dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("eq", EQUATIONS)
def test_the_product_is_exact_where_its_dtype_is(eq, single, dtype):
    sizes = EQUATIONS[eq] | (dict.fromkeys("btq", 1) if single else {})
    x, w = operands(eq, sizes, dtype)
    out = contract(eq, x, w, jnp.float32)
    assert out.dtype == jnp.float32
    expected = np.einsum(eq, np.asarray(x, np.float64), np.asarray(w, np.float64))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_bfloat16_products_accumulate_in_float32(rows):
    x = jnp.ones((rows, 1024), jnp.bfloat16)
    w = jnp.full((1024, 1), 2.0**-9, jnp.bfloat16).at[0].set(1.0)
    out = einsum("td,df->tf", x, w, out_dtype=jnp.float32)
    # A bfloat16 sum stays at 1, a rounded one ends at 3.
    np.testing.assert_array_equal(out, np.full((rows, 1), 1 + 1023 / 512))


@pytest.mark.parametrize("rows", [1, 2])
def test_int8_products_accumulate_in_int32(rows):
    x = jnp.full((rows, 4097), 127, jnp.int8)
    w = jnp.full((4097, 2), 127, jnp.int8).at[0].set(-1)
    out = contract("td,df->tf", x, w, jnp.int32)
    # Odd and above 2**24, so that a float32 sum would miss it.
    np.testing.assert_array_equal(out, np.full((rows, 2), 127 * 127 * 4096 - 127))


def test_float64_products_accumulate_in_float64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 2), jnp.float64)
        w = jnp.asarray([[1.0], [2.0**-40]], jnp.float64)
        assert float(einsum("td,df->tf", x, w)[0, 0]) == 1 + 2.0**-40


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("eq", ["btd,df->btf", "btd,vd->btv", "ukqh,uksh->ukqs"])
def test_a_single_row_equals_its_row_among_two(eq, dtype):
    sizes = {"b": 1, "t": 2, "u": 1, "k": 1, "q": 2, "d": 48, "h": 48}
    left, right = eq.split("->")[0].split(",")
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, [sizes[a] for a in left], dtype)
    w = jax.random.normal(key_w, [sizes.get(a, 33) for a in right], dtype)
    axis = left.index("t" if "t" in left else "q")

    @jax.jit
    def product(x):
        return contract(eq, x, w, jnp.float32)

    one, two = product(jnp.take(x, jnp.array([0]), axis)), product(x)
    np.testing.assert_array_equal(one, jnp.take(two, jnp.array([0]), axis))


def rows_of_the_dot(x, w, platform):
    """Rows of x in the one product that a platform is given."""

    def product(x, w):
        return contract("btd,df->btf", x, w, jnp.float32)

    lowered = jax.jit(product).trace(x, w).lower(lowering_platforms=(platform,))
    (shape,) = re.findall(
        r"stablehlo\.dot_general.*-> tensor<([\dx]+)x\w+>", lowered.as_text()
    )
    return np.prod([int(n) for n in shape.split("x")]) // w.shape[1]


@pytest.mark.parametrize(
    ("platform", "dtype", "rows", "expected"),
    [
        ("cpu", jnp.bfloat16, 1, 2),
        ("cpu", jnp.int8, 1, 2),
        ("cpu", jnp.float32, 1, 1),
        ("cpu", jnp.bfloat16, 3, 3),
        ("tpu", jnp.bfloat16, 1, 1),
        ("tpu", jnp.int8, 1, 1),
        ("cuda", jnp.bfloat16, 1, 1),
    ],
)
def test_only_a_single_narrow_row_on_a_cpu_is_padded(platform, dtype, rows, expected):
    x = jax.ShapeDtypeStruct((1, rows, 8), dtype)
    w = jax.ShapeDtypeStruct((8, 16), dtype)
    assert rows_of_the_dot(x, w, platform) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_activations_dtype_unless_told(dtype):
    x, w = integers(0, 2, 4, dtype=dtype), integers(1, 4, 3, dtype=jnp.float32)
    assert einsum("td,df->tf", x, w).dtype == dtype
    assert einsum("td,df->tf", x, w, out_dtype=jnp.float32).dtype == jnp.float32


def test_a_leaf_is_asked_for_its_product():
    leaf = Doubled(integers(1, 4, 3))
    x = integers(0, 2, 4, dtype=jnp.bfloat16)
    out = einsum("td,df->tf", x, leaf)
    assert leaf.asked[0] == ("einsum", "td,df->tf", jnp.dtype(jnp.bfloat16))
    np.testing.assert_array_equal(out, einsum("td,df->tf", x, 2 * leaf.half))
    einsum("td,df->tf", x, leaf, out_dtype=jnp.float32)
    assert ("einsum", "td,df->tf", jnp.dtype(jnp.float32)) in leaf.asked


def test_a_leaf_is_recognised_by_what_it_offers():
    assert isinstance(Doubled(integers(0, 2, 2)), Leaf)
    assert not isinstance(integers(0, 2, 2), Leaf)


def test_dense_gives_a_plain_array():
    w = integers(1, 4, 3)
    for weight, factor in ((w, 1), (Doubled(w), 2)):
        out = dense(weight, jnp.bfloat16)
        assert isinstance(out, jax.Array)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, (factor * w).astype(jnp.bfloat16))


TABLES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8]


@pytest.mark.parametrize("table", TABLES)
def test_take_looks_up_rows_and_clips(table):
    w_VD = integers(0, 5, 3, dtype=table)
    ids = jnp.asarray([[0, 4, 2], [5, 99, -1], [-5, -2, 3]])

    @jax.jit
    def look_up(w_VD, ids):
        return take(w_VD, ids, dtype=jnp.bfloat16)

    nearest = np.clip(np.asarray(ids), 0, 4)
    expected = np.asarray(integers(0, 5, 3))[nearest]
    for rows in (look_up(w_VD, ids), jax.vmap(look_up, (None, 0))(w_VD, ids)):
        assert rows.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("table", TABLES[:3])
def test_the_gradient_of_take_counts_the_rows(table):
    @jax.jit
    @jax.grad
    def gradient(w_VD):
        rows = take(w_VD, jnp.asarray([1, 1, 2]), dtype=jnp.float32)
        return (rows * jnp.asarray([1.0, 2.0, 4.0])).sum()

    counts_VD = gradient(integers(0, 4, 3, dtype=table))
    assert counts_VD.dtype == table
    expected_VD = [[0, 0, 0], [2, 4, 8], [1, 2, 4], [0, 0, 0]]
    np.testing.assert_array_equal(counts_VD, expected_VD)


@pytest.mark.parametrize(
    ("table", "bound"), [(jnp.float32, 0.05), (jnp.float16, 0.05), (jnp.bfloat16, 1.1)]
)
def test_take_in_a_loop_widens_no_table(table, bound):
    def step(i, total, w_VD):
        return total + take(w_VD, total.astype(jnp.int32) + i, dtype=table).sum()

    @jax.jit
    def loop(w_VD):
        body = functools.partial(step, w_VD=w_VD)
        return jax.lax.fori_loop(0, 9, body, jnp.zeros((), table))

    w_VD = jax.ShapeDtypeStruct((4096, 64), table)
    temporary = loop.lower(w_VD).compile().memory_analysis().temp_size_in_bytes
    assert temporary < bound * w_VD.size * w_VD.dtype.itemsize


def test_take_asks_a_leaf_and_dequantizes_one_that_cannot():
    half_VD, ids = integers(0, 5, 3), jnp.asarray([3, 0])
    table, plain = Table(half_VD), Doubled(half_VD)
    for leaf in (table, plain):
        rows = take(leaf, ids, dtype=jnp.bfloat16)
        assert rows.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rows, 2 * half_VD[ids])
    assert table.asked == [("take", (2,), jnp.dtype(jnp.bfloat16))]
    assert plain.asked == [("dequantize", jnp.dtype(jnp.bfloat16))]


@pytest.mark.parametrize("kind", ["array", "leaf"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_works_under_jit_vmap_scan_and_grad(dtype, rows, kind):
    x_LTD = integers(0, 3, rows, 4, dtype=dtype)
    w_LDF = integers(1, 3, 4, 5, dtype=dtype)
    leaf = Doubled(w_LDF) if kind == "leaf" else w_LDF
    factor = 2 if kind == "leaf" else 1

    def product(x_TD, w_DF):
        return einsum("td,df->tf", x_TD, w_DF, out_dtype=jnp.float32)

    expected = factor * np.einsum(
        "ltd,ldf->ltf", np.asarray(x_LTD, np.float32), np.asarray(w_LDF, np.float32)
    )
    first = jax.tree.map(lambda w: w[0], leaf)
    np.testing.assert_array_equal(jax.jit(product)(x_LTD[0], first), expected[0])
    np.testing.assert_array_equal(jax.vmap(product)(x_LTD, leaf), expected)

    @jax.jit
    def scanned(x_LTD, leaf):
        return jax.lax.scan(lambda c, xs: (c, product(*xs)), 0, (x_LTD, leaf))[1]

    np.testing.assert_array_equal(scanned(x_LTD, leaf), expected)

    @jax.jit
    @jax.grad
    def gradient(operands):
        return (product(*operands) * jnp.arange(5)).sum()

    x_bar, w_bar = gradient((x_LTD[0], first))
    c_TF = np.broadcast_to(np.arange(5.0), (rows, 5))
    x, w = (np.asarray(a[0], np.float32) for a in (x_LTD, w_LDF))
    assert x_bar.dtype == dtype
    np.testing.assert_array_equal(x_bar, factor * c_TF @ w.T)
    np.testing.assert_array_equal(jax.tree.leaves(w_bar)[0], factor * x.T @ c_TF)

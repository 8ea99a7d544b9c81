"""LoRA: where it starts, what is trained, and that any weight can be inside."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.compression import (
    LoraConfig,
    LoraTensor,
    adapter_names,
    add_lora,
    merge,
    projections,
    trainable,
)
from jaxllm.core import ConfigError, Leaf, einsum, grouped_matmul, take
from jaxllm.core.partition import join, path_names, split
from jaxllm.models import restack
from jaxllm.models.stacks import stack_size
from jaxllm.quantization import Int8, IntTensor, quantize_params
from tests.compression.adapted import (
    FAMILIES,
    adapted,
    assert_close,
    drawn,
    logits,
    model_of,
    targets_of,
)

KEY = jax.random.key(3)


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def leaf_around(base, rank=3, seed=7):
    *stack, inputs, outputs = base.shape
    ones = (*stack, 1, 1)
    return LoraTensor(
        base=base,
        a_IR=draw((*stack, inputs, rank), seed),
        b_RO=draw((*stack, rank, outputs), seed + 1),
        scaling=jnp.full(ones, 0.5),
        strength=jnp.full(ones, 0.25),
    )


def whole(leaf):
    low = np.matmul(np.asarray(leaf.a_IR), np.asarray(leaf.b_RO))
    return np.asarray(leaf.base) + 0.125 * low


@pytest.mark.parametrize(
    ("family", "quantizer", "is_scanned"),
    [
        *((family, None, False) for family in FAMILIES),
        ("gemma2", None, True),
        ("llama", Int8(), True),
    ],
)
def test_at_the_start_logits_are_the_base_models_bit_for_bit(
    family, quantizer, is_scanned
):
    model, params, tokens = model_of(family)
    if quantizer is not None:
        params = quantize_params(params, quantizer)
    config = LoraConfig(rank=4, targets=targets_of(params))
    if is_scanned:
        params = restack(params, (len(params["stacks"]),))
    begun = add_lora(params, config, KEY)
    wanted = logits(model, params, tokens)
    np.testing.assert_array_equal(logits(model, begun, tokens), wanted)


def test_at_the_start_bfloat16_is_the_base_models_too():
    leaf = leaf_around(draw((32, 24), 1, jnp.bfloat16))
    leaf = LoraTensor(
        leaf.base, leaf.a_IR, jnp.zeros_like(leaf.b_RO), leaf.scaling, leaf.strength
    )
    for rows in (1, 5):
        x = draw((1, rows, 32), 2, jnp.bfloat16)
        found, wanted = (einsum("btd,df->btf", x, w) for w in (leaf, leaf.base))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, wanted)


def test_a_is_drawn_by_layer_whatever_the_stacks():
    _, params, _ = model_of("llama")
    layers = len(params["stacks"])
    config = LoraConfig(rank=2, targets=("query", "down"))
    apart = add_lora(params, config, KEY)
    together = add_lora(restack(params, (layers,)), config, KEY)
    pairs = zip(
        jax.tree.leaves(restack(apart, (layers,))),
        jax.tree.leaves(together),
        strict=True,
    )
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)
    queries = [stack["attention"]["query"]["kernel"].a_IR for stack in apart["stacks"]]
    assert not np.array_equal(queries[0], queries[1])
    key = apart["stacks"][0]["attention"]["key"]["kernel"]
    assert not isinstance(key, LoraTensor)


def test_a_is_gaussian_and_b_is_zero():
    _, params, _ = model_of("llama")
    params = add_lora(params, LoraConfig(rank=64, targets=("down",)), KEY)
    down = params["stacks"][0]["mlp"]["down"]["kernel"]
    inputs = down.shape[-2]
    # N(0, 1 / I): its spread is right to within four of its own errors.
    off = np.std(down.a_IR) * np.sqrt(inputs) - 1
    assert abs(off) < 4 / np.sqrt(2 * down.a_IR.size)
    assert not down.b_RO.any() and down.a_IR.dtype == jnp.float32


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_alpha_by_the_rank_or_its_root(rslora):
    _, params, _ = model_of("llama")
    config = LoraConfig(rank=4, alpha=6.0, rslora=rslora)
    leaf = add_lora(params, config, KEY)["stacks"][0]["attention"]["query"]["kernel"]
    assert leaf.scaling.item() == (3.0 if rslora else 1.5)
    assert leaf.strength.item() == 1


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("eq", "shape", "x_shape"),
    [
        ("btd,df->btf", (24, 10), (1, "rows", 24)),
        ("btd,vd->btv", (10, 24), (1, "rows", 24)),
        ("btf,df->btd", (24, 10), (1, "rows", 10)),
        ("d,df->f", (24, 10), (24,)),
        ("emd,edf->fem", (4, 24, 10), (4, "rows", 24)),
        ("emd,edf->mf", (4, 24, 10), (4, "rows", 24)),
        ("bd,df->bdf", (24, 10), ("rows", 24)),
    ],
)
def test_a_product_is_that_of_the_merged_weight(eq, shape, x_shape, rows):
    leaf = leaf_around(draw(shape))
    x = draw([rows if size == "rows" else size for size in x_shape], 1)
    wanted = np.einsum(eq, x, whole(leaf))
    np.testing.assert_allclose(einsum(eq, x, leaf), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("eq", "shape"), [("btd,df->btf", (24, 10)), ("btd,vd->btv", (10, 24))]
)
def test_a_product_makes_no_matrix_of_the_weights_size(eq, shape):
    leaf, x = leaf_around(draw(shape)), draw((1, 5, 24))
    lowered = jax.jit(lambda x, leaf: einsum(eq, x, leaf)).lower(x, leaf).as_text()
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    assert dots
    for line in dots:
        made = line.rsplit("tensor<", 1)[1]
        assert not made.startswith(("24x10x", "10x24x")), line


def test_rows_and_groups_are_those_of_the_merged_weight():
    leaf = leaf_around(draw((50, 16)))
    ids = jnp.asarray([[0, 49, 7], [-3, 50, 7]])
    wanted = whole(leaf)[np.clip(ids, 0, 49)]
    np.testing.assert_allclose(take(leaf, ids, dtype=jnp.float32), wanted, atol=1e-5)
    experts = leaf_around(draw((3, 16, 8)))
    x, sizes = draw((5, 16), 1), jnp.asarray([2, 0, 3])
    wanted = [x[m] @ whole(experts)[e] for m, e in enumerate((0, 0, 2, 2, 2))]
    found = grouped_matmul(x, experts, sizes)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-5)


def test_the_leaf_is_sliced_like_an_array_and_knows_its_bytes():
    base = Int8().quantize(draw((3, 24, 24)))
    leaf = leaf_around(base)
    assert isinstance(leaf, Leaf) and leaf.shape == (3, 24, 24)
    assert leaf.nbytes == base.nbytes + 4 * 3 * (2 * 24 * 3 + 2)
    shapes = jax.eval_shape(lambda leaf: leaf, leaf)
    assert (shapes.nbytes, shapes.shape) == (leaf.nbytes, leaf.shape)
    x = draw((2, 24), 1)
    wanted = x
    for i in range(3):
        wanted = einsum("bd,df->bf", wanted, jax.tree.map(lambda a, i=i: a[i], leaf))

    def step(x, layer):
        return einsum("bd,df->bf", x, layer), None

    scanned = jax.jit(lambda x, leaf: jax.lax.scan(step, x, leaf)[0])(x, leaf)
    np.testing.assert_allclose(scanned, wanted, rtol=1e-5)


@pytest.fixture(scope="module")
def trained():
    """The tree before and after two steps of SGD on A and B, and the losses."""
    model, params, tokens = model_of("qwen3")
    params = quantize_params(restack(params, (len(params["stacks"]),)), Int8())
    params = add_lora(params, LoraConfig(targets=("query", "up")), KEY)
    factors, frozen = split(params, trainable)

    @jax.jit
    def gradient(factors):
        def loss(factors):
            out = model(join(factors, frozen), tokens[:, :-1]).logits_BTV
            return optax.softmax_cross_entropy_with_integer_labels(
                out, tokens[:, 1:]
            ).mean()

        return jax.value_and_grad(loss)(factors)

    optimizer = optax.sgd(0.1)
    state = optimizer.init(factors)
    losses = []
    for _ in range(2):
        value, grads = gradient(factors)
        updates, state = optimizer.update(grads, state)
        factors = optax.apply_updates(factors, updates)
        losses.append(float(value))
    losses.append(float(gradient(factors)[0]))
    return params, join(factors, frozen), losses


def test_training_changes_a_and_b_and_nothing_else(trained):
    before, after, losses = trained
    assert losses[0] > losses[1] > losses[2]
    changed = set()
    for (keys, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(before),
        jax.tree_util.tree_leaves_with_path(after),
        strict=True,
    ):
        if not np.array_equal(x, y):
            changed.add(path_names(keys))
    # In two steps: in the first A has no gradient, because B is zero.
    assert changed == {
        ("stacks", 0, block, name, "kernel", field)
        for block, name in (("attention", "query"), ("mlp", "up"))
        for field in ("a_IR", "b_RO")
    }


def test_frozen_arrays_carry_no_optimizer_state(trained):
    factors, frozen = split(trained[0], trainable)

    def nbytes(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    state = nbytes(optax.adam(1e-3).init(factors))
    # Two moments of each, and a counter.
    assert state == 2 * nbytes(factors) + 4
    assert nbytes(frozen) > nbytes(factors) > 0
    assert {x.dtype for x in jax.tree.leaves(factors)} == {jnp.dtype("float32")}


def test_an_adapter_around_int8_adds_the_same_difference():
    model, params, tokens = model_of("llama")
    quantized = adapted(quantize_params(params, Int8()))
    stack = quantized["stacks"][0]["attention"]["query"]["kernel"]
    assert isinstance(stack, LoraTensor) and isinstance(stack.base, IntTensor)
    found = logits(model, quantized, tokens)
    assert_close(found, logits(model, merge(quantized, jnp.float32), tokens))
    plain = logits(model, adapted(params), tokens)
    assert 1e-5 < np.abs(found - plain).max() < 0.3 * np.abs(plain).max()


def test_quantizing_an_adapted_model_quantizes_what_is_inside():
    _, params, _ = model_of("llama")
    first = quantize_params(adapted(params), Int8())
    second = adapted(quantize_params(params, Int8()))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)
    again = quantize_params(first, Int8())
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(first)))


def test_layers_without_an_adapter_share_a_stack_with_those_that_have_one():
    from jaxllm.compression import LoraFactors, with_adapter

    model, params, tokens = model_of("llama")
    sizes = projections(params)
    inputs, outputs = sizes["layers", 1, "mlp", "up"]
    factors = {}
    for layer, rank in ((0, 2), (1, 3)):
        a, b = draw((inputs, rank), layer), draw((rank, outputs), layer + 5)
        factors["layers", layer, "mlp", "up"] = LoraFactors(a, b, 0.01 * (layer + 1))
    del factors["layers", 0, "mlp", "up"]
    apart = with_adapter(params, factors)
    kernels = [stack["mlp"]["up"]["kernel"] for stack in apart["stacks"]]
    assert [isinstance(k, LoraTensor) for k in kernels[:2]] == [False, True]
    factors["layers", 0, "mlp", "up"] = LoraFactors(
        draw((inputs, 2)), draw((2, outputs)), 0.01
    )
    layers = len(params["stacks"])
    both = with_adapter(params, factors)
    together = with_adapter(restack(params, (layers,)), factors)
    kernel = together["stacks"][0]["mlp"]["up"]["kernel"]
    assert kernel.a_IR.shape == (layers, inputs, 3)
    assert stack_size(together["stacks"][0]) == layers
    assert_close(logits(model, together, tokens), logits(model, both, tokens))


def test_names_are_listed_and_may_not_repeat():
    _, params, _ = model_of("llama")
    assert adapter_names(params) == ()
    params = add_lora(params, LoraConfig(targets=("up",)), KEY, "first")
    params = add_lora(params, LoraConfig(targets=("query", "up")), KEY, "second")
    assert adapter_names(params) == ("first", "second")
    message = (
        "cannot add LoRA: name: the model has an adapter 'first', expected a new "
        "name. Choose another, or remove that one."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        add_lora(params, LoraConfig(), KEY, "first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 0},
            "cannot add LoRA: rank: 0, expected 1 or more. Correct it.",
        ),
        (
            {"targets": ()},
            "cannot add LoRA: targets: none is given, expected some of query, key, "
            "value, output, gate, up, down, head. Name one.",
        ),
        (
            {"targets": ("querry",)},
            "unknown target: 'querry', expected one of down, gate, head, key, output, "
            "query, up, value. Did you mean 'query'?",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LoraConfig(**options)


def test_a_projection_that_the_model_lacks_is_refused():
    _, params, _ = model_of("gpt2")
    message = (
        "cannot add LoRA: targets: the model has no 'gate', expected some of down, "
        "key, output, query, up, value. Leave it out."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        add_lora(params, LoraConfig(targets=("up", "gate")), KEY)


def test_random_factors_move_the_logits():
    # Or the comparisons of this folder would compare nothing.
    model, params, tokens = model_of("llama")
    moved = logits(model, adapted(params), tokens) - logits(model, params, tokens)
    assert np.abs(moved).max() > 1e-2
    bare = add_lora(params, LoraConfig(), KEY)
    assert drawn(bare)["stacks"][0]["attention"]["value"]["kernel"].b_RO.any()

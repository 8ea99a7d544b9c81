"""Quantizing a whole model: what is touched, what it costs, how far logits move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention.rope import RopeConfig
from jaxllm.core import Leaf
from jaxllm.layers import AttentionConfig, MlpConfig, NormConfig
from jaxllm.models import DecoderConfig, make_model, restack
from jaxllm.quantization import Int8, IntTensor, quantize_params


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request):
    config = DecoderConfig(
        vocabulary=40,
        width=32,
        num_layers=3,
        max_positions=16,
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=NormConfig()
        ),
        mlp=MlpConfig(hidden=48),
        ropes=(RopeConfig(rotary_dim=8),),
        learned_positions=True,
        tied_head=request.param == "tied",
    )
    model, params = make_model(config, jax.random.key(0), stacks=(1, 1, 1))
    # Norm scales and biases away from where they start.
    return model, jax.tree.map(lambda x: x * 2 + 0.01, params)


def kinds(params):
    found = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, Leaf)
    )
    return {jax.tree_util.keystr(path): type(leaf) for path, leaf in found}


def test_kernels_and_the_table_are_quantized_and_nothing_else(model):
    params = quantize_params(model[1], Int8())
    # One scale for each output: of the table, which is also the head, for each token.
    assert params["embedder"]["table"].scale.shape == (40, 1)
    assert params["stacks"][0]["mlp"]["down"]["kernel"].scale.shape == (1, 1, 32)
    quantized = kinds(params)
    for path, kind in quantized.items():
        is_weight = path.endswith(("['kernel']", "['table']"))
        assert (kind is IntTensor) == is_weight, path
    assert sum(kind is IntTensor for kind in quantized.values()) >= 3 * 7 + 1


@pytest.mark.parametrize("activations", [0, 8])
def test_logits_stay_near(model, activations):
    model, params = model
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    quantizer = Int8(activations=activations)
    quantized = quantize_params(params, quantizer)
    wanted = np.asarray(model(params, tokens).logits_BTV)
    logits = np.asarray(jax.jit(model)(quantized, tokens).logits_BTV)
    off = np.abs(logits - wanted).max() / np.abs(wanted).max()
    assert 0 < off < 0.05
    if not activations:
        # Weight-only equals the model of the dequantized weights.
        dense = jax.tree.map(
            lambda w: w.dequantize(jnp.float32) if isinstance(w, Leaf) else w,
            quantized,
            is_leaf=lambda w: isinstance(w, Leaf),
        )
        again = np.asarray(model(dense, tokens).logits_BTV)
        np.testing.assert_allclose(logits, again, rtol=1e-4, atol=1e-4)


def test_stacks_can_be_chosen_before_and_after(model):
    model, params = model
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    after = restack(quantize_params(params, Int8()), (3,))
    before = quantize_params(restack(params, (3,)), Int8())
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    scanned = model(after, tokens).logits_BTV
    unrolled = model(quantize_params(params, Int8()), tokens).logits_BTV
    np.testing.assert_allclose(
        np.asarray(scanned), np.asarray(unrolled), rtol=1e-4, atol=1e-5
    )


def test_what_is_quantized_already_stays(model):
    once = quantize_params(model[1], Int8())
    twice = quantize_params(once, Int8(activations=8))
    assert twice["embedder"]["table"] is once["embedder"]["table"]


def test_shapes_alone_can_be_quantized(model):
    shapes = jax.eval_shape(lambda p: quantize_params(p, Int8()), model[1])
    real = quantize_params(model[1], Int8())
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(real), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)

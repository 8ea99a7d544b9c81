"""Frozen models: stacks, what they collect, and how they hash."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention import RopeConfig
from jaxllm.core import DTypePolicy
from jaxllm.core.errors import ConfigError
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import Context, DecoderConfig, make_model, restack

CONFIG = DecoderConfig(
    vocabulary=17,
    width=16,
    num_layers=4,
    max_positions=64,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    mlp=MlpConfig(hidden=24),
    ropes=(RopeConfig(rotary_dim=8), RopeConfig(rotary_dim=8, theta=100.0)),
    layer_rope=(0, -1, 1, -1),
)
TOKENS = jnp.arange(22).reshape(2, 11) % 17


def made(sizes=(1, 1, 1, 1)):
    model, params = make_model(CONFIG, jax.random.key(0))
    # Large weights, so that a layer's rotation shows in the logits.
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
    return model, restack(params, sizes)


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2)])
def test_stacks_of_any_size_give_the_same(sizes) -> None:
    model, params = made()
    context = Context.start(TOKENS, collect=("hidden:0", "hidden:2"))
    one = jax.jit(model)(params, TOKENS, context)
    other = jax.jit(model)(restack(params, sizes), TOKENS, context)
    np.testing.assert_allclose(one.logits_BTV, other.logits_BTV, atol=2e-5)
    assert one.aux.keys() == other.aux.keys() == {"hidden:0", "hidden:2"}
    for name, hidden in one.aux.items():
        np.testing.assert_allclose(hidden, other.aux[name], atol=2e-5)


def test_layers_without_rotation_differ_from_rotated_ones() -> None:
    model, params = made((4,))
    config = dataclasses.replace(CONFIG, layer_rope=(0, 1, 1, 1))
    turned, _ = make_model(config)
    plain = jax.jit(model)(params, TOKENS).logits_BTV
    assert float(jnp.abs(plain - jax.jit(turned)(params, TOKENS).logits_BTV).max()) > (
        1e-3
    )


def test_collected_states_are_those_between_runs() -> None:
    model, params = made((2, 2))
    context = Context.start(TOKENS, collect=("hidden:1",))
    x = model.embed(params, TOKENS, context.positions_BT)
    half, first_kv, _ = model.run_layers(params, x, context, 0, 2)
    _, all_kv, aux = model.run_layers(params, x, context)
    np.testing.assert_allclose(half, aux["hidden:1"], atol=1e-6)
    assert first_kv[1] is None
    assert all_kv[1] is not None


def test_models_of_one_configuration_are_equal() -> None:
    model, _ = made()
    again, _ = make_model(CONFIG)
    other, _ = make_model(CONFIG, policy=DTypePolicy())
    assert model == again and hash(model) == hash(again)
    assert model != other


def test_bad_stack_sizes_are_refused() -> None:
    _, params = made()
    with pytest.raises(ConfigError) as caught:
        restack(params, (2, 3))
    assert str(caught.value) == (
        "cannot restack: sizes (2, 3) sum to 5, expected 4 layers. Choose sizes that "
        "sum to it."
    )

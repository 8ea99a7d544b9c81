"""Operations of a token, counted by hand and by the compiler."""

import dataclasses

import jax
import pytest

from jaxllm.attention import RopeConfig
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import make_model
from jaxllm.training.throughput import flops_per_token, peak_flops
from tests.training.small_run import decoder
from tests.training.test_step import batch_of


def test_operations_are_those_of_the_formula() -> None:
    config = decoder(100)
    # Query and output 2 x 16 x 16, key and value 2 x 16 x 8, three of 16 x 32.
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
    attention = 4 * 4 * 20
    expected = 6 * (2 * layer + 16 * 100 + 2 * attention)
    assert flops_per_token(config, 20) == expected


def test_the_compiler_counts_about_as_many_for_a_forward() -> None:
    config = dataclasses.replace(
        decoder(100, max_positions=128),
        width=128,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        mlp=MlpConfig(hidden=256),
        ropes=(RopeConfig(rotary_dim=32),),
    )
    model, shapes = make_model(config, None, stacks=(1, 1))
    rows, length = 2, 128
    batch = jax.eval_shape(lambda: batch_of(rows, length))
    run = jax.jit(lambda p, b: model(p, b.tokens_BT, b.context()).logits_BTV)
    cost = run.lower(shapes, batch).compile().cost_analysis()
    # Masked attention is computed whole; norms and softmax are counted by nobody.
    own = rows * length * flops_per_token(config, 2 * length) / 3
    assert cost["flops"] == pytest.approx(own, rel=0.15)


def test_a_cpu_is_measured() -> None:
    assert 1e8 < peak_flops() < 1e14

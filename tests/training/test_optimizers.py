"""Learning rates and rules are what their options say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.training import OptimizerConfig, make_optimizer
from jaxllm.training.optimizers import make_schedule


def rates(steps=100, **options):
    schedule = make_schedule(OptimizerConfig(rate=1.0, **options), steps)
    return np.asarray([float(schedule(jnp.int32(i))) for i in range(steps + 1)])


def test_cosine_rises_and_falls_to_the_floor() -> None:
    found = rates(warmup=0.1, schedule="cosine", floor=0.2)
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert found[55] == pytest.approx((1 + 0.2) / 2, abs=1e-6)
    assert found[100] == pytest.approx(0.2)
    assert (np.diff(found[10:]) <= 1e-7).all()


def test_linear_stays_and_then_falls() -> None:
    found = rates(warmup=0.0, schedule="linear", decay_from=0.5, floor=0.0)
    np.testing.assert_allclose(found[:51], 1.0)
    np.testing.assert_allclose(found[50:], np.linspace(1, 0, 51), atol=1e-6)


def test_constant_never_falls() -> None:
    assert rates(warmup=0.0, schedule="constant")[-1] == 1.0


PARAMS = {
    "embedder": {"table": jnp.ones((4, 3))},
    "stacks": ({"mlp": {"kernel": jnp.ones((2, 3, 3))}, "norm": jnp.ones((2, 3))},),
}
KINDS = ("adamw", "muon", "adafactor", "sgd", "optax.lion")


@pytest.mark.parametrize("name", KINDS)
def test_every_rule_goes_downhill(name) -> None:
    config = OptimizerConfig(name=name, rate=0.05, warmup=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 100)
    params, state = PARAMS, optimizer.init(PARAMS)

    def loss(params):
        return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(params))

    for _ in range(20):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert float(loss(params)) < 0.5 * float(loss(PARAMS))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name) -> None:
    config = OptimizerConfig(name=name, rate=0.1, warmup=0.0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    [stack] = updates["stacks"]
    assert (np.asarray(stack["mlp"]["kernel"]) < 0).all()
    assert not np.any(stack["norm"])
    assert not np.any(updates["embedder"]["table"])


def test_gradients_are_clipped_as_a_whole() -> None:
    config = OptimizerConfig(name="sgd", rate=1.0, warmup=0.0, b1=0.0, clip=2.0)
    optimizer = make_optimizer(config, 10)
    grads = jax.tree.map(lambda x: 7 * jnp.ones_like(x), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamm"}, r"optimizer.name is 'adamm', expected adamw, muon"),
        ({"warmup": 2.0}, r"optimizer.warmup is 2.0, expected a share"),
        ({"rate": float("nan")}, r"optimizer.rate is nan, expected a finite"),
    ],
)
def test_mistakes(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimizerConfig(**options), 10)

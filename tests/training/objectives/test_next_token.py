"""Cross entropy against the plain form, and the memory that it exists to save."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.training import Batch
from jaxllm.training.objectives import NextToken
from tests.training.objectives.cases import (
    distance,
    gradient_of,
    packed_batch,
    small_model,
)


@jax.jit
def plain_loss(params, batch, smoothing, z_loss):
    """All logits at once, labels as vectors; the oracle."""
    model, _ = small_model()
    logits_BTV = model(params, batch.tokens_BT, batch.context()).logits_BTV[:, :-1]
    label_BT, weight_BT = batch.tokens_BT[:, 1:], batch.weight_BT[:, 1:]
    V = logits_BTV.shape[-1]
    target_BTV = jax.nn.one_hot(label_BT, V) * (1 - smoothing) + smoothing / V
    loss_BT = optax.softmax_cross_entropy(logits_BTV, target_BTV)
    loss_BT += z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    return (weight_BT * loss_BT).sum() / weight_BT.sum()


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.05)])
def test_it_is_the_plain_form(chunk, smoothing, z_loss) -> None:
    batch, params = packed_batch(), small_model()[1]
    objective = NextToken(label_smoothing=smoothing, z_loss=z_loss, chunk=chunk)
    gradient, value, metrics = gradient_of(objective, batch)
    expected, wanted = jax.jit(jax.value_and_grad(plain_loss))(
        params, batch, smoothing, z_loss
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert distance(gradient, wanted) < 1e-5
    nll = plain_loss(params, batch, 0.0, 0.0)
    np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)


def test_accuracy_counts_right_choices() -> None:
    batch = packed_batch()
    model, params = small_model()
    _, _, metrics = gradient_of(NextToken(), batch)
    logits_BTV = model(params, batch.tokens_BT, batch.context()).logits_BTV
    right_BT = jnp.argmax(logits_BTV[:, :-1], axis=-1) == batch.tokens_BT[:, 1:]
    weight_BT = batch.weight_BT[:, 1:]
    expected = (right_BT * weight_BT).sum() / weight_BT.sum()
    np.testing.assert_allclose(metrics["accuracy"], expected, rtol=1e-6)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a program computes, loops included."""
    found = [0]
    for equation in jaxpr.eqns:
        found += [math.prod(v.aval.shape) for v in equation.outvars]
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found.append(largest_array(inner))
    return max(found)


@pytest.mark.parametrize(("chunk", "tokens"), [(None, 128), (64, 64), (512, 512)])
def test_all_logits_never_exist(chunk, tokens) -> None:
    # The last case has one stretch: it shows that the measure would notice.
    V, B, T = 2**15, 2, 512
    model, params = small_model(vocabulary=V)
    whole = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = Batch(whole, whole, whole, jax.ShapeDtypeStruct((B, T), jnp.float32))
    objective = NextToken(chunk=chunk)

    def loss(params, batch):
        weights = objective.weights(batch)
        return objective.loss(model, params, batch, weights, jax.random.key(0), {})[0]

    program = jax.make_jaxpr(jax.grad(loss))(params, batch)
    assert largest_array(program.jaxpr) == B * tokens * V

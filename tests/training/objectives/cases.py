"""Small models and batches to take losses of, and ways to compare gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.attention import RopeConfig
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig, make_model
from jaxllm.training import Batch
from jaxllm.training.objectives import (
    Consistency,
    Distillation,
    NextToken,
    Objective,
    TrajectoryBatch,
)

VOCABULARY, END = 23, 7


@functools.cache
def small_model(seed: int = 0, vocabulary: int = VOCABULARY):
    """One layer whose choices differ between positions."""
    config = DecoderConfig(
        vocabulary=vocabulary,
        width=16,
        num_layers=1,
        max_positions=128,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        mlp=MlpConfig(hidden=24),
        ropes=(RopeConfig(rotary_dim=8),),
    )
    model, params = make_model(config, jax.random.key(seed))
    return model, jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)


@functools.cache
def packed_batch(rows: int = 5, tokens: int = 11, seed: int = 0) -> Batch:
    """Rows of several documents, of very different numbers of learned tokens."""
    rng = np.random.default_rng(seed)
    segment_BT = np.zeros((rows, tokens), np.int32)
    position_BT = np.zeros((rows, tokens), np.int32)
    weight_BT = np.zeros((rows, tokens), np.float32)
    for row in range(rows):
        at, document = 0, 1
        filled = tokens - int(rng.integers(tokens - 3)) if row else tokens
        while at < filled:
            length = min(int(rng.integers(2, 6)), filled - at)
            here = slice(at, at + length)
            segment_BT[row, here] = document
            position_BT[row, here] = np.arange(length)
            weight_BT[row, here] = rng.integers(0, 2, length)
            weight_BT[row, at] = 0
            at, document = at + length, document + 1
    weight_BT[0] = segment_BT[0] * (position_BT[0] > 0)
    tokens_BT = rng.integers(0, VOCABULARY, (rows, tokens)).astype(np.int32)
    return Batch(*map(jnp.asarray, (tokens_BT, segment_BT, position_BT, weight_BT)))


@functools.cache
def trajectory_batch(rows: int = 5, seed: int = 0) -> TrajectoryBatch:
    """Blocks whose iterates differ from the fixed point in some tokens."""
    rng = np.random.default_rng(seed)
    prefix, block = 6, 5

    def drawn(*shape: int) -> np.ndarray:
        return rng.integers(0, VOCABULARY, shape).astype(np.int32)

    length_B = rng.integers(2, prefix + 1, rows).astype(np.int32)
    fixed_BT = np.where(rng.random((rows, block)) < 0.1, END, drawn(rows, block))
    next_BT = np.where(rng.random((rows, block)) < 0.5, fixed_BT, drawn(rows, block))
    wrong_BT = rng.random((rows, block)) < 0.5
    iterate_BT = np.where(wrong_BT, drawn(rows, block), next_BT)
    prompt_B = rng.integers(1, length_B + 1).astype(np.int32)
    leaves = (
        drawn(rows, prefix),
        length_B,
        prompt_B,
        fixed_BT.astype(np.int32),
        iterate_BT.astype(np.int32),
        next_BT.astype(np.int32),
        np.full(rows, block, np.int32),
    )
    return TrajectoryBatch(*map(jnp.asarray, leaves))


def taught(*kinds: str, **options: Any) -> Distillation:
    """Distillation from a model with three more rows of padding in its vocabulary."""
    objective = Distillation(teacher="small", loss_kinds=kinds, **options)
    return objective.taught_by(small_model(1, VOCABULARY + 3)[0])


def frozen_of(objective: Objective) -> Any:
    taught = isinstance(objective, Distillation)
    return small_model(1, VOCABULARY + 3)[1] if taught else {}


def batch_of(objective: Objective) -> Any:
    is_consistency = isinstance(objective, Consistency)
    return trajectory_batch() if is_consistency else packed_batch()


CASES = {
    "next_token": NextToken(),
    "next_token, smoothed": NextToken(label_smoothing=0.1, z_loss=0.01),
    "forward_kl": taught("forward_kl"),
    "reverse_kl": taught("reverse_kl"),
    "tvd": taught("tvd"),
    "tvdpp": taught("tvdpp"),
    "mixture": taught("next_token", "tvd", "tvdpp", shares=(0.2, 0.5, 0.3)),
    "consistency": Consistency(eos=(END,), positions=None),
    "consistency, local": Consistency(eos=(END,), goal="next", label_smoothing=0.1),
}
"""Objectives whose loss is a function of the batch alone."""


def gradient_of(
    objective: Objective, batch: Any, weights: Any = None
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """The gradient of a part of a batch, its loss and its metrics."""
    weights = objective.weights(batch) if weights is None else weights
    _, params = small_model()
    return _gradient_of(params, batch, weights, frozen_of(objective), objective)


@functools.partial(jax.jit, static_argnames="objective")
def _gradient_of(
    params: Any, batch: Any, weights: Any, frozen: Any, objective: Objective
) -> Any:
    model, _ = small_model()

    def loss(params: Any) -> Any:
        key = jax.random.key(0)
        return objective.loss(model, params, batch, weights, key, frozen)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return gradient, value, metrics


def distance(found: Any, wanted: Any) -> float:
    """The norm of the difference of two trees, as a share of the second's norm."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    difference = sum(float(jnp.square(a - b).sum()) for a, b in pairs)
    whole = sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(wanted))
    assert whole > 0, "a gradient of zero would equal anything"
    return (difference / whole) ** 0.5

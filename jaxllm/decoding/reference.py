"""Plain decoding without cache, batch or loop on the device: the engine's oracle."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.rng import row_keys
from jaxllm.decoding.sampling import Sampler, scored
from jaxllm.models.freeze import Model

__all__ = ["decode_reference"]


def decode_reference(
    model: Model,
    params: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampler: Sampler,
    seed: int = 0,
    eos: Sequence[int] = (),
) -> tuple[list[int], list[float]]:
    """Runs the whole sequence anew for every token of one row.

    Args:
      model: The model.
      params: Its parameters.
      prompt: Ids, at least one.
      max_new_tokens: Most tokens to generate.
      sampler: Options of one row.
      seed: The row's seed.
      eos: Ids that end the row.

    Returns:
      The new tokens, and for each the gap between its score (logits after temperature,
      filters and noise) and the next best: a choice with a small gap may differ in a
      computation of another shape.
    """
    ids, key_B = list(prompt), row_keys(np.asarray([seed]))
    gaps: list[float] = []
    # Causal: what stands to the right of a token does not touch it.
    width = len(prompt) + max_new_tokens
    while len(ids) < width:
        tokens_BT = jnp.asarray([ids + [0] * (width - len(ids))], jnp.int32)
        token, gap = _next(params, tokens_BT, len(ids), key_B, sampler, model=model)
        gaps.append(float(gap))
        ids.append(int(token))
        if token in eos:
            break
    return ids[len(prompt) :], gaps


@functools.partial(jax.jit, static_argnames=("model",))
def _next(
    params: Any,
    tokens_BT: Array,
    length: Array,
    key_B: Array,
    sampler: Sampler,
    *,
    model: Model,
) -> tuple[Array, Array]:
    """Returns the token after the first `length`, and its lead over the next best."""
    logits_BTV = model(params, tokens_BT).logits_BTV
    logits_BMV = jax.lax.dynamic_slice_in_dim(logits_BTV, length - 1, 1, axis=1)
    position_BM = jnp.full((1, 1), length, jnp.int32)
    scores_V = scored(logits_BMV, position_BM, key_B, sampler)[0, 0]
    token = jnp.argmax(scores_V)
    return token, scores_V[token] - jnp.max(scores_V.at[token].set(-jnp.inf))

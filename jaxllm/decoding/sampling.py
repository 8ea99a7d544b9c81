"""From logits to a choice: greedy, temperature, top-k, top-p, min-p.

Letters: B rows, M nodes, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass, static
from jaxllm.core.rng import position_gumbel

__all__ = ["Sampler", "choose", "make_sampler", "scored", "warp"]


@pytree_dataclass
class Sampler:
    """How each row chooses; every number is data, so changing one compiles nothing.

    Attributes:
      temperature_B: float32; 0 is greedy.
      top_k_B: int32; 0 keeps all.
      top_p_B: float32 in (0, 1].
      min_p_B: float32 in [0, 1).
      greedy: Whether all rows are greedy, so that no noise is drawn.
      filtered: Whether some row filters, so that the vocabulary is sorted.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    greedy: bool = static(default=True)
    filtered: bool = static(default=False)


def make_sampler(
    rows: int,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
) -> Sampler:
    """Makes a sampler after checking every value.

    Args:
      rows: B; a scalar option holds for all rows.
      temperature: 0 (greedy) or more.
      top_k: Keeps the k likeliest tokens; 0 keeps all.
      top_p: Keeps the smallest set of likeliest tokens with this probability.
      min_p: Keeps tokens at least this likely relative to the likeliest.

    Raises:
      ConfigError: A value is out of range.
    """

    def spread(name: str, values: Any, dtype: Any, low: float, high: float) -> Any:
        given = np.broadcast_to(np.asarray(values), (rows,))
        for value in given.tolist():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or math.isnan(value) or not low <= value <= high:
                raise ConfigError(
                    f"cannot sample: {name} is {value}, expected a number from "
                    f"{low:g} to {high:g}. Correct --{name}."
                )
        return given.astype(dtype)

    temperature_B = spread("temperature", temperature, np.float32, 0, 1e6)
    top_k_B = spread("top_k", top_k, np.int32, 0, 2**31 - 1)
    top_p_B = spread("top_p", top_p, np.float32, 1e-6, 1)
    min_p_B = spread("min_p", min_p, np.float32, 0, 1 - 1e-6)
    filters = (top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0)
    return Sampler(
        jnp.asarray(temperature_B),
        jnp.asarray(top_k_B),
        jnp.asarray(top_p_B),
        jnp.asarray(min_p_B),
        greedy=bool((temperature_B == 0).all()),
        filtered=bool((filters & (temperature_B > 0)).any()),
    )


def warp(logits_BMV: Array, sampler: Sampler) -> Array:
    """Applies temperature and filters; a filtered-out token gets -inf.

    The filters follow one another: top-k, then top-p of what it kept, then min-p.
    Tokens that tie with the last one kept are kept too. Greedy rows pass unchanged.

    Args:
      logits_BMV: float32.
      sampler: The rows' options.

    Returns:
      `[B, M, V]` float32; `softmax` of a row is the distribution it samples from.

    Source: top-k (arXiv 1805.04833); nucleus (arXiv 1904.09751); min-p
      (arXiv 2407.01082).
    """
    if sampler.greedy:
        return logits_BMV
    temperature = sampler.temperature_B[:, None, None]
    scaled = logits_BMV / jnp.where(temperature > 0, temperature, 1.0)
    if sampler.filtered:
        scaled = _filter(scaled, sampler)
    return jnp.where(temperature > 0, scaled, logits_BMV)


def _filter(scaled: Array, sampler: Sampler) -> Array:
    V = scaled.shape[-1]
    ordered = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
    k = sampler.top_k_B[:, None, None]
    keep = (jnp.arange(V) < k) | (k == 0)
    p = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    keep &= before < sampler.top_p_B[:, None, None]
    keep &= p >= sampler.min_p_B[:, None, None] * p[..., :1]
    # What is kept is a run from the top, so one threshold describes it.
    last = jnp.maximum(keep.sum(-1, keepdims=True) - 1, 0)
    threshold = jnp.take_along_axis(ordered, last, axis=-1)
    return jnp.where(scaled >= threshold, scaled, -jnp.inf)


def scored(
    logits_BMV: Array, position_BM: Array, row_key_B: Array, sampler: Sampler
) -> Array:
    """Returns what a choice maximises: `warp(logits) + noise`, `[B, M, V]` float32.

    Arguments as for `choose`.
    """
    scores = warp(logits_BMV, sampler)
    if not sampler.greedy:
        noise = position_gumbel(row_key_B, position_BM, logits_BMV.shape[-1])
        warm = sampler.temperature_B[:, None, None] > 0
        scores = scores + jnp.where(warm, noise, 0.0)
    return scores


def choose(
    logits_BMV: Array, position_BM: Array, row_key_B: Array, sampler: Sampler
) -> Array:
    """Chooses the token of every position: `argmax(warp(logits) + noise)`.

    The noise of a position depends on the row's key and the position alone, so plain
    sampling and the verification of any draft choose the same tokens.

    Args:
      logits_BMV: float32 logits of the tokens to be chosen.
      position_BM: int32 absolute positions of those tokens.
      row_key_B: Typed keys.
      sampler: The rows' options.

    Returns:
      int32 `[B, M]`; ties go to the lowest id.

    Source: the Gumbel-max trick; drafter-invariant noise (arXiv 2408.07978).
    """
    scores = scored(logits_BMV, position_BM, row_key_B, sampler)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)

"""From logits to a choice: greedy, temperature, top-k, top-p, min-p.

The target and a drafter that has logits choose through the same functions.

Letters: B rows, M nodes, V vocabulary, W draft width.
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

__all__ = [
    "VERIFIERS",
    "Sampler",
    "best",
    "candidates",
    "choose",
    "draw",
    "largest",
    "make_sampler",
    "scored",
    "warp",
]

VERIFIERS = ("match", "reject")

# Streams of a row's key: noise that drafter and target share, noise that a rejection
# test needs to be independent of everything else, and what fills guesses.
SHARED_STREAM, DRAFT_STREAM, TEST_STREAM, RESIDUAL_STREAM, FILL_STREAM = range(5)

# Scores that `largest` looks at together.
_BLOCK = 128


@pytree_dataclass
class Sampler:
    """How each row chooses; every number is data, so changing one compiles nothing.

    Attributes:
      temperature_B: float32; 0 is greedy.
      top_k_B: int32; 0 keeps all.
      top_p_B: float32 in (0, 1].
      min_p_B: float32 in [0, 1).
      repetition_B: float32 above 0; divides the positive logits, and multiplies the
        negative ones, of every token of prompt and output. 1 does nothing.
      presence_B: float32; subtracted from the logits of every token of the output.
      greedy: Whether all rows are greedy, so that no noise is drawn.
      filtered: Whether some row filters, so that the vocabulary is sorted.
      penalized: Whether some row penalizes, so that tokens are looked up.
      verify: `"match"` or `"reject"`.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    repetition_B: Array
    presence_B: Array
    greedy: bool = static(default=True)
    filtered: bool = static(default=False)
    penalized: bool = static(default=False)
    verify: str = static(default="match")

    @property
    def rejects(self) -> bool:
        """Whether tokens are drawn apart from the drafter's noise, and tested."""
        return self.verify == "reject" and not self.greedy


def make_sampler(
    rows: int,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    presence_penalty: float | Sequence[float] = 0.0,
    verify: str = "match",
) -> Sampler:
    """Makes a sampler after checking every value.

    Args:
      rows: B; a scalar option holds for all rows.
      temperature: 0 (greedy) or more.
      top_k: Keeps the k likeliest tokens; 0 keeps all.
      top_p: Keeps the smallest set of likeliest tokens with this probability.
      min_p: Keeps tokens at least this likely relative to the likeliest.
      repetition_penalty: Above 1 makes every token of prompt and output less likely.
      presence_penalty: Subtracted from the logits of every token of the output.
      verify: `"match"`, or `"reject"` for the rejection rule (chains only).

    Raises:
      ConfigError: A value is out of range.

    Source: repetition penalty: CTRL (arXiv 1909.05858) section 4.1, as in Hugging Face
      (tokens of the prompt count); presence penalty: as in vLLM (they do not).
    """
    if verify not in VERIFIERS:
        raise ConfigError(
            f"cannot verify: verify is {verify!r}, expected one of "
            f"{', '.join(VERIFIERS)}. Correct --verify."
        )

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
    repetition_B = spread(
        "repetition_penalty", repetition_penalty, np.float32, 1e-2, 1e2
    )
    presence_B = spread("presence_penalty", presence_penalty, np.float32, -100, 100)
    filters = (top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0)
    return Sampler(
        jnp.asarray(temperature_B),
        jnp.asarray(top_k_B),
        jnp.asarray(top_p_B),
        jnp.asarray(min_p_B),
        jnp.asarray(repetition_B),
        jnp.asarray(presence_B),
        greedy=bool((temperature_B == 0).all()),
        filtered=bool((filters & (temperature_B > 0)).any()),
        penalized=bool((repetition_B != 1).any() or (presence_B != 0).any()),
        verify=verify,
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
    logits_BMV: Array,
    position_BM: Array,
    row_key_B: Array,
    sampler: Sampler,
    stream: int = SHARED_STREAM,
) -> Array:
    """Returns what a choice maximises: `warp(logits) + noise`, `[B, M, V]` float32.

    Arguments as for `choose`.
    """
    scores = warp(logits_BMV, sampler)
    if not sampler.greedy:
        key_B = stream_keys(row_key_B, stream)
        noise = position_gumbel(key_B, position_BM, logits_BMV.shape[-1])
        warm = sampler.temperature_B[:, None, None] > 0
        scores = scores + jnp.where(warm, noise, 0.0)
    return scores


def stream_keys(row_key_B: Array, stream: int) -> Array:
    """Returns the rows' keys of an independent stream of noise."""
    if stream == SHARED_STREAM:
        return row_key_B
    # Positions count up from 0 and are folded in likewise; these count down.
    return jax.vmap(lambda key: jax.random.fold_in(key, np.uint32(2**32 - stream)))(
        row_key_B
    )


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
    return best(scored(logits_BMV, position_BM, row_key_B, sampler))


def best(scores_BMV: Array) -> Array:
    """Returns the int32 index of the largest score, the lowest of several.

    Two plain reductions: XLA:CPU runs its argmax about ten times slower. A row with a
    NaN gets the last index; the engine stops such a row.
    """
    top = jnp.max(scores_BMV, axis=-1, keepdims=True)
    count = scores_BMV.shape[-1]
    index = jnp.where(scores_BMV == top, jnp.arange(count, dtype=jnp.int32), count)
    return jnp.minimum(jnp.min(index, axis=-1), count - 1)


def largest(scores_BMV: Array, width: int) -> tuple[Array, Array]:
    """Returns the largest scores and their int32 indices, `[B, M, W]`, best first.

    Equal scores come in the order of their indices. `jax.lax.top_k` within the blocks
    whose maxima are largest: where only its indices are used, XLA:CPU sorts all that
    it is given, which for 32k tokens takes longer than a pass of a 110M model.

    Args:
      scores_BMV: float32, no NaN.
      width: W, at most V.
    """
    count = scores_BMV.shape[-1]
    blocks = -(-count // _BLOCK)
    if blocks <= width:
        top, index_BMW = jax.lax.top_k(scores_BMV, width)
        return top, index_BMW.astype(jnp.int32)
    padding = ((0, 0), (0, 0), (0, blocks * _BLOCK - count))
    padded = jnp.pad(scores_BMV, padding, constant_values=-jnp.inf)
    blocked = padded.reshape(*padded.shape[:2], blocks, _BLOCK)
    _, chosen_BMW = jax.lax.top_k(blocked.max(axis=-1), width)
    # In their own order, so that equal scores stay in theirs.
    chosen_BMW = jnp.sort(chosen_BMW, axis=-1)
    kept = jnp.take_along_axis(blocked, chosen_BMW[..., None], axis=2)
    top, at = jax.lax.top_k(kept.reshape(*kept.shape[:2], -1), width)
    block = jnp.take_along_axis(chosen_BMW, at // _BLOCK, axis=-1)
    return top, (block * _BLOCK + at % _BLOCK).astype(jnp.int32)


def draw(
    logits_BMV: Array, position_BM: Array, row_key_B: Array, sampler: Sampler
) -> tuple[Array, Array | None]:
    """Draws a drafter's token of every position.

    Under `match` with the target's own noise, so that the two agree as often as their
    logits allow. Under `reject` with noise of its own, and the distribution that the
    tokens were drawn from comes with them.

    Args:
      logits_BMV: float32 logits of the drafter.
      position_BM: int32 absolute positions of the tokens to be drawn.
      row_key_B: Typed keys.
      sampler: The rows' options.

    Returns:
      int32 tokens `[B, M]`, and float32 log-probabilities `[B, M, V]` or None.
    """
    if not sampler.rejects:
        return choose(logits_BMV, position_BM, row_key_B, sampler), None
    scores = scored(logits_BMV, position_BM, row_key_B, sampler, DRAFT_STREAM)
    return best(scores), log_probabilities(logits_BMV, sampler)


def log_probabilities(logits_BMV: Array, sampler: Sampler) -> Array:
    """Returns the distribution that is sampled from; one-hot for a greedy row."""
    log_p = jax.nn.log_softmax(warp(logits_BMV, sampler), axis=-1)
    top = best(logits_BMV)[..., None]
    sure = jnp.where(jnp.arange(logits_BMV.shape[-1]) == top, 0.0, -jnp.inf)
    return jnp.where(sampler.temperature_B[:, None, None] > 0, log_p, sure)


def candidates(
    logits_BMV: Array,
    position_BM: Array,
    row_key_B: Array,
    sampler: Sampler,
    width: int,
) -> tuple[Array, Array]:
    """Returns a tree drafter's best tokens of every position, best first.

    Ranked by logits plus the target's noise: `width` tokens drawn without replacement
    in the order in which the target would prefer them.

    Args:
      logits_BMV: float32 logits of the drafter.
      position_BM: int32 absolute positions of the tokens.
      row_key_B: Typed keys.
      sampler: The rows' options.
      width: W.

    Returns:
      int32 tokens `[B, M, W]` and float32 `[B, M, W]`, the log of how sure the drafter
      is of each (its share of the exponentiated scores): -inf for what it excludes,
      and where the vocabulary has fewer than `width` tokens.

    Source: EAGLE-2 (arXiv 2406.16858) section 4 for the use of the confidence; the
      noise is ours.
    """
    scores = scored(logits_BMV, position_BM, row_key_B, sampler)
    missing = max(width - scores.shape[-1], 0)
    padding = ((0, 0), (0, 0), (0, missing))
    scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
    top, tokens_BMW = largest(scores, width)
    sure_BMW = top - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return tokens_BMW, sure_BMW

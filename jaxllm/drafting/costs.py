"""What a step costs at each width, measured.

Letters: B rows, S slots.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints import LanguageModel
from jaxllm.core.errors import ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.decoding.buckets import shapes_for
from jaxllm.decoding.engine import DecodeState, advance, prefill
from jaxllm.decoding.job import on_mesh
from jaxllm.decoding.protocol import Committed, Drafter
from jaxllm.decoding.sampling import make_sampler
from jaxllm.drafting.autoregressive import Autoregressive

__all__ = ["measure_cost", "measure_variants"]


def measure_cost(
    lm: LanguageModel,
    widths: Sequence[int],
    context: int = 128,
    *,
    rows: int = 1,
    steps: int = 16,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Times plain decoding padded to several widths.

    Args:
      lm: The target.
      widths: M of each; 1 or more.
      context: Tokens in the cache while it is timed.
      rows: B.
      steps: Steps that are timed together.
      repeats: Turns.
      clock: Seconds.

    Returns:
      The cost of a step at every width, and at 1, relative to width 1: the table that
      `jaxllm.decoding.payoff` takes.

    Raises:
      ConfigError: A width is below 1.
    """
    widths = sorted({1, *widths})
    if widths[0] < 1:
        raise ConfigError(
            f"cannot measure: a width is {widths[0]}, expected 1 or more. Correct it."
        )
    padded = [Autoregressive(query_width=width) for width in widths]
    start = _Start(lm, Autoregressive(), {}, context, rows, steps)
    return dict(zip(widths, _ratios(start, padded, repeats, clock), strict=True))


def measure_variants(
    lm: LanguageModel,
    drafter: Drafter,
    params: Any,
    context: int = 128,
    *,
    steps: int = 16,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Times whole steps of every variant of a drafter: proposing, target, observing.

    Args:
      lm: The target.
      drafter: Bound to it.
      params: The drafter's parameters.
      context: As for `measure_cost`, like the rest.
      steps: See there.
      repeats: See there.
      clock: See there.

    Returns:
      The cost of a step of every variant, relative to the first.
    """
    start = _Start(lm, drafter, params, context, 1, steps)
    return _ratios(start, drafter.variants, repeats, clock)


class _Start:
    """Makes the state behind a prompt of zeros, as often as it is used up."""

    def __init__(
        self,
        lm: LanguageModel,
        drafter: Drafter,
        params: Any,
        context: int,
        rows: int,
        steps: int,
    ):
        self.lm, self.rows, self.steps = lm, rows, steps
        self.params = {"target": lm.params, "drafter": params}
        self._drafter, self._context = drafter, context
        # However many tokens a step emits, no row is done before the last one.
        most = steps * (drafter.depth + 1) + 1
        self._shapes = shapes_for([context], most, drafter.depth)

    def __call__(self) -> DecodeState:
        lm, rows, capacity = self.lm, self.rows, self._shapes.capacity
        committed = Committed(
            jnp.zeros((rows, capacity), jnp.int32),
            jnp.full((rows,), self._context, jnp.int32),
            row_keys(np.arange(rows)),
        )
        state = prefill(
            self.params,
            committed,
            lm.model.init_cache(lm.params, rows, capacity),
            jnp.full((rows,), capacity, jnp.int32),
            jnp.zeros((rows,), bool),
            model=lm.model,
            drafter=self._drafter,
            chunk=self._shapes.chunk,
            rope_length=1,
        )
        return jax.block_until_ready(state)


def _ratios(
    start: _Start,
    drafters: Sequence[Drafter],
    repeats: int,
    clock: Callable[[], float],
) -> list[float]:
    """Returns what a step takes with every drafter, relative to the first.

    They take turns, so that a machine that slows down slows all of them; each turn
    gives ratios of its own, and their medians count.
    """
    sampler, no_eos = make_sampler(start.rows), jnp.asarray([-1], jnp.int32)
    ratios: list[list[float]] = [[] for _ in drafters]
    with on_mesh(start.lm):
        for turn in range(repeats + 1):
            seconds = []
            for drafter in drafters:
                state = start()
                begun = clock()
                state = advance(
                    start.params,
                    state,
                    sampler,
                    no_eos,
                    jnp.int32(start.steps),
                    model=start.lm.model,
                    drafter=drafter,
                    rope_length=1,
                )
                jax.block_until_ready(state)
                seconds.append(clock() - begun)
            if turn:  # The first one compiles.
                for found, taken in zip(ratios, seconds, strict=True):
                    found.append(taken / seconds[0])
    return [statistics.median(found) for found in ratios]

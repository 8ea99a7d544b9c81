"""What a step of the target costs at each width, measured.

Letters: B rows, S slots.
"""

import dataclasses
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
from jaxllm.decoding.protocol import Committed
from jaxllm.decoding.sampling import make_sampler
from jaxllm.drafting.autoregressive import Autoregressive

__all__ = ["measure_cost"]


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

    The widths take turns, so that a machine that slows down slows all of them; each
    turn gives ratios of its own, and their medians count.

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
    sampler, no_eos = make_sampler(rows), jnp.asarray([-1], jnp.int32)
    params = {"target": lm.params, "drafter": {}}
    ratios: dict[int, list[float]] = {width: [] for width in widths}
    with on_mesh(lm):
        state = _start(lm, context, rows, steps)
        for turn in range(repeats + 1):
            seconds = {}
            for width in widths:
                state = _rewind(state, context)
                jax.block_until_ready(state)
                begun = clock()
                state = advance(
                    params,
                    state,
                    sampler,
                    no_eos,
                    jnp.int32(steps),
                    model=lm.model,
                    drafter=Autoregressive(query_width=width),
                    rope_length=1,
                )
                jax.block_until_ready(state)
                seconds[width] = clock() - begun
            if turn:  # The first one compiles.
                for width in widths:
                    ratios[width].append(seconds[width] / seconds[1])
    return {width: statistics.median(found) for width, found in ratios.items()}


def _start(lm: LanguageModel, context: int, rows: int, steps: int) -> DecodeState:
    """Returns the state behind a prompt of zeros."""
    shapes = shapes_for([context], steps + 1, 0)
    committed = Committed(
        jnp.zeros((rows, shapes.capacity), jnp.int32),
        jnp.full((rows,), context, jnp.int32),
        row_keys(np.arange(rows)),
    )
    return prefill(
        {"target": lm.params, "drafter": {}},
        committed,
        lm.model.init_cache(lm.params, rows, shapes.capacity),
        jnp.full((rows,), shapes.capacity, jnp.int32),
        jnp.zeros((rows,), bool),
        model=lm.model,
        drafter=Autoregressive(),
        chunk=shapes.chunk,
        rope_length=1,
    )


def _rewind(state: DecodeState, context: int) -> DecodeState:
    """Returns the state with what was decoded forgotten."""
    length_B = jnp.full_like(state.committed.length_B, context)
    cache: Any = state.cache
    return dataclasses.replace(
        state,
        committed=dataclasses.replace(state.committed, length_B=length_B),
        cache=cache.crop(length_B - 1),
        done_B=jnp.zeros_like(state.done_B),
    )

"""Whether two outputs that differ do so at a near tie, which rounding decides.

XLA gives equal numbers for equal shapes, not across shapes, so two exact methods may
choose differently where the best two tokens are as good as equal.

Letters: B rows (one), M nodes (one), T tokens, D width, V vocabulary, P the pair of
tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.core.rng import row_keys
from jaxllm.decoding import Output, Sampler
from jaxllm.decoding.buckets import prompt_bucket
from jaxllm.decoding.job import on_mesh
from jaxllm.decoding.sampling import scored
from jaxllm.evaluation.entrants import Course
from jaxllm.models.freeze import Context, Model

__all__ = ["Difference", "Judge", "first_difference"]

FLOAT32_TIE = 1e-4
"""Gap of two scores below which rounding in float32 may choose either."""

NARROW_TIE = 0.05
"""The same for narrower dtypes, in standard deviations of the logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a row first differs from the baseline's.

    Attributes:
      row: Index of the prompt.
      position: Index among the new tokens.
      expected: Token of the baseline; None where it has ended.
      found: Token of the method; None where it has ended.
      gap: How far the worse of the two is behind the best token, in scores of the
        target (logits after temperature, filters and noise). None where an output has
        ended, or the target would never choose one of them.
      near_tie: Whether rounding may have chosen.
    """

    row: int
    position: int
    expected: int | None
    found: int | None
    gap: float | None
    near_tie: bool


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Returns the first index at which two outputs differ, or None."""
    for index, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return index
    short, long = sorted((len(expected), len(found)))
    return None if short == long else short


class Judge:
    """Compares outputs with those of the baseline."""

    def __init__(self, course: Course, reference: Mapping[int, Output]):
        """Makes a judge.

        Args:
          course: What was run.
          reference: The baseline's output of each row.
        """
        self._course = course
        self._reference = reference
        self._longest = {row: b.longest for b in course.batches for row in b.rows}
        self._judged: dict[tuple[int, ...], Difference] = {}

    def differences(self, outputs: Mapping[int, Output]) -> list[Difference]:
        """Returns where the rows first differ, for those that do."""
        found = []
        for row, output in sorted(outputs.items()):
            expected = self._reference[row].token_ids
            position = first_difference(expected, output.token_ids)
            if position is not None:
                found.append(self._judge(row, position, output.token_ids))
        return found

    def _judge(self, row: int, position: int, ids: Sequence[int]) -> Difference:
        expected_ids = self._reference[row].token_ids
        if position == min(len(expected_ids), len(ids)):
            # Equal tokens end a row alike, so this is no matter of rounding.
            return Difference(
                row=row,
                position=position,
                expected=_token(expected_ids, position),
                found=_token(ids, position),
                gap=None,
                near_tie=False,
            )
        key = (row, position, expected_ids[position], ids[position])
        if key not in self._judged:
            gap, tolerance = self._gap(*key)
            self._judged[key] = Difference(
                row=row,
                position=position,
                expected=expected_ids[position],
                found=ids[position],
                gap=gap if math.isfinite(gap) else None,
                near_tie=gap < tolerance,
            )
        return self._judged[key]

    def _gap(
        self, row: int, position: int, expected: int, found: int
    ) -> tuple[float, float]:
        """Runs the target on what is known; returns the gap and what is a near tie."""
        job, settings = self._course.job, self._course.settings
        lm, longest = job.lm, self._longest[row]
        known = job.prompts[row] + self._reference[row].token_ids[:position]
        # Causal: what stands to the right of a token does not touch it.
        width = prompt_bucket(longest)
        original = lm.config.rope_original_length
        with on_mesh(lm):
            gap, deviation = _measure(
                lm.params,
                jnp.asarray([known + [0] * (width - len(known))], jnp.int32),
                len(known),
                row_keys(np.asarray([job.seeds[row]], np.uint32)),
                settings.sampler(1),
                jnp.asarray([expected, found], jnp.int32),
                model=lm.model,
                rope_length=1 if original is None else max(longest, original),
            )
        if lm.model.policy.compute == jnp.float32:
            return float(gap), FLOAT32_TIE
        return float(gap), NARROW_TIE * float(deviation)


def _token(ids: Sequence[int], position: int) -> int | None:
    return ids[position] if position < len(ids) else None


@functools.partial(jax.jit, static_argnames=("model", "rope_length"))
def _measure(
    params: Any,
    tokens_BT: Array,
    length: Array,
    key_B: Array,
    sampler: Sampler,
    pair_P: Array,
    *,
    model: Model,
    rope_length: int,
) -> tuple[Array, Array]:
    """Returns how far the worse of two tokens is behind the best, and the deviation.

    Args:
      params: Of the target.
      tokens_BT: int32 known tokens, right padded.
      length: int32, how many are known.
      key_B: Typed key of the row.
      sampler: Options of the row.
      pair_P: int32, the two tokens.
      model: The target.
      rope_length: As in `Context`.

    Returns:
      The gap in scores, and the standard deviation of the logits.
    """
    context = Context.start(tokens_BT, rope_length=rope_length)
    x_BTD = model.embed(params, tokens_BT, context.positions_BT)
    x_BTD, _, _ = model.run_layers(params, x_BTD, context)
    x_BMD = jax.lax.dynamic_slice_in_dim(x_BTD, length - 1, 1, axis=1)
    logits_BMV = model.unembed(params, x_BMD)
    position_BM = jnp.full((1, 1), length, jnp.int32)
    scores_V = scored(logits_BMV, position_BM, key_B, sampler)[0, 0]
    return jnp.max(scores_V) - jnp.min(scores_V[pair_P]), jnp.std(logits_BMV)

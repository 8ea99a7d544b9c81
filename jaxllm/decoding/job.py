"""The rows of one call: checked, batched by bucket, decoded, turned into results."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxllm.checkpoints import LanguageModel
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.decoding.bound import BoundDrafter
from jaxllm.decoding.buckets import batches_of, prompt_bucket
from jaxllm.decoding.decode import (
    STEPS_PER_CALL,
    Output,
    Request,
    Snapshot,
    decode_chunks,
    drain,
)
from jaxllm.decoding.payoff import acceptance_by_depth
from jaxllm.decoding.sharing import plan_sharing
from jaxllm.decoding.stopping import StopText

__all__ = ["BATCH", "SHARING", "Job", "Prompt", "Result", "column", "encode", "on_mesh"]

Prompt = str | Sequence[int]

BATCH = 32
"""Most rows that are decoded together."""

SHARING = ("auto", "off")
"""Whether what prompts have in common is run and kept once."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one prompt gave.

    Attributes:
      text: The new text, without end tokens, cut where a stop string begins. Empty for
        a model without a tokenizer.
      token_ids: The new tokens only, the end token included.
      finish_reason: `"eos"`, `"stop"` or `"length"`.
      logprobs: Log-probability of each new token under the model, before temperature
        and filters.
      stats: Counts: `target_passes`, `emitted`, `drafted`, `shared_tokens` (of the
        prompt, run and kept once for several rows), by depth `accepted` and
        `tested`, by level of inner models `draft_passes` and `draft_tokens`;
        `tokens_per_pass`; `acceptance_by_depth`; `seconds` of its batch.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]
    stats: dict[str, Any]


def on_mesh(lm: LanguageModel) -> contextlib.AbstractContextManager:
    """Returns the context in which a model's functions run."""
    return contextlib.nullcontext() if lm.mesh is None else jax.set_mesh(lm.mesh)


def encode(lm: LanguageModel, prompt: Prompt, row: int = 0) -> list[int]:
    """Returns a prompt's ids; an empty text becomes the start token.

    Raises:
      UserError: The prompt is text and the model has no tokenizer, or it is empty and
        the tokenizer has no start token.
    """
    if not isinstance(prompt, str):
        return [int(i) for i in prompt]
    if lm.tokenizer is None:
        raise UserError(
            f"cannot encode: prompt {row} is text, expected token ids: "
            f"{lm.name} has no tokenizer. Pass lists of ids."
        )
    ids = lm.tokenizer.encode(prompt)
    if not ids and lm.tokenizer.bos_id is not None:
        ids = [lm.tokenizer.bos_id]
    return ids


def column(value: Any, rows: int, name: str) -> list[Any]:
    """Returns an option for every row, from one value or from one for each.

    Raises:
      ConfigError: There are several values, but not one for each row.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != rows:
            raise ConfigError(
                f"cannot generate: {name} has {len(value)} values, expected {rows}, "
                f"one for each prompt. Give one value, or one for each."
            )
        return list(value)
    return [value] * rows


@dataclasses.dataclass(frozen=True)
class Job:
    """The checked rows of one call."""

    lm: LanguageModel
    prompts: list[list[int]]
    max_new_tokens: list[int]
    stop: tuple[str, ...]
    seeds: list[int]
    shared_prefix: str = "auto"

    @classmethod
    def make(
        cls,
        lm: LanguageModel,
        prompts: Any,
        max_new_tokens: Any,
        stop: Any,
        seed: Any,
        shared_prefix: str = "auto",
    ) -> "Job":
        """Checks and encodes the rows; arguments as for `jaxllm.generate`."""
        if isinstance(prompts, str):
            raise UserError(
                "cannot generate: prompts is one string, expected a list of prompts. "
                "Write [prompt]."
            )
        rows = len(prompts)
        seeds = (
            column(seed, rows, "seed")
            if isinstance(seed, Sequence)
            else [seed + i for i in range(rows)]
        )
        for value in seeds:
            if not 0 <= value < 2**32:
                raise ConfigError(
                    f"cannot sample: seed is {value}, expected an integer from 0 to "
                    f"{2**32 - 1}. Choose another."
                )
        given = (stop,) if isinstance(stop, str) else tuple(stop)
        stop = (*given, *lm.generation.stop_strings)
        if stop and lm.tokenizer is None:
            raise UserError(
                f"cannot stop at strings: {lm.name} has no tokenizer, expected one. "
                f"Leave out stop."
            )
        if shared_prefix not in SHARING:
            raise ConfigError(
                f"cannot generate: shared_prefix is {shared_prefix!r}, expected one of "
                f"{', '.join(SHARING)}. Correct it."
            )
        ids = [encode(lm, p, row) for row, p in enumerate(prompts)]
        new = column(max_new_tokens, rows, "max_new_tokens")
        return cls(lm, ids, new, stop, seeds, shared_prefix)

    def batches(self) -> list[list[int]]:
        """Returns batches of rows that share a bucket, so that they share compiles.

        Where prefixes are shared, prompts that begin alike come together.
        """
        order = list(range(len(self.prompts)))
        if self.shared_prefix != "off":
            order.sort(key=lambda row: self.prompts[row])
        keys = [
            (prompt_bucket(max(1, len(self.prompts[row]))), self.max_new_tokens[row])
            for row in order
        ]
        return [[order[i] for i in batch] for batch in batches_of(keys, BATCH)]

    def request(
        self, batch: list[int], sampler: Any, steps: int = STEPS_PER_CALL
    ) -> Request:
        """Returns the request of some of the rows."""
        prompts = [self.prompts[row] for row in batch]
        return Request(
            prompts=prompts,
            max_new_tokens=[self.max_new_tokens[row] for row in batch],
            sampler=sampler,
            seeds=[self.seeds[row] for row in batch],
            eos=tuple(self.lm.generation.eos_ids),
            steps_per_call=steps,
            shared=() if self.shared_prefix == "off" else plan_sharing(prompts),
        )

    def run(
        self,
        bound: BoundDrafter,
        batch: list[int],
        sampler: Any,
        constraint: Any = None,
    ) -> tuple[list[Output], list[StopText | None]]:
        """Decodes some of the rows; a row has a reader when it may stop at strings."""
        lm = self.lm
        readers = [
            StopText(lm.tokenizer, self.stop) if lm.tokenizer and self.stop else None
            for _ in batch
        ]

        def watch(snapshot: Snapshot) -> list[bool]:
            for reader, ids in zip(readers, snapshot.token_ids, strict=True):
                if reader is not None:
                    reader.step(ids[reader.tokens :])
            return [reader is not None and reader.stopped for reader in readers]

        with on_mesh(lm):
            chunks = decode_chunks(
                lm.model,
                bound.arguments(constraint),
                self.request(batch, sampler),
                drafter=bound.drafter,
                watch=watch if self.stop else None,
            )
            done = drain(chunks)
        bound.params = done.drafter
        return done.outputs, readers

    def result(self, output: Output, reader: StopText | None, seconds: float) -> Result:
        """Turns a row's output into a result, cut where its reader stopped."""
        ids, logprobs = output.token_ids, output.logprobs
        reason = "eos" if output.ended else "length"
        tokenizer = self.lm.tokenizer
        if reader is not None:
            reader.finish()
            if reader.stopped:
                reason = "stop"
                ids, logprobs = ids[: reader.tokens], logprobs[: reader.tokens]
        text = ""
        if tokenizer is not None and reader is not None:
            fresh = StopText(tokenizer, self.stop)
            text = fresh.step(ids) + fresh.finish()
        elif tokenizer is not None:
            text = tokenizer.decode(ids)
        return Result(text, ids, reason, logprobs, _summary(output.stats, seconds))


def _summary(stats: dict[str, Any], seconds: float) -> dict[str, Any]:
    passes = stats["target_passes"]
    return {
        **stats,
        "tokens_per_pass": stats["emitted"] / passes if passes else 0.0,
        "acceptance_by_depth": acceptance_by_depth(stats["accepted"], stats["tested"]),
        "seconds": seconds,
    }

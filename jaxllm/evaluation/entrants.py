"""Who takes part in a comparison, and the course that each of them runs."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxllm.checkpoints import LanguageModel
from jaxllm.core.errors import ConfigError
from jaxllm.decoding import BoundDrafter, Drafter, Output, Sampler, make_sampler
from jaxllm.decoding.buckets import batches_of, prompt_bucket, shapes_for
from jaxllm.decoding.decode import check
from jaxllm.decoding.job import Job, on_mesh
from jaxllm.decoding.verify import check_verifier
from jaxllm.drafting import Autoregressive, make_drafter
from jaxllm.evaluation.programs import largest_program, programs
from jaxllm.evaluation.prompts import PromptRow

__all__ = ["Batch", "Course", "Entrant", "Settings", "build_methods"]

WARM_UP_RUNS = 2
"""Of every shape."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for every method.

    Attributes:
      runs: Timed rounds; every method runs all prompts once in each.
      max_new_tokens: Of every prompt.
      batch: Most prompts that are decoded together.
      temperature: 0 is greedy; this and the next five are as for `jaxllm.generate`.
      top_k: See there.
      top_p: See there.
      min_p: See there.
      seed: Prompt i draws with `seed + i`.
      verify: See there.
    """

    runs: int = 5
    max_new_tokens: int = 64
    batch: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    verify: str = "match"

    def __post_init__(self) -> None:
        for name in ("runs", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"cannot compare: {name} is {getattr(self, name)}, expected 1 or "
                    f"more. Correct --{name}."
                )
        self.sampler(1)

    def sampler(self, rows: int) -> Sampler:
        """Returns the sampler of a batch; raises `ConfigError` for a wrong option."""
        return make_sampler(
            rows,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            verify=self.verify,
        )

    @property
    def exact(self) -> bool:
        """Whether a lossless method has to give the very tokens of the baseline."""
        return not (self.verify == "reject" and self.temperature > 0)


def build_methods(methods: Iterable[str]) -> dict[str, Drafter]:
    """Makes the drafters that method strings name, the baseline first.

    Args:
      methods: Strings such as `"jacobi:window=8"`. Where none of them is plain
        decoding, that is put before them.

    Returns:
      The drafters, not bound yet, by the strings that name them.

    Raises:
      ConfigError: A method is unknown, its options do not fit, or it is there twice.
    """
    found: dict[str, Drafter] = {}
    for text in methods:
        if text in found:
            raise ConfigError(
                f"cannot compare: {text!r}: is there twice, expected once. Leave one "
                f"out."
            )
        found[text] = make_drafter(text)
    if any(isinstance(drafter, Autoregressive) for drafter in found.values()):
        return found
    return {"autoregressive": Autoregressive(), **found}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together.

    Attributes:
      rows: Their indices.
      category: They share it, so that its time can be told.
      longest: Tokens of the longest, new ones included.
    """

    rows: tuple[int, ...]
    category: str
    longest: int


@dataclasses.dataclass(frozen=True)
class Course:
    """All prompts in batches, the same for every entrant.

    Strings that end a text are left out of account: they are found between dispatches,
    so they would end the methods' texts after different numbers of passes.

    Attributes:
      job: The encoded prompts.
      settings: What holds for every method.
      batches: In the order in which they run.
    """

    job: Job
    settings: Settings
    batches: tuple[Batch, ...]

    @classmethod
    def make(
        cls, lm: LanguageModel, rows: Sequence[PromptRow], settings: Settings
    ) -> "Course":
        """Encodes, checks and batches the prompts.

        Raises:
          UserError: A prompt is empty or too long, or is text for a model without a
            tokenizer.
        """
        new = settings.max_new_tokens
        job = Job.make(lm, [row.prompt for row in rows], new, (), settings.seed, "off")
        job = dataclasses.replace(job, stop=())
        everything = list(range(len(rows)))
        check(lm.model, job.request(everything, settings.sampler(len(rows))))
        keys = [
            (row.category, prompt_bucket(len(prompt)))
            for row, prompt in zip(rows, job.prompts, strict=True)
        ]
        batches = []
        for part in batches_of(keys, settings.batch):
            longest = max(len(job.prompts[i]) for i in part) + new
            batches.append(Batch(tuple(part), rows[part[0]].category, longest))
        return cls(job, settings, tuple(sorted(batches, key=lambda b: b.rows)))

    def shapes(self, drafter: Drafter) -> dict[Any, Batch]:
        """Returns a batch for every set of programs that the drafter needs."""
        new = self.settings.max_new_tokens
        original = self.job.lm.config.rope_original_length
        found: dict[Any, Batch] = {}
        for batch in self.batches:
            lengths = [len(self.job.prompts[row]) for row in batch.rows]
            # Rotations that depend on a text's length are compiled for that length.
            long = original is not None and batch.longest > original
            shapes = shapes_for(lengths, new, drafter.depth)
            found.setdefault((shapes, batch.longest if long else 0), batch)
        return found

    def run(self, entrant: "Entrant", batch: Batch) -> tuple[dict[int, Output], float]:
        """Decodes a batch.

        Returns:
          The output of each row, and the seconds from prompts to tokens.
        """
        rows = list(batch.rows)
        sampler = jax.block_until_ready(self.settings.sampler(len(rows)))
        begun = time.perf_counter()
        outputs, _ = self.job.run(entrant.bound, rows, sampler)
        jax.block_until_ready(entrant.bound.params)
        seconds = time.perf_counter() - begun
        return dict(zip(rows, outputs, strict=True)), seconds


class Entrant:
    """A method bound to the model, which can begin anew.

    Attributes:
      name: As it was named.
      bound: What decodes.
      peak_bytes: Memory of its largest program on one device; None before the warm-up,
        and where it is unknown.
    """

    def __init__(self, lm: LanguageModel, name: str, drafter: Drafter):
        """Binds the drafter."""
        self.name = name
        with on_mesh(lm):
            self.bound = BoundDrafter(lm, drafter)
        self._memory = self.bound.params
        self.peak_bytes: int | None = None

    def restore(self) -> None:
        """Forgets what was learned since the drafter was bound."""
        self.bound.params = self._memory

    def check(self, course: Course) -> None:
        """Raises `ConfigError` when the drafter cannot be verified as asked."""
        check_verifier(self.bound.drafter, course.settings.sampler(1))

    def warm_up(self, course: Course) -> Iterator[tuple[Batch, dict[int, Output]]]:
        """Compiles all programs by running a batch of every shape, twice.

        What was learned may be laid out otherwise than what was bound, so only the
        second run is sure to be like those that follow.

        Yields:
          What has run, and the outputs of its rows.
        """
        before = programs(self.bound.lm)
        for batch in course.shapes(self.bound.drafter).values():
            for _ in range(WARM_UP_RUNS):
                yield batch, course.run(self, batch)[0]
        self.peak_bytes = largest_program(self.bound.lm, before)
        self.restore()

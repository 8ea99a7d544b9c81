"""Methods side by side: the same prompts, the same model, in turns.

Every method runs all prompts once a round, and every round another method begins, so
that whatever else the machine does meets all of them. Tokens and passes are exact and
equal in every round; speed-ups are medians of the ratios within a round.
"""

import dataclasses
import importlib.metadata
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from jaxllm.checkpoints import LanguageModel
from jaxllm.core.errors import ConfigError
from jaxllm.decoding import Drafter, Output
from jaxllm.decoding.payoff import acceptance_by_depth
from jaxllm.evaluation.divergence import Difference, Judge
from jaxllm.evaluation.entrants import WARM_UP_RUNS, Course, Entrant, Settings
from jaxllm.evaluation.prompts import PromptSet
from jaxllm.version import __version__

__all__ = [
    "DEFAULT_METHODS",
    "DEMO_METHODS",
    "Comparison",
    "Cost",
    "Figures",
    "MethodResult",
    "Step",
    "Turn",
    "Watcher",
    "compare",
]

DEFAULT_METHODS = ("autoregressive", "prompt_lookup", "jacobi:window=8", "trigram")
"""What is compared when nothing is named; the first is the baseline."""

DEMO_METHODS = (
    "autoregressive",
    "prompt_lookup",
    "trigram:table=demo-ngrams",
    "model:model=demo-draft",
    "tree:model=demo-draft",
    "heads:heads=demo-heads",
    "jacobi:window=8",
)
"""The same for the shipped model, for which drafts ship too."""

WARM_UP = 0
"""Number of the round in which every method compiles; it is not timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a comparison will take.

    Attributes:
      parameter_bytes: Of the target and of all drafters.
      methods: How many are compared.
      prompts: How many each of them continues.
      shapes: Sets of programs to compile, over all methods.
      rows: Texts to write, over all methods and runs, the warm-up included.
      passes: Passes of the target at most.
    """

    parameter_bytes: int
    methods: int
    prompts: int
    shapes: int
    rows: int
    passes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A batch that has been decoded.

    Attributes:
      method: By whom.
      round: Counts from 1; 0 in the warm-up.
      rows: Which prompts.
      tokens: New tokens of all of them.
    """

    method: str
    round: int
    rows: tuple[int, ...]
    tokens: int


class Watcher(Protocol):
    """Is told how far a comparison is."""

    def begin(self, cost: Cost) -> None:
        """Is called once, before anything is compiled."""

    def step(self, step: Step) -> None:
        """Is called after every batch, while no clock runs."""


class _Nobody(Watcher):
    """Watches nothing."""

    def begin(self, cost: Cost) -> None:
        return None

    def step(self, step: Step) -> None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One run of a method over all prompts.

    Attributes:
      outputs: Of every row.
      seconds: Of every category.
    """

    outputs: Mapping[int, Output]
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What a method achieved on some of the prompts.

    Attributes:
      tokens: New tokens of one run.
      target_passes: Passes of the target in one run, prefill left out. A pass counts
        once for every row that took part in it.
      tokens_per_pass: Their ratio.
      seconds: Of each run, prefill included.
      tokens_per_second: Median over the runs.
      speedup: Median over the rounds of tokens/s over those of the baseline.
      spread: The lowest and the highest of these ratios.
      speedups: All of them.
    """

    tokens: int
    target_passes: int
    tokens_per_pass: float
    seconds: list[float]
    tokens_per_second: float
    speedup: float
    spread: list[float]
    speedups: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What came of one method.

    Attributes:
      name: The method string.
      lossless: Whether its tokens are the baseline's; None where only distributions
        are equal, under `verify="reject"` at a temperature.
      first_divergence: Of the first row that differs at no near tie.
      divergences: How many rows do.
      near_ties: How many rows differ at a near tie.
      overall: Over all prompts.
      by_category: Over the prompts of each category.
      draft_passes: Forwards of inner models in one run, by level.
      draft_tokens: Tokens that these ran.
      acceptance_by_depth: How often a proposal was accepted at each depth where one was
        tested.
      peak_bytes: Memory of its largest program on one device, by the compiler's
        account; None where that is unknown, or where this process had compiled the
        programs before.
    """

    name: str
    lossless: bool | None
    first_divergence: Difference | None
    divergences: int
    near_ties: int
    overall: Figures
    by_category: Mapping[str, Figures]
    draft_passes: Mapping[str, int]
    draft_tokens: Mapping[str, int]
    acceptance_by_depth: Sequence[float]
    peak_bytes: int | None

    def to_json(self, ids: Sequence[str | int]) -> dict[str, Any]:
        """Returns the method's part of `results.json`; `ids` are the prompts'."""
        divergence = None
        if self.first_divergence is not None:
            divergence = dataclasses.asdict(self.first_divergence)
            divergence.pop("near_tie")
            divergence["id"] = ids[self.first_divergence.row]
        return {
            "name": self.name,
            "lossless": self.lossless,
            "first_divergence": divergence,
            "divergences": self.divergences,
            "near_ties": self.near_ties,
            **dataclasses.asdict(self.overall),
            "draft_passes": dict(self.draft_passes),
            "draft_tokens": dict(self.draft_tokens),
            "acceptance_by_depth": list(self.acceptance_by_depth),
            "peak_bytes": self.peak_bytes,
            "by_category": {
                name: dataclasses.asdict(figures)
                for name, figures in self.by_category.items()
            },
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of all methods.

    Attributes:
      lm: The model.
      prompts: What was continued.
      settings: What held for every method.
      methods: In the order given; the first is the baseline.
    """

    lm: LanguageModel
    prompts: PromptSet
    settings: Settings
    methods: Sequence[MethodResult]

    @property
    def lossless(self) -> bool:
        """Whether no method was found not to be."""
        return all(method.lossless is not False for method in self.methods)

    @property
    def device(self) -> str:
        """What the model ran on, such as `"cpu"` or `"NVIDIA H200 x4"`."""
        mesh = self.lm.mesh
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        count = f" x{len(devices)}" if len(devices) > 1 else ""
        return f"{devices[0].device_kind}{count}"

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        return str(self.lm.model.policy.compute)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `results.json`."""
        versions = {"jaxllm": __version__}
        versions |= {
            n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax")
        }
        ids = [row.id for row in self.prompts.rows]
        return {
            "format": 1,
            "model": self.lm.name,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.settings.seed,
            "versions": versions,
            "prompts": self.prompts.described(),
            "config": dataclasses.asdict(self.settings),
            "methods": [method.to_json(ids) for method in self.methods],
        }


def compare(
    lm: LanguageModel,
    methods: Mapping[str, Drafter],
    prompts: PromptSet,
    settings: Settings | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Runs methods in turns on the same prompts, and checks that they are lossless.

    Args:
      lm: The model.
      methods: Drafters by name, as `build_methods` makes them; the first is the
        baseline.
      prompts: What every method continues.
      settings: What holds for all of them; the defaults when None.
      watcher: Is told how far it is.

    Returns:
      Tokens, passes and times of every method.

    Raises:
      UserError: A method or a prompt does not fit the model. Nothing has been decoded.
    """
    for what, given in (("method", methods), ("prompt", prompts.rows)):
        if not given:
            raise ConfigError(
                f"cannot compare: no {what} is given, expected at least one. Give one."
            )
    settings = Settings() if settings is None else settings
    watcher = _Nobody() if watcher is None else watcher
    course = Course.make(lm, prompts.rows, settings)
    field = [Entrant(lm, name, drafter) for name, drafter in methods.items()]
    for entrant in field:
        entrant.check(course)
    watcher.begin(_cost(field, course))
    for entrant in field:
        for batch, outputs in entrant.warm_up(course):
            watcher.step(_step(entrant, WARM_UP, batch.rows, outputs))
    turns: dict[str, list[Turn]] = {entrant.name: [] for entrant in field}
    for index in range(settings.runs):
        # Everyone begins a round once, so that no one always follows the same one.
        shift = index % len(field)
        for entrant in field[shift:] + field[:shift]:
            turn = _turn(entrant, course, index + 1, watcher)
            turns[entrant.name].append(turn)
    baseline = turns[field[0].name]
    judge = Judge(course, baseline[0].outputs)
    results = [_result(e, course, turns[e.name], baseline, judge) for e in field]
    return Comparison(lm=lm, prompts=prompts, settings=settings, methods=results)


def _cost(field: Sequence[Entrant], course: Course) -> Cost:
    lm, settings = course.job.lm, course.settings
    trees = [lm.params, *(entrant.bound.params for entrant in field)]
    # By identity, because a drafter may use arrays of the target.
    arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(trees)}
    shapes = [course.shapes(entrant.bound.drafter) for entrant in field]
    warm_up = [batch for found in shapes for batch in found.values()]
    batches = WARM_UP_RUNS * warm_up
    batches += settings.runs * len(field) * list(course.batches)
    return Cost(
        parameter_bytes=sum(arrays.values()),
        methods=len(field),
        prompts=len(course.job.prompts),
        shapes=len(warm_up),
        rows=sum(len(batch.rows) for batch in batches),
        passes=len(batches) * settings.max_new_tokens,
    )


def _step(
    entrant: Entrant, number: int, rows: tuple[int, ...], outputs: Mapping[int, Output]
) -> Step:
    tokens = sum(len(output.token_ids) for output in outputs.values())
    return Step(method=entrant.name, round=number, rows=rows, tokens=tokens)


def _turn(entrant: Entrant, course: Course, number: int, watcher: Watcher) -> Turn:
    entrant.restore()
    outputs: dict[int, Output] = {}
    seconds: dict[str, float] = {}
    for batch in course.batches:
        found, spent = course.run(entrant, batch)
        outputs |= found
        seconds[batch.category] = seconds.get(batch.category, 0.0) + spent
        watcher.step(_step(entrant, number, batch.rows, found))
    return Turn(outputs=outputs, seconds=seconds)


def _result(
    entrant: Entrant,
    course: Course,
    turns: Sequence[Turn],
    baseline: Sequence[Turn],
    judge: Judge,
) -> MethodResult:
    """Puts together what a method did; counts are those of its first run."""
    rows_of: dict[str, list[int]] = {}
    for batch in course.batches:
        rows_of.setdefault(batch.category, []).extend(batch.rows)
    by_category = {
        category: _figures(turns, baseline, rows, (category,))
        for category, rows in rows_of.items()
    }
    every_row = sorted(row for rows in rows_of.values() for row in rows)
    stats = [turns[0].outputs[row].stats for row in every_row]
    wrong: dict[int, Difference] = {}
    near: set[int] = set()
    if course.settings.exact:
        for turn in turns:
            for difference in judge.differences(turn.outputs):
                if difference.near_tie:
                    near.add(difference.row)
                else:
                    wrong.setdefault(difference.row, difference)
    return MethodResult(
        name=entrant.name,
        lossless=not wrong if course.settings.exact else None,
        first_divergence=wrong[min(wrong)] if wrong else None,
        divergences=len(wrong),
        near_ties=len(near - set(wrong)),
        overall=_figures(turns, baseline, every_row, tuple(rows_of)),
        by_category=by_category,
        draft_passes=_by_level([s["draft_passes"] for s in stats]),
        draft_tokens=_by_level([s["draft_tokens"] for s in stats]),
        acceptance_by_depth=acceptance_by_depth(
            _added([s["accepted"] for s in stats]), _added([s["tested"] for s in stats])
        ),
        peak_bytes=entrant.peak_bytes,
    )


def _figures(
    turns: Sequence[Turn],
    baseline: Sequence[Turn],
    rows: Sequence[int],
    categories: Sequence[str],
) -> Figures:
    def seconds(turn: Turn) -> float:
        return sum(turn.seconds[category] for category in categories)

    def count(turn: Turn, name: str) -> int:
        return sum(turn.outputs[row].stats[name] for row in rows)

    def rate(turn: Turn) -> float:
        return count(turn, "emitted") / seconds(turn)

    tokens = count(turns[0], "emitted")
    passes = count(turns[0], "target_passes")
    ratios = [rate(a) / rate(b) for a, b in zip(turns, baseline, strict=True)]
    return Figures(
        tokens=tokens,
        target_passes=passes,
        tokens_per_pass=tokens / passes,
        seconds=[seconds(turn) for turn in turns],
        tokens_per_second=statistics.median(map(rate, turns)),
        speedup=statistics.median(ratios),
        spread=[min(ratios), max(ratios)],
        speedups=ratios,
    )


def _by_level(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    levels = dict.fromkeys(level for count in counts for level in count)
    return {level: sum(count.get(level, 0) for count in counts) for level in levels}


def _added(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(at) for at in zip(*counts, strict=True)]

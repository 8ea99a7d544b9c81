"""How many bytes a decode program takes, and the most speed that fits into a budget.

The state is counted exactly, from its shapes. What one step needs beside it is a
formula, calibrated on programs of XLA:CPU (jax 0.10.2, one layer a stack, which is the
default there); `compiled_bytes` asks the compiler itself.

Letters: B rows, S slots, M draft nodes, J path length, V vocabulary, D width, F ffn,
L layers, N query heads, K kv heads, H head dim.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.errors import CapacityError, ConfigError
from jaxllm.core.rng import row_keys
from jaxllm.decoding.buckets import rungs_between, shapes_for
from jaxllm.decoding.engine import DecodeState, advance, prefill
from jaxllm.decoding.payoff import speedup
from jaxllm.decoding.protocol import Committed, Drafter
from jaxllm.decoding.sampling import Sampler, make_sampler
from jaxllm.models.freeze import Model

__all__ = [
    "Choice",
    "Plan",
    "Program",
    "Workload",
    "compiled_bytes",
    "footprint",
    "generation_bytes",
    "plan_memory",
]

WEIGHTS = ("weights", "draft_weights")
"""The parts of a footprint that are not generation memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """One compiled decode loop; arrays may be given as shapes.

    Attributes:
      model: The target.
      target: Its parameters.
      drafter: Bound drafter.
      drafter_params: Its parameters.
      rows: B.
      capacity: S.
      sampler: Options of the rows; greedy when None.
    """

    model: Model
    target: Any
    drafter: Drafter
    drafter_params: Any = dataclasses.field(default_factory=dict)
    rows: int = 1
    capacity: int = 256
    sampler: Sampler | None = None

    @property
    def params(self) -> dict[str, Any]:
        """What the engine takes, as shapes."""
        return _shapes({"target": self.target, "drafter": self.drafter_params})

    @property
    def choice(self) -> Sampler:
        """The sampler, as shapes."""
        if self.sampler is not None:
            return _shapes(self.sampler)
        return jax.eval_shape(lambda: make_sampler(self.rows))

    def state(self) -> DecodeState:
        """Returns the loop's state, as shapes."""
        rows, slots = self.rows, self.capacity

        def make(params: Any, sampler: Sampler) -> DecodeState:
            one_B = jnp.ones((rows,), jnp.int32)
            committed = Committed(
                jnp.zeros((rows, slots), jnp.int32),
                one_B,
                row_keys(jnp.arange(rows)),
                sampler,
                one_B,
            )
            return prefill(
                params,
                committed,
                self.model.init_cache(params["target"], rows, slots),
                one_B,
                jnp.zeros((rows,), bool),
                model=self.model,
                drafter=self.drafter,
                chunk=min(16, slots),
                rope_length=1,
            )

        return jax.eval_shape(make, self.params, self.choice)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def footprint(program: Program) -> dict[str, int]:
    """Predicts the bytes of a decode program at the peak of a step.

    Args:
      program: The program; the state is donated to it, so it counts once.

    Returns:
      Bytes by part; their sum is the prediction. `weights`, `draft_weights`; `cache`
      of the target; `draft_state`, a drafting model's cache included; `tokens`, with
      keys, counts and options; and what the step holds at its peak: `new_kv`,
      `hidden`, `logits` (with noise and copies), `scores` (of attention), `mlp`,
      `masks`, `copies` (of narrow arrays that the CPU widens). Of logits, scores and
      mlp only one is alive at the peak; the others are 0.

    Source: SpecMemo (arXiv 2506.01986), which models the footprint by parts.

    Differs from the paper: the parts are those of one XLA program, our wiring.
    """
    params, state = program.params, program.state()
    whole, sampler = _nbytes(state), _nbytes(program.choice)
    cache, draft_state = _nbytes(state.cache), _nbytes(state.drafter)
    return {
        "weights": _nbytes(params["target"]),
        "draft_weights": _nbytes(params["drafter"]),
        "cache": cache,
        "draft_state": draft_state,
        "tokens": whole - cache - draft_state + sampler,
        **_step(program, cache),
    }


def generation_bytes(parts: Mapping[str, int]) -> int:
    """Returns the bytes of a footprint that are not weights."""
    return sum(n for name, n in parts.items() if name not in WEIGHTS)


def _step(program: Program, cache_bytes: int) -> dict[str, int]:
    """Returns what is alive at the peak of a step beside the state."""
    config, policy = program.model.config, program.model.policy
    B, S, M = program.rows, program.capacity, program.drafter.nodes
    heads, depth = config.attention, program.drafter.depth
    tokens, width = B * M, jnp.dtype(policy.compute).itemsize
    layer_kv = 2 * tokens * heads.num_kv_heads * heads.head_dim * width
    # Of a draft that is one path of one node, only that node is kept of a layer.
    kept = 1.0 if depth else 1 / M
    new_kv = int(layer_kv * (1 + (config.num_layers - 1) * kept))
    hidden = tokens * config.width * width
    queries = 2 * tokens * heads.num_heads * heads.head_dim * 4
    phases = {
        "scores": 3 * tokens * heads.num_heads * S * 4 + queries,
        "logits": int(_logit_copies(program.choice) * tokens * config.vocabulary * 4),
        "mlp": 3 * tokens * config.mlp.hidden * 4,
    }
    peak = max(phases, key=phases.__getitem__)
    copies = 0
    if jax.default_backend() == "cpu":
        narrow = jnp.dtype(policy.params).itemsize
        if narrow < 4:
            # A tied table is widened for the head; a head of its own is turned over.
            each = 4 if config.tied_head else narrow
            copies += config.vocabulary * config.width * each
        if jnp.dtype(policy.cache).itemsize < 4:
            copies += 2 * cache_bytes
    return {
        "new_kv": new_kv,
        "hidden": hidden,
        **{name: n if name == peak else 0 for name, n in phases.items()},
        "masks": tokens * M * 5 if program.drafter.tree else 0,
        "copies": copies,
    }


def _logit_copies(sampler: Sampler) -> float:
    """Returns how many arrays of logits are alive where there are most."""
    # With penalties the bare logits stay, for log-probabilities.
    bare = 1.0 if sampler.penalized else 0.0
    if sampler.greedy:
        # The logits, and what the search for the largest compares and numbers.
        return 3.0 + bare
    # Warped logits, noise and the bits that it is made of; a sort needs more.
    return (7.2 if sampler.filtered else 4.0) + bare


def compiled_bytes(program: Program) -> int:
    """Compiles the program for this machine and returns the bytes that it takes.

    Arguments, outputs and temporaries, what is donated counted once.
    """
    program_shapes = program.params, program.state(), program.choice
    lowered = advance.lower(
        *program_shapes,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        model=program.model,
        drafter=program.drafter,
        rope_length=1,
    )
    memory: Any = lowered.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """What is to be decoded together.

    Attributes:
      model: The target.
      target: Its parameters, or their shapes.
      prompt_lengths: Tokens of each prompt.
      max_new_tokens: Most tokens of a row.
      sampler: As in `Program`, of as many rows as are run (a power of two).
    """

    model: Model
    target: Any
    prompt_lengths: Sequence[int]
    max_new_tokens: int
    sampler: Sampler | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A drafter that may be run, usually one shape at one number of nodes.

    Attributes:
      drafter: Bound drafter.
      params: Its parameters, or their shapes.
      tokens: Expected tokens of a pass: `payoff.expected_tokens` over the nodes kept
        in best-first order, or measured.
      draft_cost: Cost of a proposal, in passes of plain decoding.
    """

    drafter: Drafter
    tokens: float
    params: Any = dataclasses.field(default_factory=dict)
    draft_cost: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What to run.

    Attributes:
      choice: The drafter.
      rungs: Capacities to go through; `Request.rungs` takes them.
      peak_bytes: Predicted at the last rung and while growing to it.
      first_bytes: Predicted at the first rung, where short answers end.
      weight_bytes: Of target and drafter, part of both.
      speedup: Predicted, against plain decoding.
    """

    choice: Choice
    rungs: tuple[int, ...]
    peak_bytes: int
    first_bytes: int
    weight_bytes: int
    speedup: float


def plan_memory(
    workload: Workload,
    choices: Sequence[Choice],
    budget_bytes: int,
    *,
    costs: Mapping[int, float],
    ladder: bool = True,
) -> Plan:
    """Returns the fastest way of decoding that fits.

    Two levers: the drafter (its width above all), and slots that grow with the text.

    Args:
      workload: What is to be decoded.
      choices: Drafters to choose from.
      budget_bytes: For everything, weights included.
      costs: Cost of a target pass by its number of nodes, as `payoff` takes it.
      ladder: Whether slots may grow rung by rung. That takes least while answers are
        short, and at the last rung the copy of one array more.

    Returns:
      Of the fitting choices the one of highest predicted speed; of equals the
      smallest.

    Raises:
      CapacityError: Nothing fits; the message says what the smallest needs.

    Source: SpecMemo (arXiv 2506.01986); the levers and their order are our wiring.
    """
    if not choices:
        raise ConfigError(
            "cannot plan memory: there are no choices, expected one or more. Give "
            "at least plain decoding."
        )
    plans = [
        found
        for choice in choices
        for found in _plans(workload, choice, costs=costs, ladder=ladder)
    ]
    fitting = [plan for plan in plans if plan.peak_bytes <= budget_bytes]
    if not fitting:
        least = min(plan.peak_bytes for plan in plans)
        raise CapacityError(
            f"cannot plan memory: the budget is {budget_bytes} bytes, expected at "
            f"least {least}. Raise it, or lower the batch or max_new_tokens."
        )
    return max(fitting, key=lambda p: (p.speedup, len(p.rungs) > 1, -p.peak_bytes))


def _plans(
    workload: Workload, choice: Choice, *, costs: Mapping[int, float], ladder: bool
) -> list[Plan]:
    """Returns a choice with and without growing slots."""
    drafter, lengths = choice.drafter, list(workload.prompt_lengths)
    whole = shapes_for(lengths, workload.max_new_tokens, drafter.depth)
    least = shapes_for(lengths, 1, 2 * drafter.depth).capacity
    ladders: list[tuple[int, ...]] = [(whole.capacity,)]
    if ladder and least < whole.capacity:
        ladders.append(rungs_between(least, whole.capacity))
    gain = speedup(
        choice.tokens,
        nodes=drafter.nodes,
        costs=costs,
        drafted=1 if drafter.nodes > 1 else 0,
        draft_cost=choice.draft_cost,
    )
    found = []
    for rungs in ladders:
        programs = [
            Program(
                model=workload.model,
                target=workload.target,
                drafter=drafter,
                drafter_params=choice.params,
                rows=whole.rows,
                capacity=capacity,
                sampler=workload.sampler,
            )
            for capacity in (rungs[0], *rungs[-2:])
        ]
        first, before, last = programs[0], programs[-2], programs[-1]
        parts = footprint(last)
        weights = sum(parts[name] for name in WEIGHTS)
        peak = sum(parts.values())
        if len(rungs) > 1:
            # Arrays grow one after another: each old one lives until it is copied.
            largest = max(_nbytes(x) for x in jax.tree.leaves(before.state()))
            peak = max(peak, weights + _nbytes(last.state()) + largest)
        found.append(
            Plan(
                choice=choice,
                rungs=rungs,
                peak_bytes=peak,
                first_bytes=sum(footprint(first).values()),
                weight_bytes=weights,
                speedup=gain,
            )
        )
    return found

"""Drafts as wide as pays: a drafter whose width follows what is accepted.

Letters: B rows, M draft nodes, J path length (depth + 1), W widths to choose from.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.payoff import DEFAULT_COSTS, PAYS, cost_at
from jaxllm.decoding.protocol import (
    Committed,
    Counts,
    Draft,
    Drafter,
    Params,
    Verdict,
)
from jaxllm.decoding.resize import as_seen_by, resize_draft
from jaxllm.drafting.costs import measure_variants
from jaxllm.drafting.prompt_lookup import PromptLookup
from jaxllm.models.freeze import Forward

__all__ = ["Adaptive", "AdaptiveState"]

# Keeps the weight of an estimate that nothing renews away from zero.
_LEAST_WEIGHT = 1e-6


@pytree_dataclass
class AdaptiveState:
    """The inner drafter's state, and what is known of the widths.

    Attributes:
      inner: The inner drafter's.
      length_B: int32 lengths that were seen last.
      variant: int32, the width that runs the next step.
      tokens_W: float32, tokens that a pass would have emitted at each width, summed
        with weights that fade.
      weight_W: float32, the sum of the weights.
      since: int32 steps since the widest was tried.
      wait: int32 steps after which it is tried again.
    """

    inner: Any
    length_B: Array
    variant: Array
    tokens_W: Array
    weight_W: Array
    since: Array
    wait: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive(Drafter):
    """Runs each step at the width that is fastest by what was accepted lately.

    A step at one width shows what every narrower one would have emitted, so only wider
    ones need trying; the widest is tried for a step, ever more rarely while that fails.
    The whole batch runs one width, chosen by its mean. At width 1 nothing is drafted,
    but the inner drafter sees the tokens.

    Attributes:
      drafter: The drafter; it drafts whole, and its first nodes are kept.
      widths: Nodes to choose from, ascending from 1.
      costs: Cost of a target pass at each width, in passes at width 1; a table for the
        platform when empty.
      measure: Measures what whole steps cost when bound, the drafter's part included,
        in some seconds; worth it where neither table nor estimate fits, as for models
        of a few million parameters.
      draft_cost: Cost of a proposal of the inner drafter, in the same unit; what the
        drafter itself says when None.
      patience: Steps over which acceptance is averaged.
      wait: Steps before the widest is tried again; doubles with every failure.
      max_wait: Most steps between two tries.
      budget: Share of the time that tries may take where all of them fail; they wait
        longer than `wait` and `max_wait` where it asks for that.

    Source: the payoff model of speculative decoding (arXiv 2211.17192, section 3.2);
      the controller is ours.
    """

    drafter: Drafter = dataclasses.field(default_factory=PromptLookup)
    widths: tuple[int, ...] = (1, 4, 8)
    costs: tuple[float, ...] = ()
    measure: bool = False
    draft_cost: float | None = None
    patience: int = 8
    wait: int = 8
    max_wait: int = 128
    budget: float = 0.04

    def __post_init__(self) -> None:
        widths = self.widths
        if widths[:1] != (1,) or list(widths) != sorted(set(widths)):
            raise ConfigError(
                f"cannot draft: adaptive.widths is {'+'.join(map(str, widths))}, "
                f"expected ascending numbers from 1 on. Correct them."
            )
        if self.costs and len(self.costs) != len(widths):
            raise ConfigError(
                f"cannot draft: adaptive.costs has {len(self.costs)} numbers, expected "
                f"{len(widths)}, one for each width. Correct them."
            )
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"cannot draft: adaptive.budget is {self.budget:g}, expected a share "
                f"of time above 0. Correct it."
            )
        for name in ("patience", "wait", "max_wait"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"cannot draft: adaptive.{name} is {getattr(self, name)}, expected "
                    f"1 or more. Correct it."
                )
        if len(self.drafter.variants) > 1:
            raise ConfigError(
                "cannot draft: adaptive has an inner drafter that chooses between "
                "variants itself, expected one with one. Leave out one of the two."
            )

    @property
    def variants(self) -> tuple[Drafter, ...]:
        """One a width; no wider than the inner drafter."""
        most = self.drafter.nodes
        widths = [w for w in self.widths if w < most]
        if len(widths) < len(self.widths):
            widths.append(most)
        return tuple(_Width(self, i, width) for i, width in enumerate(widths))

    def select(self, state: AdaptiveState) -> Array:
        """Returns the width that runs the next step."""
        return state.variant

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M of the widest."""
        return self.variants[-1].nodes

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Of the widest."""
        return self.variants[-1].depth

    @property
    def tree(self) -> bool:  # type: ignore[override]
        """Whether the inner drafter drafts trees."""
        return self.drafter.tree

    @property
    def collect(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the inner drafter needs."""
        return self.drafter.collect

    @property
    def prompt_hidden(self) -> bool:  # type: ignore[override]
        """Whether the inner drafter needs the prompt's hidden states."""
        return self.drafter.prompt_hidden

    @property
    def forward(self) -> Any:  # type: ignore[override]
        """The inner drafter's, at the widest."""
        return self.variants[-1].forward

    @property
    def reads_hidden(self) -> bool:  # type: ignore[override]
        """Whether the inner drafter reads the target's hidden states."""
        return self.drafter.reads_hidden

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Binds the inner drafter, and measures costs if asked to."""
        inner, params = self.drafter.bind(lm)
        bound = dataclasses.replace(self, drafter=inner)
        if self.draft_cost is None:
            own = {"target": lm.params, "drafter": params}
            bound = dataclasses.replace(bound, draft_cost=inner.cost(own))
        if self.measure:
            bound = dataclasses.replace(
                bound,
                widths=tuple(v.nodes for v in bound.variants),
                costs=tuple(measure_variants(lm, bound, params)),
                measure=False,
                draft_cost=0.0,
            )
        return bound, params

    def init(
        self, params: Params, committed: Committed, prefill: Forward
    ) -> AdaptiveState:
        """Starts the inner drafter; the first step tries the widest."""
        count = len(self.variants)
        none_W = jnp.zeros((count,), jnp.float32)
        return AdaptiveState(
            inner=self.drafter.init(params, committed, prefill),
            length_B=committed.length_B,
            variant=jnp.int32(count - 1),
            tokens_W=none_W,
            weight_W=none_W,
            since=jnp.int32(0),
            wait=jnp.int32(max(self.wait, self.least_wait())),
        )

    def propose(
        self, params: Params, state: AdaptiveState, committed: Committed
    ) -> tuple[AdaptiveState, Draft]:
        """Proposes at the widest; inside another drafter nobody selects."""
        return self.variants[-1].propose(params, state, committed)

    def observe(
        self,
        params: Params,
        state: AdaptiveState,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> AdaptiveState:
        """Observes a step at the widest."""
        return self.variants[-1].observe(
            params, state, committed, draft, verdict, forward
        )

    def counts(self, state: AdaptiveState) -> Counts:
        """Returns what the inner drafter did."""
        return self.drafter.counts(state.inner)

    def learned(self, params: Any, state: AdaptiveState) -> Any:
        """Returns what the inner drafter learned."""
        return self.drafter.learned(params, state.inner)

    def costs_W(self) -> list[float]:
        """Returns the cost of a step at every width, drafting included."""
        if self.costs:
            table = dict(zip(self.widths, self.costs, strict=True))
        else:
            table = DEFAULT_COSTS.get(jax.default_backend(), {1: 1.0})
        draft_cost = self.draft_cost or 0.0
        return [
            cost_at(table, v.nodes) + (draft_cost if v.nodes > 1 else 0.0)
            for v in self.variants
        ]

    def least_wait(self) -> int:
        """Returns the steps after which a try in vain has cost its budget."""
        return math.ceil((self.costs_W()[-1] - 1) / self.budget)

    def decide(
        self, state: AdaptiveState, index: int, verdict: Verdict, active_B: Array
    ) -> AdaptiveState:
        """Returns the state with the width of the next step.

        Args:
          state: Of the step before.
          index: The variant that ran this step.
          verdict: Of this step.
          active_B: Rows that emitted something.
        """
        widths = [v.nodes for v in self.variants]
        last = len(widths) - 1
        path_BJ, steps_J = verdict.path_BJ, jnp.arange(verdict.path_BJ.shape[1])
        taken_BJ = (steps_J <= verdict.num_accepted_B[:, None]) & active_B[:, None]
        rows = active_B.sum()
        seen = jnp.arange(last + 1) <= jnp.where(rows > 0, index, -1)
        # A narrower draft would have held the nodes of the path below its width.
        emitted_W = jnp.stack([(taken_BJ & (path_BJ < w)).sum() for w in widths])
        mean_W = emitted_W.astype(jnp.float32) / jnp.maximum(rows, 1)
        fade_W = jnp.maximum(
            1 - 1 / self.patience, _LEAST_WEIGHT / jnp.maximum(state.weight_W, 1e-30)
        )
        fade_W = jnp.where(state.weight_W > 0, fade_W, 0.0)
        weight_W = state.weight_W * fade_W + seen
        tokens_W = state.tokens_W * fade_W + jnp.where(seen, mean_W, 0.0)
        gain_W = tokens_W / jnp.maximum(weight_W, _LEAST_WEIGHT)
        gain_W = gain_W / jnp.asarray(self.costs_W(), jnp.float32)
        best = jnp.argmax(gain_W.at[0].multiply(PAYS)).astype(jnp.int32)
        since, wait = state.since + 1, state.wait
        if index == last:
            # `since` is 0 where the step before ran the widest too: no try failed.
            failed = (best != last) & (state.since > 0)
            least = self.least_wait()
            longer = jnp.minimum(2 * state.wait, max(self.max_wait, least))
            shortest = max(self.wait, least)
            wait = jnp.where(failed, longer, shortest).astype(jnp.int32)
            since = jnp.int32(0)
        return dataclasses.replace(
            state,
            variant=jnp.where(since >= wait, last, best).astype(jnp.int32),
            tokens_W=tokens_W,
            weight_W=weight_W,
            since=since,
            wait=wait,
        )


@dataclasses.dataclass(frozen=True)
class _Width(Drafter):
    """An adaptive drafter at one of its widths.

    The inner drafter sees steps of its own width: what was cut off comes back as nodes
    that are not valid.
    """

    owner: Adaptive
    index: int
    nodes: int

    @property
    def depth(self) -> int:  # type: ignore[override]
        return min(self.nodes - 1, self.owner.drafter.depth)

    @property
    def tree(self) -> bool:  # type: ignore[override]
        return self.owner.drafter.tree

    @property
    def collect(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.owner.drafter.collect

    @property
    def forward(self) -> Any:  # type: ignore[override]
        run = self.owner.drafter.forward
        if run is None:
            return None
        return lambda params, state, draft, context: run(
            params, state.inner, draft, context
        )

    def propose(
        self, params: Params, state: AdaptiveState, committed: Committed
    ) -> tuple[AdaptiveState, Draft]:
        if self.nodes == 1:
            root_BM = committed.pending_B[:, None]
            return state, Draft(root_BM, jnp.ones_like(root_BM, bool))
        inner, draft = self.owner.drafter.propose(params, state.inner, committed)
        cut = resize_draft(draft, self.nodes, self.tree)
        return dataclasses.replace(state, inner=inner), cut

    def observe(
        self,
        params: Params,
        state: AdaptiveState,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> AdaptiveState:
        inner = self.owner.drafter
        seen = inner.observe(
            params,
            state.inner,
            committed,
            *as_seen_by(inner, draft, verdict, forward),
        )
        active_B = committed.length_B > state.length_B
        state = self.owner.decide(state, self.index, verdict, active_B)
        return dataclasses.replace(state, inner=seen, length_B=committed.length_B)

    def counts(self, state: AdaptiveState) -> Counts:
        return self.owner.counts(state)

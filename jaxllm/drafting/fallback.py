"""Two drafters, row by row: the second where the first has nothing to say.

Letters: B rows, M draft nodes, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.decoding.protocol import (
    Committed,
    Counts,
    Draft,
    Drafter,
    Params,
    Verdict,
    join_counts,
)
from jaxllm.decoding.resize import as_seen_by, resize_draft
from jaxllm.models.freeze import Forward

__all__ = ["Fallback", "part_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fallback(Drafter):
    """The first drafter's draft where it has one, else the second's.

    The second runs only in steps in which some row needs it, so a costly model may
    stand behind a lookup that is free.

    Attributes:
      first: The one that is asked first.
      second: The one behind it.
    """

    first: Drafter
    second: Drafter

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M of the wider one."""
        return max(self.first.nodes, self.second.nodes)

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Depth of the deeper one."""
        return max(self.first.depth, self.second.depth)

    @property
    def tree(self) -> bool:  # type: ignore[override]
        """Whether one of them drafts trees."""
        return self.first.tree or self.second.tree

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """Whether both are."""
        return self.first.lean and self.second.lean

    @property
    def collect(self) -> tuple[str, ...]:  # type: ignore[override]
        """What either needs."""
        return (*self.first.collect, *self.second.collect)

    @property
    def prompt_hidden(self) -> bool:  # type: ignore[override]
        """Whether either needs the prompt's hidden states."""
        return self.first.prompt_hidden or self.second.prompt_hidden

    @property
    def reads_hidden(self) -> bool:  # type: ignore[override]
        """Whether either reads hidden states."""
        return self.first.reads_hidden or self.second.reads_hidden

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Binds both."""
        first, first_params = self.first.bind(lm)
        second, second_params = self.second.bind(lm)
        bound = dataclasses.replace(self, first=first, second=second)
        return bound, {"first": first_params, "second": second_params}

    def init(self, params: Params, committed: Committed, prefill: Forward) -> Any:
        """Starts both."""
        return (
            self.first.init(part_of(params, "first"), committed, prefill),
            self.second.init(part_of(params, "second"), committed, prefill),
        )

    def propose(
        self, params: Params, state: Any, committed: Committed
    ) -> tuple[Any, Draft]:
        """Asks the first, and the second if some row got nothing."""
        first_state, draft = self.first.propose(
            part_of(params, "first"), state[0], committed
        )
        draft = resize_draft(draft, self.nodes, self.tree)
        empty_B = ~draft.valid_BM[:, 1:].any(axis=1)

        def ask(carry: Any) -> Any:
            _, second_state, draft = carry
            second_state, other = self.second.propose(
                part_of(params, "second"), second_state, committed
            )
            other = resize_draft(other, self.nodes, self.tree)
            return jnp.bool_(False), second_state, choose_rows(empty_B, other, draft)

        # A loop of at most one turn: unlike a branch it updates caches in place.
        carry = (empty_B.any(), state[1], draft)
        _, second_state, draft = jax.lax.while_loop(lambda c: c[0], ask, carry)
        return (first_state, second_state), draft

    def observe(
        self,
        params: Params,
        state: Any,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> Any:
        """Lets both see the step; a part sees its own number of nodes of it."""
        seen = []
        for name, part, own in zip(
            ("first", "second"), (self.first, self.second), state, strict=True
        ):
            step = as_seen_by(part, draft, verdict, forward)
            seen.append(part.observe(part_of(params, name), own, committed, *step))
        return tuple(seen)

    def cost(self, params: Params) -> float:
        """Returns what both cost, as if some row always needed the second."""
        first = self.first.cost(part_of(params, "first"))
        return first + self.second.cost(part_of(params, "second"))

    def counts(self, state: Any) -> Counts:
        """Returns what both did."""
        return join_counts(self.first.counts(state[0]), self.second.counts(state[1]))

    def learned(self, params: Any, state: Any) -> Any:
        """Returns what both learned."""
        return {
            "first": self.first.learned(params["first"], state[0]),
            "second": self.second.learned(params["second"], state[1]),
        }


def part_of(params: Params, name: str) -> Params:
    """Returns the parameters as a combinator's part sees them."""
    return {**params, "drafter": params["drafter"][name]}


def choose_rows(which_B: Array, yes: Draft, no: Draft) -> Draft:
    """Returns the one draft in some rows, the other in the rest."""
    if (yes.log_q_BMV is None) != (no.log_q_BMV is None):
        yes, no = (with_log_q(draft, yes, no) for draft in (yes, no))

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(which_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, yes, no)


def with_log_q(draft: Draft, *others: Draft) -> Draft:
    """Writes down that a draft's tokens were not drawn: each had probability 1."""
    if draft.log_q_BMV is not None:
        return draft
    V = next(d.log_q_BMV.shape[-1] for d in others if d.log_q_BMV is not None)
    sure = jnp.where(draft.tokens_BM[..., None] == jnp.arange(V), 0.0, -jnp.inf)
    return dataclasses.replace(draft, log_q_BMV=sure)

"""Cascades: drafters that draft with drafters.

`Vertical` speeds a drafting model up by a drafter of its own; `Horizontal` lets cheaper
drafters write the later, less certain part of a chain. Both hand their parts a virtual
`Committed`, in which tokens that are only drafted stand as if they were known.

Letters: B rows, S slots, M draft nodes, V vocabulary, J path length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.feed import after
from jaxllm.decoding.protocol import (
    Committed,
    Counts,
    Draft,
    Drafter,
    Params,
    Verdict,
    join_counts,
)
from jaxllm.decoding.resize import as_seen_by
from jaxllm.decoding.sampling import draw
from jaxllm.decoding.verify import match_choices
from jaxllm.drafting.draft_net import NetDrafter, add_pass
from jaxllm.drafting.fallback import part_of, with_log_q
from jaxllm.models.freeze import Forward

__all__ = ["Horizontal", "Vertical"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vertical(NetDrafter):
    """CS Drafting's vertical cascade: a drafting model with a drafter of its own.

    The model reviews what the inner drafter proposes until a chain of the wished length
    stands; the target then reviews the chain. What the model writes is what it would
    have written alone, in fewer forwards.

    Attributes:
      drafter: The inner drafter: any, another cascade included.
      length: Tokens drafted in a step.
      lenience: The model lets a token pass that it gives a probability above 1/lenience
        though it would have chosen another one; 1 is strict. The target stays strict.

    Source: Cascade Speculative Drafting (arXiv 2312.11462), section 3.1.
    """

    drafter: Drafter
    length: int = 7
    lenience: float = 1.0

    def __post_init__(self) -> None:
        if self.length < 1 or self.lenience < 1:
            raise ConfigError(
                f"cannot draft: vertical has length {self.length} and lenience "
                f"{self.lenience:g}, expected both to be 1 or more. Correct them."
            )
        if self.drafter.reads_hidden:
            raise ConfigError(
                f"cannot draft: vertical has the inner drafter "
                f"{type(self.drafter).__name__}, which reads the target's hidden "
                f"states, expected one that reads tokens. Use it beside a fallback."
            )
        if self.lenience > 1 and self.drafter.tree:
            raise ConfigError(
                "cannot draft: vertical has lenience above 1 and an inner drafter of "
                "trees, expected a chain. Leave lenience at 1."
            )

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, the pending token and the chain."""
        return self.length + 1

    @property
    def depth(self) -> int:  # type: ignore[override]
        """The length."""
        return self.length

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Loads the model and binds the inner drafter to the same target."""
        inner, inner_params = self.drafter.bind(lm)
        bound, params = NetDrafter.bind(dataclasses.replace(self, drafter=inner), lm)
        return bound, {"model": params, "inner": inner_params}

    def init(self, params: Params, committed: Committed, prefill: Forward) -> Any:
        """Runs the prompt through the model and starts the inner drafter.

        The inner drafter sees a prefill without hidden states: those of the target
        are not the model's.
        """
        net = self.bound_net
        hidden = jnp.zeros((prefill.hidden_BTD.shape[0], 1, net.model.config.width))
        blank = Forward(prefill.logits_BTV, hidden, (), {})
        return (
            net.init(part_of(params, "model"), committed),
            self.drafter.init(part_of(params, "inner"), committed, blank),
        )

    def propose(
        self, params: Params, state: Any, committed: Committed
    ) -> tuple[Any, Draft]:
        """Lets model and inner drafter decode until the chain is long enough."""
        if self.lenience > 1 and committed.choice.rejects:
            raise ConfigError(
                "cannot verify: vertical has lenience above 1 under the rejection "
                "rule, expected 1: nobody knows what a lenient review draws from. "
                "Use --verify=match, or leave lenience at 1."
            )
        rows, sampler = committed.tokens_BS.shape[0], committed.choice
        V = self.bound_net.vocabulary
        log_q_BMV = jnp.zeros((rows, self.nodes if sampler.rejects else 0, V))
        start_B = committed.length_B

        def more(loop: Any) -> Array:
            _, virtual, _ = loop
            return jnp.any(virtual.length_B - start_B < self.length)

        def body(loop: Any) -> Any:
            state, virtual, log_q_BMV = loop
            going_B = virtual.length_B - start_B < self.length
            return self._review(params, state, virtual, log_q_BMV, start_B, going_B)

        loop = (state, committed, log_q_BMV)
        state, virtual, log_q_BMV = jax.lax.while_loop(more, body, loop)
        tokens_BM, valid_BM = drafted(committed, virtual, self.length)
        log_q = log_q_BMV if sampler.rejects else None
        return state, Draft(tokens_BM, valid_BM, log_q_BMV=log_q)

    def _review(
        self,
        params: Params,
        state: Any,
        virtual: Committed,
        log_q_BMV: Array,
        start_B: Array,
        going_B: Array,
    ) -> Any:
        """Does one step of the inner engine for the rows that go on."""
        net, sampler = self.bound_net, virtual.choice
        ours, theirs = part_of(params, "model"), part_of(params, "inner")
        inner_state, draft = self.drafter.propose(theirs, state[1], virtual)
        net_state = net.keep_up(ours, state[0], virtual, ahead=2)
        depth_BM = draft.depth_BM
        # After a chain that the target accepted whole, the token before the pending
        # one is still missing: it runs in front of the draft, not in a forward of its
        # own.
        late_B = net_state.cache.length_B < virtual.length_B - 1
        forward = net.forward(
            ours, *_behind(virtual, draft, depth_BM, late_B, net_state.cache)
        )
        new_kv = forward.new_kv
        forward = Forward(
            forward.logits_BTV[:, 1:], forward.hidden_BTD[:, 1:], (), forward.aux
        )
        chosen_BM, log_p_BMV = draw(
            forward.logits_BTV,
            virtual.length_B[:, None] + depth_BM,
            virtual.row_key_B,
            sampler,
        )
        passed_BM = chosen_BM
        if self.lenience > 1:
            passed_BM = self._lenient(draft, chosen_BM, forward.logits_BTV)
        verdict = match_choices(draft, passed_BM, depth=self.drafter.depth)
        path_BJ, accepted_B = verdict.path_BJ, verdict.num_accepted_B
        index_J = jnp.arange(path_BJ.shape[1])
        block_BJ = verdict.block_BJ(draft)
        count_B = jnp.where(going_B, accepted_B + 1, 0)
        if log_p_BMV is not None:
            # Token j of the block was drawn at node j of the path.
            drawn_BJV = jnp.take_along_axis(log_p_BMV, path_BJ[..., None], axis=1)
            node_BJ = (virtual.length_B - start_B)[:, None] + 1 + index_J
            node_BJ = jnp.where(index_J < count_B[:, None], node_BJ, self.nodes)
            row_B1 = jnp.arange(count_B.shape[0])[:, None]
            log_q_BMV = log_q_BMV.at[row_B1, node_BJ].set(drawn_BJV, mode="drop")
        grown = virtual.extend(block_BJ, count_B)
        late_B &= going_B
        ahead_BJ = jnp.where(late_B[:, None], path_BJ, jnp.roll(path_BJ, -1, axis=1))
        first_B1 = jnp.where(late_B, 0, 1 + path_BJ[:, 0])[:, None]
        kept_BJ = jnp.concatenate([first_B1, 1 + ahead_BJ], axis=1)
        grown_B = after(forward.hidden_BTD, count_B + late_B)
        cache = net_state.cache.append(new_kv, kept_BJ, grown_B)
        net_state = dataclasses.replace(net_state, cache=cache, fed_BS=grown.tokens_BS)
        ran_B = draft.valid_BM.sum(axis=1) * going_B + late_B
        net_state = add_pass(net_state, ran_B)
        inner_state = self.drafter.observe(
            theirs, inner_state, grown, draft, verdict, forward
        )
        return (net_state, inner_state), grown, log_q_BMV

    def _lenient(self, draft: Draft, chosen_BM: Array, logits_BMV: Array) -> Array:
        """Replaces a choice by the child of a chain where that is likely enough."""
        child_BM = jnp.roll(draft.tokens_BM, -1, axis=1)
        p_BMV = jax.nn.softmax(logits_BMV, axis=-1)
        p_BM = jnp.take_along_axis(p_BMV, child_BM[..., None], axis=2)[..., 0]
        good_BM = (p_BM * self.lenience > 1) & jnp.roll(draft.valid_BM, -1, axis=1)
        good_BM = good_BM.at[:, -1].set(False)
        return jnp.where(good_BM, child_BM, chosen_BM)

    def cost(self, params: Params) -> float:
        """Returns what the model costs alone, without the inner drafter's help."""
        return super().cost(part_of(params, "model"))

    def counts(self, state: Any) -> Counts:
        """Returns what the model and the inner drafter did."""
        own = super().counts(state[0])
        return join_counts(own, self.drafter.counts(state[1]))

    def learned(self, params: Any, state: Any) -> Any:
        """Returns what the inner drafter learned."""
        return {**params, "inner": self.drafter.learned(params["inner"], state[1])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Horizontal(Drafter):
    """CS Drafting's horizontal cascade: the better drafter first, cheaper ones behind.

    A later token of a chain counts only if all before it are right, so it deserves
    less. Every drafter goes on where the ones before it stopped.

    Attributes:
      drafters: Chains, the best first.
      lengths: Tokens that each drafts.

    Source: Cascade Speculative Drafting (arXiv 2312.11462), section 3.2.
    """

    drafters: tuple[Drafter, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.drafters) != len(self.lengths) or not self.lengths:
            raise ConfigError(
                f"cannot draft: horizontal has {len(self.drafters)} drafters and "
                f"{len(self.lengths)} lengths, expected a length for each. Give "
                f"drafters=(A)+(B),lengths=3+8."
            )
        if any(drafter.tree for drafter in self.drafters):
            raise ConfigError(
                "cannot draft: horizontal has a drafter of trees, expected chains. "
                "Use fallback to put a tree behind a chain."
            )
        for drafter, length in zip(self.drafters, self.lengths, strict=True):
            if not 0 < length <= drafter.depth:
                raise ConfigError(
                    f"cannot draft: horizontal has length {length} for a drafter of "
                    f"{drafter.depth} tokens, expected 1 to {drafter.depth}. Correct "
                    f"lengths, or the drafter's own length."
                )

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """M, the pending token and all parts."""
        return sum(self.lengths) + 1

    @property
    def depth(self) -> int:  # type: ignore[override]
        """The sum of the lengths."""
        return sum(self.lengths)

    @property
    def lean(self) -> bool:  # type: ignore[override]
        """Whether all parts are."""
        return all(drafter.lean for drafter in self.drafters)

    @property
    def reads_hidden(self) -> bool:  # type: ignore[override]
        """Whether some part reads hidden states."""
        return any(drafter.reads_hidden for drafter in self.drafters)

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Binds all parts."""
        pairs = [drafter.bind(lm) for drafter in self.drafters]
        bound = dataclasses.replace(self, drafters=tuple(d for d, _ in pairs))
        return bound, {str(i): params for i, (_, params) in enumerate(pairs)}

    def init(self, params: Params, committed: Committed, prefill: Forward) -> Any:
        """Starts all parts."""
        return tuple(
            drafter.init(part_of(params, str(i)), committed, prefill)
            for i, drafter in enumerate(self.drafters)
        )

    def propose(
        self, params: Params, state: Any, committed: Committed
    ) -> tuple[Any, Draft]:
        """Lets each part draft behind the ones before it."""
        rows, sampler = committed.tokens_BS.shape[0], committed.choice
        virtual, states, pieces = committed, [], []
        for i, (drafter, length) in enumerate(
            zip(self.drafters, self.lengths, strict=True)
        ):
            part, draft = drafter.propose(part_of(params, str(i)), state[i], virtual)
            states.append(part)
            taken_BM = draft.valid_BM[:, 1 : length + 1]
            count_B = jnp.cumprod(taken_BM.astype(jnp.int32), axis=1).sum(axis=1)
            pieces.append((draft, virtual.length_B - committed.length_B, count_B))
            virtual = virtual.extend(draft.tokens_BM[:, 1 : length + 1], count_B)
        tokens_BM, valid_BM = drafted(committed, virtual, self.depth)
        draft = Draft(tokens_BM, valid_BM)
        if not sampler.rejects or all(d.log_q_BMV is None for d, _, _ in pieces):
            return tuple(states), draft
        drawn = [d for d, _, _ in pieces]
        V = next(d.log_q_BMV.shape[-1] for d in drawn if d.log_q_BMV is not None)
        log_q_BMV = jnp.zeros((rows, self.nodes, V))
        row_B1 = jnp.arange(rows)[:, None]
        for part_draft, offset_B, count_B in pieces:
            whole = with_log_q(part_draft, *drawn)
            assert whole.log_q_BMV is not None
            index_M = jnp.arange(1, whole.tokens_BM.shape[1])
            node_BM = offset_B[:, None] + index_M
            node_BM = jnp.where(index_M <= count_B[:, None], node_BM, self.nodes)
            log_q_BMV = log_q_BMV.at[row_B1, node_BM].set(
                whole.log_q_BMV[:, 1:], mode="drop"
            )
        return tuple(states), dataclasses.replace(draft, log_q_BMV=log_q_BMV)

    def observe(
        self,
        params: Params,
        state: Any,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> Any:
        """Lets the first part see the step; the others drafted behind mere guesses."""
        first = self.drafters[0]
        step = as_seen_by(first, draft, verdict, forward)
        own = part_of(params, "0")
        return (first.observe(own, state[0], committed, *step), *state[1:])

    def cost(self, params: Params) -> float:
        """Returns what all parts cost."""
        pairs = enumerate(self.drafters)
        return sum(drafter.cost(part_of(params, str(i))) for i, drafter in pairs)

    def counts(self, state: Any) -> Counts:
        """Returns what all parts did."""
        pairs = zip(self.drafters, state, strict=True)
        return join_counts(*(drafter.counts(part) for drafter, part in pairs))

    def learned(self, params: Any, state: Any) -> Any:
        """Returns what the parts learned."""
        return {
            str(i): drafter.learned(params[str(i)], part)
            for i, (drafter, part) in enumerate(zip(self.drafters, state, strict=True))
        }


def _behind(
    virtual: Committed, draft: Draft, depth_BM: Array, late_B: Array, cache: Any
) -> tuple[Any, ...]:
    """Puts the token before the pending one in front of a draft.

    Returns:
      The arguments of `DraftNet.forward`; the token is invalid where it is not late.
    """
    slots = virtual.tokens_BS.shape[1]
    before_B1 = jnp.clip(virtual.length_B - 2, 0, slots - 1)[:, None]
    token_B1 = jnp.take_along_axis(virtual.tokens_BS, before_B1, axis=1)
    tokens_BM = jnp.concatenate([token_B1, draft.tokens_BM], axis=1)
    position_BM = (virtual.length_B - 1)[:, None] + depth_BM
    position_BM = jnp.concatenate([before_B1, position_BM], axis=1)
    valid_BM = jnp.concatenate([late_B[:, None], draft.valid_BM], axis=1)
    parents_BM = draft.parents_BM
    if parents_BM is not None:
        # The token in front is the root above the root.
        parents_BM = jnp.pad(parents_BM + 1, ((0, 0), (1, 0)), constant_values=-1)
    grown = Draft(tokens_BM, valid_BM, parents_BM)
    return tokens_BM, position_BM, cache, grown.mask, valid_BM


def drafted(
    committed: Committed, virtual: Committed, length: int
) -> tuple[Array, Array]:
    """Returns the chain that stands between what is known and what is virtual.

    Returns:
      int32 `[B, length + 1]` from the pending token on, and which of them stand there.
    """
    slots = committed.tokens_BS.shape[1]
    index_M = jnp.arange(length + 1, dtype=jnp.int32)
    slot_BM = (committed.length_B - 1)[:, None] + index_M
    tokens_BM = jnp.take_along_axis(
        virtual.tokens_BS, jnp.minimum(slot_BM, slots - 1), axis=1
    )
    return tokens_BM, slot_BM < jnp.minimum(virtual.length_B, slots)[:, None]

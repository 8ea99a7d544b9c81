"""The decode engine: one jitted loop of propose, forward, verify, append, observe.

Nothing here knows which drafter runs. At the top of every step the cache holds the
keys and values of all known tokens but the pending one.

Letters: B rows, S slots, M draft nodes, J path length (depth + 1), V vocabulary, E end
tokens, C chunk of a prompt.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.attention.cache import Cache
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.constraints import constrain, follow
from jaxllm.decoding.feed import Feeder
from jaxllm.decoding.penalties import penalize
from jaxllm.decoding.protocol import (
    Committed,
    Counts,
    Draft,
    Drafter,
    Params,
    Verdict,
)
from jaxllm.decoding.resize import resize_forward, resize_verdict
from jaxllm.decoding.sampling import Sampler
from jaxllm.decoding.verify import verify
from jaxllm.models.freeze import Context, Forward, Model

__all__ = ["DecodeState", "Stats", "advance", "prefill"]


@pytree_dataclass
class Stats:
    """Counts of each row, kept while the row is active; prefill is not counted.

    Attributes:
      target_passes_B: Forwards of the target.
      emitted_B: Tokens emitted.
      drafted_B: Proposals verified (valid nodes beside the pending one).
      accepted_BJ: How often at least j proposals were accepted (j > 0), before eos
        and limits cut; entry 0 counts passes.
      tested_BJ: How often a proposal at depth j was tested: j - 1 were accepted and
        there was one at depth j; entry 0 counts passes.
      inner: Forwards of inner models, and tokens that these ran for the row.
    """

    target_passes_B: Array
    emitted_B: Array
    drafted_B: Array
    accepted_BJ: Array
    tested_BJ: Array
    inner: Counts


@pytree_dataclass
class DecodeState:
    """All that the loop carries.

    Attributes:
      committed: Tokens, lengths and keys.
      cache: Keys and values of `length - 1` tokens.
      drafter: The drafter's own state.
      limit_B: Length at which a row stops.
      done_B: Rows that have stopped.
      finite_B: False once a row's logits were not finite; such a row stops.
      logprob_BS: Log-probability of each emitted token under the target, before
        temperature and filters; stands at the token's slot.
      stats: Counts.
      constraint: State of the constraint at the pending token; empty without one.
    """

    committed: Committed
    cache: Cache
    drafter: Any
    limit_B: Array
    done_B: Array
    finite_B: Array
    logprob_BS: Array
    stats: Stats
    constraint: Any = ()


@functools.partial(
    jax.jit,
    static_argnames=("model", "drafter", "chunk", "rope_length"),
    donate_argnames=("cache",),
)
def prefill(
    params: Params,
    committed: Committed,
    cache: Cache,
    limit_B: Array,
    done_B: Array,
    *,
    model: Model,
    drafter: Drafter,
    chunk: int,
    rope_length: int = 0,
) -> DecodeState:
    """Runs `prompt[:-1]` through the target in chunks of one compiled shape.

    Args:
      params: `{"target", "drafter"}`.
      committed: The prompts, right padded; lengths of at least 1.
      cache: Holds nothing but what rows share; donated.
      limit_B: Length at which each row stops.
      done_B: Rows that only fill the batch.
      model: The target.
      drafter: Bound drafter.
      chunk: C, tokens of one pass.
      rope_length: As in `Context`.

    Returns:
      The state before the first step.
    """
    target = params["target"]
    rows, slots = committed.tokens_BS.shape
    count_B = jnp.maximum(committed.length_B - 1, 0)
    whole = drafter.prompt_hidden
    collect = tuple(n for n in drafter.collect if n.startswith("hidden:"))
    zeros = jnp.zeros((rows, slots if whole else 1, model.config.width), jnp.float32)
    zeros = zeros.astype(model.policy.compute)

    def keep(kept: Any, start_B: Array, x_BCD: Array, aux: dict[str, Array]) -> Any:
        slot_BC = start_B[:, None] + jnp.arange(chunk)
        if not whole:
            # Of the last position only; the other slots fall out of the buffer.
            slot_BC = jnp.where(slot_BC == count_B[:, None] - 1, 0, 1)
        row_B1 = jnp.arange(rows)[:, None]

        def place(buffer: Array, x: Array) -> Array:
            return buffer.at[row_B1, slot_BC].set(x.astype(buffer.dtype), mode="drop")

        hidden, collected = kept
        return place(hidden, x_BCD), {n: place(collected[n], aux[n]) for n in collected}

    feeder = Feeder(
        model=model, chunk=chunk, rope_length=rope_length or slots, collect=collect
    )
    cache, (hidden, aux) = feeder.run(
        target,
        committed.tokens_BS,
        cache,
        count_B,
        empty=cache.starts_empty,
        keep=keep,
        kept=(zeros, {name: zeros for name in collect}),
    )
    no_logits = jnp.zeros((rows, 0, model.config.vocabulary), jnp.float32)
    forward = Forward(no_logits, hidden, (), aux)
    drafter_state = drafter.init(params, committed, forward)
    constraint = params.get("constraint")
    return DecodeState(
        committed=committed,
        cache=cache,
        drafter=drafter_state,
        limit_B=limit_B,
        done_B=done_B | (committed.length_B >= limit_B),
        finite_B=jnp.ones((rows,), bool),
        logprob_BS=jnp.zeros((rows, slots), jnp.float32),
        stats=no_stats(rows, drafter.depth + 1, drafter.counts(drafter_state)),
        constraint=() if constraint is None else constraint.init(rows),
    )


def no_stats(rows: int, path: int, inner: Counts) -> Stats:
    """Returns the counts before the first step; `path` is J."""
    zero_B = jnp.zeros((rows,), jnp.int32)
    zero_BJ = jnp.zeros((rows, path), jnp.int32)
    none = jax.tree.map(jnp.zeros_like, inner)
    return Stats(zero_B, zero_B, zero_B, zero_BJ, zero_BJ, none)


@functools.partial(
    jax.jit,
    static_argnames=("model", "drafter", "rope_length"),
    donate_argnames=("state",),
)
def advance(
    params: Params,
    state: DecodeState,
    sampler: Sampler,
    eos_E: Array,
    steps: Array,
    *,
    model: Model,
    drafter: Drafter,
    rope_length: int = 0,
) -> DecodeState:
    """Runs up to `steps` steps, or until every row is done; one dispatch, no host.

    Args:
      params: `{"target", "drafter"}`.
      state: Donated.
      sampler: The rows' options.
      eos_E: int32 ids that end a row.
      steps: int32 scalar.
      model: The target.
      drafter: Bound drafter.
      rope_length: As in `Context`.
    """
    Carry = tuple[Array, DecodeState]
    variants = drafter.variants

    def more(carry: Carry) -> Array:
        count, state = carry
        return (count < steps) & jnp.any(~state.done_B)

    def loop(index: int, carry: Carry) -> Carry:
        """Steps with one variant for as long as it is the one selected."""

        def mine(carry: Carry) -> Array:
            return more(carry) & (drafter.select(carry[1].drafter) == index)

        def body(carry: Carry) -> Carry:
            count, state = carry
            state = step(
                params,
                state,
                sampler,
                eos_E,
                model=model,
                drafter=variants[index],
                rope_length=rope_length,
            )
            return count + 1, state

        return jax.lax.while_loop(more if len(variants) == 1 else mine, body, carry)

    # Loops in a loop, not branches: a loop updates its carry in place.
    def turn(carry: Carry) -> Carry:
        for index in range(len(variants)):
            carry = loop(index, carry)
        return carry

    carry = (jnp.int32(0), state)
    if len(variants) == 1:
        return loop(0, carry)[1]
    return jax.lax.while_loop(more, turn, carry)[1]


def step(
    params: Params,
    state: DecodeState,
    sampler: Sampler,
    eos_E: Array,
    *,
    model: Model,
    drafter: Drafter,
    rope_length: int = 0,
) -> DecodeState:
    """Runs one step; arguments as for `advance`."""
    committed, slots = state.committed, state.committed.tokens_BS.shape[1]
    drafter_state, draft = drafter.propose(params, state.drafter, committed)
    root = jnp.arange(draft.tokens_BM.shape[1]) == 0
    draft = dataclasses.replace(
        draft, valid_BM=(draft.valid_BM & ~state.done_B[:, None]) | root
    )
    judge = functools.partial(
        _judge,
        params,
        state,
        drafter_state,
        sampler=sampler,
        eos_E=eos_E,
        model=model,
        drafter=drafter,
        rope_length=rope_length or slots,
    )
    if drafter.lean and drafter.nodes > 1:
        judged = jax.lax.cond(
            draft.valid_BM[:, 1:].any(),
            lambda: judge(draft),
            lambda: _padded(judge(_root(draft)), drafter),
        )
    else:
        judged = judge(draft)
    forward, verdict, stuck_BM = judged.forward, judged.verdict, judged.stuck_BM
    new = _emit(state, draft, verdict, forward.logits_BTV, eos_E, stuck_BM)
    cache = state.cache.append(
        forward.new_kv, verdict.path_BJ, new.committed.length_B - committed.length_B
    )
    observed = drafter.observe(
        params, drafter_state, new.committed, draft, verdict, forward
    )
    inner = _gained(drafter.counts(state.drafter), drafter.counts(observed))
    return DecodeState(
        committed=new.committed,
        cache=cache,
        drafter=observed,
        limit_B=state.limit_B,
        done_B=new.done_B,
        finite_B=new.finite_B,
        logprob_BS=new.logprob_BS,
        stats=_count(state, draft, verdict, new.committed.length_B, inner),
        constraint=judged.constraint,
    )


@pytree_dataclass
class _Judged:
    """What the target says of a draft; `constraint` is the state behind its token."""

    forward: Forward
    verdict: Verdict
    stuck_BM: Array
    constraint: Any


def _judge(
    params: Params,
    state: DecodeState,
    drafter_state: Any,
    draft: Draft,
    *,
    sampler: Sampler,
    eos_E: Array,
    model: Model,
    drafter: Drafter,
    rope_length: int,
) -> _Judged:
    """Runs the target over a draft and verifies it."""
    committed = state.committed
    context = Context(
        positions_BT=(committed.length_B - 1)[:, None] + draft.depth_BM,
        valid_BT=draft.valid_BM,
        mask=draft.mask,
        cache=state.cache,
        collect=drafter.collect,
        rope_length=rope_length,
    )
    if drafter.forward is None:
        forward = model(params["target"], draft.tokens_BM, context)
    else:
        forward = drafter.forward(params, drafter_state, draft, context)
    logits_BMV, stuck_BM = forward.logits_BTV, jnp.zeros_like(draft.valid_BM)
    if sampler.penalized:
        logits_BMV = penalize(logits_BMV, draft, committed, sampler)
    constraint, constraint_state = params.get("constraint"), state.constraint
    if constraint is not None:
        logits_BMV, stuck_BM, states = constrain(
            constraint, constraint_state, draft, logits_BMV, eos_E
        )
    verdict = verify(draft, logits_BMV, sampler, committed, depth=drafter.depth)
    if constraint is not None:
        constraint_state = follow(
            constraint, states, verdict.path_BJ[:, -1], verdict.next_token_B
        )
    return _Judged(forward, verdict, stuck_BM, constraint_state)


def _root(draft: Draft) -> Draft:
    """Returns the pending tokens alone, as a chain."""
    return Draft(draft.tokens_BM[:, :1], draft.valid_BM[:, :1])


def _padded(judged: _Judged, drafter: Drafter) -> _Judged:
    """Pads what was said of the pending tokens; nobody reads the rest."""
    nodes, own = drafter.nodes, judged.stuck_BM.shape[1]
    return dataclasses.replace(
        judged,
        forward=resize_forward(judged.forward, nodes),
        verdict=resize_verdict(judged.verdict, nodes, drafter.depth),
        stuck_BM=jnp.pad(judged.stuck_BM, ((0, 0), (0, nodes - own))),
    )


def _gained(before: Counts, after: Counts) -> Counts:
    return {level: after[level] - before[level] for level in after}


@dataclasses.dataclass(frozen=True)
class _Emitted:
    committed: Committed
    done_B: Array
    finite_B: Array
    logprob_BS: Array


def _emit(
    state: DecodeState,
    draft: Draft,
    verdict: Verdict,
    logits_BMV: Array,
    eos_E: Array,
    stuck_BM: Array,
) -> _Emitted:
    """Writes the accepted tokens and the next one, cut at eos and at the limit.

    Nothing is written behind a node that is stuck: its row ends there.
    """
    committed = state.committed
    path_BJ, accepted_B = verdict.path_BJ, verdict.num_accepted_B
    rows, slots = committed.tokens_BS.shape
    index_J = jnp.arange(path_BJ.shape[1])
    block_BJ = verdict.block_BJ(draft)
    count_B = accepted_B + 1
    ends_BJ = (block_BJ[..., None] == eos_E).any(-1) & (index_J < count_B[:, None])
    ended_B = ends_BJ.any(axis=1)
    count_B = jnp.where(ended_B, jnp.argmax(ends_BJ, axis=1) + 1, count_B)
    room_B = state.limit_B - committed.length_B
    ended_B &= count_B <= room_B
    count_B = jnp.minimum(count_B, room_B)
    stuck_BJ = jnp.take_along_axis(stuck_BM, path_BJ, axis=1) & (
        index_J < count_B[:, None]
    )
    ended_B |= stuck_BJ.any(axis=1)
    count_B = jnp.where(stuck_BJ.any(axis=1), jnp.argmax(stuck_BJ, axis=1), count_B)
    count_B = jnp.where(state.done_B, 0, count_B).astype(jnp.int32)

    logits_BJV = jnp.take_along_axis(logits_BMV, path_BJ[..., None], axis=1)
    total_BJ = jax.nn.logsumexp(logits_BJV, axis=-1)
    logprob_BJ = (
        jnp.take_along_axis(logits_BJV, block_BJ[..., None], axis=-1)[..., 0] - total_BJ
    )
    written_BJ = index_J < count_B[:, None]
    finite_B = jnp.where(written_BJ, jnp.isfinite(total_BJ), True).all(axis=1)
    slot_BJ = jnp.where(written_BJ, committed.length_B[:, None] + index_J, slots)
    row_B1 = jnp.arange(rows)[:, None]
    grown = committed.extend(block_BJ, count_B)
    return _Emitted(
        committed=grown,
        done_B=state.done_B | ended_B | (grown.length_B >= state.limit_B) | ~finite_B,
        finite_B=state.finite_B & finite_B,
        logprob_BS=state.logprob_BS.at[row_B1, slot_BJ].set(logprob_BJ, mode="drop"),
    )


def _count(
    state: DecodeState,
    draft: Draft,
    verdict: Verdict,
    length_B: Array,
    inner: Counts,
) -> Stats:
    """Adds one step to the counts of the rows that were active in it."""
    stats, active_B = state.stats, (~state.done_B).astype(jnp.int32)
    index_J = jnp.arange(stats.accepted_BJ.shape[1])
    accepted_B = verdict.num_accepted_B[:, None]
    deepest_B = jnp.max(jnp.where(draft.valid_BM, draft.depth_BM, 0), axis=1)
    reached_BJ = index_J <= accepted_B
    tested_BJ = (index_J <= accepted_B + 1) & (index_J <= deepest_B[:, None])
    return Stats(
        target_passes_B=stats.target_passes_B + active_B,
        emitted_B=stats.emitted_B + length_B - state.committed.length_B,
        drafted_B=stats.drafted_B + active_B * (draft.valid_BM.sum(axis=1) - 1),
        accepted_BJ=stats.accepted_BJ + active_B[:, None] * reached_BJ,
        tested_BJ=stats.tested_BJ + active_B[:, None] * tested_BJ,
        inner={n: stats.inner[n] + active_B[:, None] * inner[n] for n in inner},
    )

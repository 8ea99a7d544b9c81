"""The host's side of decoding: batches in, chunks of tokens out.

Letters: B rows, S slots.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.attention.cache import DenseCache
from jaxllm.attention.shared_prefix import PrefixedCache, SharedPrefix
from jaxllm.core.errors import CapacityError, ConfigError, UserError
from jaxllm.core.rng import row_keys
from jaxllm.core.sharding import fetch
from jaxllm.decoding.buckets import Shapes, shapes_for
from jaxllm.decoding.engine import DecodeState, Stats, advance, prefill
from jaxllm.decoding.ladder import first_rungs, grow, steps_within
from jaxllm.decoding.protocol import Committed, Drafter, Params
from jaxllm.decoding.sampling import Sampler
from jaxllm.decoding.sharing import SharedStretch, Sharing, build_prefix
from jaxllm.decoding.verify import check_verifier
from jaxllm.models.freeze import Context, Model

__all__ = [
    "Decoded",
    "Output",
    "Request",
    "Snapshot",
    "decode",
    "decode_chunks",
    "drain",
]

STEPS_PER_CALL = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A batch of prompts and what is wanted of each.

    Attributes:
      prompts: Token ids of each row, at least one each.
      max_new_tokens: For each row.
      sampler: Options of `len(prompts)` rows.
      seeds: Seed of each row; the same seed gives the same tokens in any batch.
      eos: Ids that end a row; the one that ended it is part of the output.
      steps_per_call: Steps of one dispatch; the host looks at the output between.
      rungs: Capacities in slots: the batch starts at the first that holds its prompts
        and grows when it has to, to the same tokens. When empty, the slots hold the
        longest answer from the start.
      shared: What prompts have in common, from `plan_sharing`; it is run and kept once.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: Sequence[int]
    sampler: Sampler
    seeds: Sequence[int]
    eos: tuple[int, ...] = ()
    steps_per_call: int = STEPS_PER_CALL
    rungs: tuple[int, ...] = ()
    shared: tuple[SharedStretch, ...] = ()


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What the host sees between two dispatches; the rows of the request only.

    Attributes:
      token_ids: New tokens of each row so far.
      done: Which rows have stopped.
      capacity: Slots of a row by now.
    """

    token_ids: list[list[int]]
    done: np.ndarray
    capacity: int = 0


Watch = Callable[[Snapshot], Sequence[bool]]
"""Looks at a snapshot and says which rows shall stop."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What a row gave.

    Attributes:
      token_ids: The new tokens only.
      logprobs: Log-probability of each under the target, before temperature and
        filters.
      ended: Whether an end token stopped the row.
      stats: Counts of the row: `target_passes`, `emitted`, `drafted`, and
        `shared_tokens` (of the prompt, kept once for several rows) as int,
        `accepted`, `tested` as lists by depth, and by level of an inner model
        `draft_passes` (its forwards) and `draft_tokens` (what these ran).
    """

    token_ids: list[int]
    logprobs: list[float]
    ended: bool
    stats: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a batch gave: an output for each row, and what the drafter has learned.

    Attributes:
      outputs: One a row.
      drafter: The drafter's parameters for the next batch.
    """

    outputs: list[Output]
    drafter: Any


def check(model: Model, request: Request) -> None:
    """Checks a request at the edge, before anything is compiled.

    Raises:
      CapacityError: A prompt is empty, too long, or holds an id that the model lacks.
      ConfigError: A number of tokens is negative.
    """
    positions = model.config.max_positions
    rows = zip(request.prompts, request.max_new_tokens, strict=True)
    for row, (prompt, new) in enumerate(rows):
        if new < 0:
            raise ConfigError(
                f"cannot generate: max_new_tokens is {new}, expected 0 or more. "
                f"Correct --max_new_tokens."
            )
        if not len(prompt):
            raise CapacityError(
                f"cannot generate: prompt {row} is empty, expected at least one "
                f"token. Write a prompt; this tokenizer has no start token to put "
                f"in its place."
            )
        if len(prompt) + new > positions:
            raise CapacityError(
                f"cannot generate: prompt {row} has {len(prompt)} tokens, expected "
                f"at most {max(positions - new, 0)} (the model's {positions} "
                f"positions less {new} new tokens). Shorten it or lower "
                f"--max_new_tokens."
            )
        check_ids(prompt, model.config.vocabulary, row)


def check_ids(ids: Sequence[int], vocabulary: int, row: int) -> None:
    """Raises `CapacityError` when an id is outside the vocabulary."""
    for index, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise CapacityError(
                f"cannot embed: prompt {row} has id {token} at index {index}, "
                f"expected 0 to {vocabulary - 1}. Use the model's own tokenizer."
            )


def decode(
    model: Model,
    params: Params,
    request: Request,
    *,
    drafter: Drafter,
    watch: Watch | None = None,
) -> list[Output]:
    """Decodes a batch to its end; arguments as for `decode_chunks`."""
    run = decode_chunks(model, params, request, drafter=drafter, watch=watch)
    return drain(run).outputs


def drain(run: Generator[Snapshot, None, Decoded]) -> Decoded:
    """Runs `decode_chunks` to its end."""
    while True:
        try:
            next(run)
        except StopIteration as stop:
            return stop.value


def decode_chunks(
    model: Model,
    params: Params,
    request: Request,
    *,
    drafter: Drafter,
    watch: Watch | None = None,
    cache_dtype: Any = None,
) -> Generator[Snapshot, None, Decoded]:
    """Decodes a batch, handing out what there is after every dispatch.

    Args:
      model: The target.
      params: `{"target", "drafter"}`, and `"constraint"` if there is one.
      request: The batch.
      drafter: Bound drafter.
      watch: Looks at each snapshot and says which rows shall stop (stop strings).
      cache_dtype: Dtype of keys and values; the policy's when None.

    Yields:
      A snapshot after every dispatch.

    Returns:
      The outputs and what the drafter learned, as the generator's value.

    Raises:
      UserError: The request is wrong, or logits were not finite.
    """
    check(model, request)
    check_verifier(drafter, request.sampler)
    rope_length = _rope_length(model, request)
    lengths = [len(p) for p in request.prompts]
    shapes = shapes_for(lengths, max(request.max_new_tokens), drafter.depth)
    rungs = first_rungs(request.rungs, lengths, shapes.capacity, drafter.depth)
    committed, limit_B = _rows(request, shapes, rungs[0])
    sampler = committed.choice
    plan = () if drafter.prompt_hidden else request.shared
    prefix = None
    if plan:
        prefix = build_prefix(
            params["target"],
            plan,
            request.prompts,
            model=model,
            rows=shapes.rows,
            rope_length=rope_length,
            dtype=cache_dtype,
        )
    own = Sharing.of(plan, lengths, max(request.max_new_tokens), drafter.depth)
    begin = functools.partial(
        _begin,
        params,
        limit_B=limit_B,
        model=model,
        drafter=drafter,
        prefix=prefix,
        own=own,
        cache_dtype=cache_dtype,
        rope_length=rope_length,
    )
    state = begin(committed)
    eos_E = jnp.asarray(request.eos or (-1,), jnp.int32)
    snapshot = _snapshot(state, request)
    done = snapshot.done
    while not done.all():
        rows = _active(request, snapshot, done)
        steps = steps_within(rungs[0], rows, request.steps_per_call, drafter.depth)
        if not steps:
            held, rungs = [state], rungs[1:]
            del state
            state = grow(held, functools.partial(begin, committed, rungs[0]))
            continue
        state = advance(
            params,
            state,
            sampler,
            eos_E,
            jnp.int32(steps),
            model=model,
            drafter=drafter,
            rope_length=rope_length,
        )
        if not fetch(state.finite_B).all():
            raise_nonfinite(model, params["target"], state)
        snapshot = _snapshot(state, request)
        yield snapshot
        done = snapshot.done
        if watch is not None:
            stopped = np.asarray(watch(snapshot), bool)
            state, done = _stop(state, stopped), done | stopped
    learned = drafter.learned(params["drafter"], state.drafter)
    return Decoded(_outputs(state, request, own.shared), learned)


def _rope_length(model: Model, request: Request) -> int:
    """Returns the static length for rotations that change beyond a length."""
    original = model.config.rope_original_length
    if original is None:
        return 1
    rows = zip(request.prompts, request.max_new_tokens, strict=True)
    longest = max(len(p) + n for p, n in rows)
    return original if longest <= original else longest


def _rows(
    request: Request, shapes: Shapes, capacity: int
) -> tuple[Committed, jax.Array]:
    """Returns the prompts of the batch, filled up, and where each row stops."""
    lengths = [len(p) for p in request.prompts]
    fill = shapes.rows - len(lengths)
    tokens_BS = np.zeros((shapes.rows, capacity), np.int32)
    for row, prompt in enumerate(request.prompts):
        tokens_BS[row, : len(prompt)] = prompt
    length_B = np.asarray(lengths + [1] * fill, np.int32)
    limit_B = length_B + np.asarray([*request.max_new_tokens, *[0] * fill], np.int32)
    sampler = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], fill, axis=0)]),
        request.sampler,
    )
    committed = Committed(
        jnp.asarray(tokens_BS),
        jnp.asarray(length_B),
        row_keys(np.asarray([*request.seeds, *[0] * fill], np.uint32)),
        sampler,
        jnp.asarray(length_B),
    )
    return committed, jnp.asarray(limit_B)


def _begin(
    params: Params,
    committed: Committed,
    capacity: int | None = None,
    *,
    limit_B: jax.Array,
    prefix: SharedPrefix | None,
    own: Sharing,
    cache_dtype: Any,
    **options: Any,
) -> DecodeState:
    """Returns the state after the prompts, with their slots or with more."""
    rows, slots = committed.tokens_BS.shape
    if capacity is not None:
        tokens_BS = jnp.pad(committed.tokens_BS, ((0, 0), (0, capacity - slots)))
        committed = dataclasses.replace(committed, tokens_BS=tokens_BS)
    cache: Any = _empty_cache(
        params["target"],
        model=options["model"],
        rows=rows,
        capacity=own.slots(capacity or slots),
        dtype=cache_dtype,
    )
    if prefix is not None:
        cache = PrefixedCache(prefix, cache)
    options["chunk"] = own.shapes.chunk
    done_B = jnp.zeros((rows,), bool)
    return prefill(params, committed, cache, limit_B, done_B, **options)


@functools.partial(jax.jit, static_argnames=("model", "rows", "capacity", "dtype"))
def _empty_cache(
    params: Any, *, model: Model, rows: int, capacity: int, dtype: Any
) -> DenseCache:
    """Makes the cache on the devices where it will live."""
    return model.init_cache(params, rows, capacity, dtype)


def _stop(state: DecodeState, stopped: np.ndarray) -> DecodeState:
    """Returns the state with some rows of the request stopped."""
    if not stopped.any():
        return state
    fill = state.done_B.shape[0] - len(stopped)
    done_B = state.done_B | jnp.asarray(np.pad(stopped, (0, fill)))
    return dataclasses.replace(state, done_B=done_B)


def _active(
    request: Request, snapshot: Snapshot, done: np.ndarray
) -> list[tuple[int, int]]:
    """Returns length and limit of the rows that go on."""
    rows = zip(request.prompts, snapshot.token_ids, request.max_new_tokens, strict=True)
    return [
        (len(prompt) + len(ids), len(prompt) + new)
        for (prompt, ids, new), over in zip(rows, done, strict=True)
        if not over
    ]


def _snapshot(state: DecodeState, request: Request) -> Snapshot:
    tokens_BS, length_B, done_B = fetch(
        (state.committed.tokens_BS, state.committed.length_B, state.done_B)
    )
    token_ids = [
        tokens_BS[row, len(prompt) : length_B[row]].tolist()
        for row, prompt in enumerate(request.prompts)
    ]
    return Snapshot(token_ids, done_B[: len(token_ids)], tokens_BS.shape[1])


def _outputs(
    state: DecodeState, request: Request, shared: Sequence[int]
) -> list[Output]:
    snapshot = _snapshot(state, request)
    logprob_BS, stats = fetch((state.logprob_BS, state.stats))
    outputs = []
    for row, ids in enumerate(snapshot.token_ids):
        first = len(request.prompts[row])
        outputs.append(
            Output(
                ids,
                logprob_BS[row, first : first + len(ids)].tolist(),
                bool(ids) and ids[-1] in request.eos,
                {**row_stats(stats, row), "shared_tokens": shared[row]},
            )
        )
    return outputs


def row_stats(stats: Stats, row: int) -> dict[str, Any]:
    """Returns the counts of a row as plain numbers; see `Output`."""
    fields = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    inner = fields.pop("inner")
    return {
        **{name.rsplit("_", 1)[0]: x[row].tolist() for name, x in fields.items()},
        "draft_passes": {name: int(x[row, 0]) for name, x in inner.items()},
        "draft_tokens": {name: int(x[row, 1]) for name, x in inner.items()},
    }


def raise_nonfinite(model: Model, params: Any, state: DecodeState) -> None:
    """Raises `UserError` that names the first row and layer that are not finite."""
    row = int(np.argmin(fetch(state.finite_B)))
    length = int(fetch(state.committed.length_B)[row])
    tokens_BT = state.committed.tokens_BS[row : row + 1, : length - 1]
    where = locate_nonfinite(model, params, tokens_BT)
    raise UserError(
        f"cannot decode: logits of row {row} at position {length - 1} are not finite: "
        f"{where} gives the first such value, expected finite numbers. Check the "
        f"weights, or compute in float32 with --dtype=float32."
    )


def locate_nonfinite(model: Model, params: Any, tokens_BT: jax.Array) -> str:
    """Finds where values stop being finite, by re-running halves of the layers.

    Args:
      model: The model.
      params: Its parameters.
      tokens_BT: The tokens that led to the values.

    Returns:
      `"the embedding"`, `"layer 3 of 0-11"` or `"the head"`.
    """
    context = Context.start(tokens_BT)
    # The parameters are an argument: closed over, they would be copied as constants.
    layers = jax.jit(
        lambda params, x, low, high: model.run_layers(params, x, context, low, high)[0],
        static_argnums=(2, 3),
    )

    def run(x: jax.Array, low: int, high: int) -> jax.Array:
        return layers(params, x, low, high)

    x = model.embed(params, tokens_BT, context.positions_BT)
    if not bool(jnp.isfinite(x).all()):
        return "the embedding"
    low, high = 0, model.config.num_layers
    if bool(jnp.isfinite(run(x, low, high)).all()):
        return "the head"
    while high - low > 1:
        middle = (low + high) // 2
        half = run(x, low, middle)
        if bool(jnp.isfinite(half).all()):
            low, x = middle, half
        else:
            high = middle
    return f"layer {low} of 0-{model.config.num_layers - 1}"

"""Which prompts begin alike, and the keys and values of what they share.

Planning is plain Python over token ids: a forest whose nodes are stretches that several
rows have in common. Building runs every stretch once, level by level, each on top of
those above it.

Letters: B rows, U users of a level, R most rows of a user, S slots, P slots of a level.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.attention.cache import DenseCache
from jaxllm.attention.shared_prefix import PrefixedCache, PrefixLevel, SharedPrefix
from jaxllm.decoding.buckets import (
    CHUNK,
    Shapes,
    batch_bucket,
    prompt_bucket,
    shapes_for,
)
from jaxllm.decoding.feed import Feeder
from jaxllm.models.freeze import Model

__all__ = ["SharedStretch", "Sharing", "build_prefix", "plan_sharing"]

LEAST_TOKENS: Mapping[int, int] = {2: 512, 3: 128, 4: 64}
"""Shortest stretch worth sharing, by its rows. On two CPU cores two rows gain from 1024
tokens and lose with 256, four rows gain from 64 (`benchmarks/shared_prefix.py`)."""
MOST_LEVELS = 3
# A level whose padding makes it this much larger than its content is split.
_WASTE = 2.0


@dataclasses.dataclass(frozen=True)
class SharedStretch:
    """Tokens that several rows have in common.

    Attributes:
      rows: Indices of the rows, in order.
      start: Position of the first token.
      stop: Position behind the last.
      parent: Index of the stretch before it; -1 where it begins the prompts.
      level: How many stretches stand before it.
    """

    rows: tuple[int, ...]
    start: int
    stop: int
    parent: int = -1
    level: int = 0


def plan_sharing(
    prompts: Sequence[Sequence[int]],
    *,
    least_tokens: Mapping[int, int] = LEAST_TOKENS,
    most_levels: int = MOST_LEVELS,
) -> tuple[SharedStretch, ...]:
    """Finds what prompts have in common, as a forest of stretches.

    The last two tokens of a prompt are its own: the pending one, and one before it
    whose hidden state drafters read.

    Args:
      prompts: Token ids of each row.
      least_tokens: By the rows of a stretch (or the next smaller entry) its least
        tokens; shorter ones are left to the rows, or to the stretch below.
      most_levels: Stretches of one row.

    Returns:
      Parents before children; empty where nothing is worth sharing.
    """
    cut = [np.asarray(prompt[: max(len(prompt) - 2, 0)]) for prompt in prompts]
    found: list[SharedStretch] = []

    def grow(rows: list[int], start: int, depth: int, parent: int, level: int) -> None:
        """Adds what rows share that agree up to `depth`, `start` of it added before."""
        if len(rows) < min(least_tokens) or level == most_levels:
            return
        stop = _agreement([cut[row] for row in rows], depth)
        if stop - start >= least_tokens[max(n for n in least_tokens if n <= len(rows))]:
            found.append(SharedStretch(tuple(rows), start, stop, parent, level))
            start, parent, level = stop, len(found) - 1, level + 1
        branches: dict[int, list[int]] = {}
        for row in rows:
            if len(cut[row]) > stop:
                branches.setdefault(int(cut[row][stop]), []).append(row)
        for branch in branches.values():
            grow(branch, start, stop + 1, parent, level)

    # Not one call: prompts that differ in their first token share nothing.
    grow(list(range(len(cut))), 0, 0, -1, 0)
    return tuple(found)


def _agreement(rows: list[np.ndarray], depth: int) -> int:
    """Returns how many first tokens all rows share; they are known to share `depth`."""
    length = min(len(row) for row in rows)
    first = rows[0][depth:length]
    for row in rows[1:]:
        differs = first != row[depth : depth + len(first)]
        if differs.any():
            first = first[: int(np.argmax(differs))]
    return depth + len(first)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The sizes of what the rows of a batch have of their own.

    Attributes:
      shapes: Of the rows without what they share.
      shared: Tokens of each row that are not its own.
    """

    shapes: Shapes
    shared: tuple[int, ...]

    @classmethod
    def of(
        cls,
        plan: Sequence[SharedStretch],
        prompt_lengths: Sequence[int],
        max_new_tokens: int,
        depth: int,
    ) -> "Sharing":
        """Returns the sizes; arguments as for `plan_sharing` and `shapes_for`."""
        shared = [0] * len(prompt_lengths)
        for stretch in plan:
            for row in stretch.rows:
                shared[row] = max(shared[row], stretch.stop)
        own = [n - m for n, m in zip(prompt_lengths, shared, strict=True)]
        return cls(shapes_for(own, max_new_tokens, depth), tuple(shared))

    def slots(self, capacity: int) -> int:
        """Returns a row's own slots where its tokens have `capacity`."""
        return min(self.shapes.capacity, capacity - min(self.shared))


def build_prefix(
    params: Any,
    plan: Sequence[SharedStretch],
    prompts: Sequence[Sequence[int]],
    *,
    model: Model,
    rows: int,
    rope_length: int,
    dtype: Any = None,
) -> SharedPrefix:
    """Runs every stretch of a plan once.

    Args:
      params: Of the model.
      plan: What `plan_sharing` found in the prompts; not empty.
      prompts: Token ids of each row.
      model: The model.
      rows: B, the prompts and what fills the batch up.
      rope_length: As in `Context`.
      dtype: Dtype of keys and values; the policy's when None.
    """
    built: list[tuple[list[int], PrefixLevel]] = []
    for group in _levels(plan):
        chains = [_ancestors(plan, index) for index in group]
        users = batch_bucket(len(group))
        above = _prefix(built, chains, users)
        level = _run_level(
            params,
            [plan[i] for i in group],
            prompts,
            above,
            users,
            model=model,
            rope_length=rope_length,
            dtype=dtype,
        )
        built.append((group, level))
    of_rows = [
        {i for i, stretch in enumerate(plan) if row in stretch.rows}
        for row in range(len(prompts))
    ]
    return _prefix(built, of_rows, rows)


def _levels(plan: Sequence[SharedStretch]) -> list[list[int]]:
    """Returns the stretches that run together; what they stand on comes before.

    The arrays of a level are as long as its longest stretch and as wide as its most
    rows; where that is mostly padding, stretches of like size run together.
    """
    levels: dict[int, list[int]] = {}
    for index, stretch in enumerate(plan):
        levels.setdefault(stretch.level, []).append(index)
    groups = []
    for _, members in sorted(levels.items()):
        lengths = [plan[i].stop - plan[i].start for i in members]
        counts = [len(plan[i].rows) for i in members]
        content = sum(n * c for n, c in zip(lengths, counts, strict=True))
        padded = len(members) * max(lengths) * max(counts)
        if padded <= _WASTE * content:
            groups.append(members)
            continue
        alike: dict[tuple[int, int], list[int]] = {}
        for i, length, count in zip(members, lengths, counts, strict=True):
            key = (prompt_bucket(length), batch_bucket(count))
            alike.setdefault(key, []).append(i)
        groups.extend(group for _, group in sorted(alike.items()))
    return groups


def _ancestors(plan: Sequence[SharedStretch], index: int) -> set[int]:
    found = set()
    while (index := plan[index].parent) >= 0:
        found.add(index)
    return found


def _prefix(
    built: list[tuple[list[int], PrefixLevel]], chains: list[set[int]], rows: int
) -> SharedPrefix:
    """Returns the levels as rows read them; `chains` holds each row's stretches."""
    levels = []
    for group, level in built:
        readers = [[row for row, c in enumerate(chains) if i in c] for i in group]
        most = max(map(len, readers))
        if not most:
            continue
        rows_UR = None
        if len(group) > 1 or most < len(chains):
            shape = (batch_bucket(len(group)), batch_bucket(most))
            table = np.full(shape, rows, np.int32)
            for user, members in enumerate(readers):
                table[user, : len(members)] = members
            rows_UR = jnp.asarray(table)
        levels.append(dataclasses.replace(level, rows_UR=rows_UR))
    return SharedPrefix.make(tuple(levels), rows)


def _run_level(
    params: Any,
    stretches: list[SharedStretch],
    prompts: Sequence[Sequence[int]],
    above: SharedPrefix,
    users: int,
    *,
    model: Model,
    rope_length: int,
    dtype: Any,
) -> PrefixLevel:
    """Runs some stretches as rows of one batch, each on top of its ancestors."""
    slots = prompt_bucket(max(x.stop - x.start for x in stretches))
    tokens_US = np.zeros((users, prompt_bucket(max(x.stop for x in stretches))))
    start_U, stop_U = np.zeros((2, users), np.int32)
    for user, stretch in enumerate(stretches):
        tokens_US[user, : stretch.stop] = prompts[stretch.rows[0]][: stretch.stop]
        start_U[user], stop_U[user] = stretch.start, stretch.stop
    filled = _fill(
        params,
        jnp.asarray(tokens_US, jnp.int32),
        above,
        jnp.asarray(stop_U),
        model=model,
        slots=slots,
        rope_length=rope_length,
        dtype=dtype,
    )
    return PrefixLevel(
        filled.k, filled.v, jnp.asarray(start_U), jnp.asarray(stop_U - start_U)
    )


@functools.partial(jax.jit, static_argnames=("model", "slots", "rope_length", "dtype"))
def _fill(
    params: Any,
    tokens_US: Array,
    above: SharedPrefix,
    stop_U: Array,
    *,
    model: Model,
    slots: int,
    rope_length: int,
    dtype: Any,
) -> DenseCache:
    """Returns the keys and values of tokens that stand behind a prefix."""
    own = model.init_cache(params, tokens_US.shape[0], slots, dtype)
    cache = PrefixedCache(above, own)
    feeder = Feeder(
        model=model,
        chunk=min(slots, CHUNK),
        rope_length=rope_length or tokens_US.shape[1],
    )
    grown, _ = feeder.run(params, tokens_US, cache, stop_U, empty=cache.starts_empty)
    return grown.suffix

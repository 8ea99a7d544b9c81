"""A regular language as a table on the device: no host call in the loop.

Tokens that lead from every state to the same one share a column, so the table is small
for large vocabularies too.

Letters: B rows, V vocabulary, Q states between tokens, C columns (kinds of tokens), S
states of the automaton over bytes, U walks over it that some bytes make.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.checkpoints.files import quote
from jaxllm.core.errors import CapacityError, ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.constraints.automaton import (
    compile_bytes,
    distinct_rows,
    live_states,
    parse_pattern,
)

__all__ = ["RegularConstraint", "compile_regex", "compile_regex_reference"]

TABLE_BYTES = 2**28
"""Largest table that is made unless more is asked for."""

_WALK_STEPS = 2**22


@pytree_dataclass
class RegularConstraint:
    """The text is a word of a regular language; see `compile_regex`.

    Attributes:
      next_QC: int32, the state after a token of each column; -1 where no sequence of
        tokens goes on to a word. State 0 is the first, and nothing follows the last.
      class_V: int32, the column of each token.
      accepting_Q: Whether the text may end here.
    """

    next_QC: Array
    class_V: Array
    accepting_Q: Array

    def init(self, rows: int) -> Array:
        """Returns int32 `[B]`, the states of rows that have written nothing."""
        return jnp.zeros((rows,), jnp.int32)

    def allowed(self, state_B: Array) -> Array:
        """Returns bool `[B, V]`, the tokens that may come next."""
        return (self.next_QC[state_B] >= 0)[:, self.class_V]

    def advance(self, state_B: Array, token_B: Array) -> Array:
        """Returns the states after a token; the last one if it is not allowed."""
        # There nothing is allowed, so what a draft has behind it is left to the model.
        after_B = self.next_QC[state_B, self.class_V[token_B]]
        return jnp.where(after_B < 0, self.next_QC.shape[0] - 1, after_B)

    def accepting(self, state_B: Array) -> Array:
        """Returns bool `[B]`, whether the text may end here."""
        return self.accepting_Q[state_B]


def compile_regex(
    pattern: str, vocabulary: Sequence[bytes], *, limit_bytes: int = TABLE_BYTES
) -> RegularConstraint:
    r"""Compiles a regular expression for a vocabulary.

    Every way to split a word into tokens is allowed, and a token only where some
    sequence of tokens behind it ends in a word.

    Args:
      pattern: As of Python's `re`, matched whole: no `^`, no `$`, no lookaround, no
        references to groups. `\w`, `\d`, `\s` mean ASCII, as with `re.ASCII`.
      vocabulary: The bytes of every token, as `token_bytes` finds them; empty for
        tokens that are never part of a text.
      limit_bytes: Most bytes that the table may take.

    Returns:
      The constraint. Sizes of its table are powers of two, so that patterns of a like
      size share what is compiled for them.

    Raises:
      ConfigError: The pattern cannot be read, or this vocabulary spells no word of it.
      CapacityError: The table would be too large.

    Source: Efficient Guided Generation for Large Language Models (arXiv 2307.09702)
      section 3, for the table from states and tokens to states.

    Differs from the paper: states step by bytes, since tokens hold parts of characters;
      tokens share columns; states from which tokens reach no end are taken out.
    """
    automaton = compile_bytes(pattern)
    walks_US, walk_V = _walk_tokens(automaton.next_SX, vocabulary, pattern, limit_bytes)
    # The walk of no bytes at all is there too; whether a token makes it is known below.
    used, class_V = np.unique(np.append(walk_V, -1), return_inverse=True)
    next_SC = np.full((len(automaton.next_SX), len(used)), -1, np.int32)
    next_SC[:, 1:] = walks_US[used[1:]].T
    live_S = live_states(next_SC, automaton.accepting_S)
    if not live_S[0]:
        raise ConfigError(
            f"cannot constrain: pattern {quote(pattern)}: no sequence of this "
            f"vocabulary's tokens spells a match, expected at least one. Correct the "
            f"pattern, or use a tokenizer that has its characters."
        )
    number_S = np.append(np.where(live_S, np.cumsum(live_S) - 1, -1), -1)
    columns_CQ, column_C = distinct_rows(
        np.ascontiguousarray(number_S[next_SC[live_S]].T.astype(np.int32))
    )
    shape = (_rounded(columns_CQ.shape[1] + 1), _rounded(len(columns_CQ)))
    _check_size(pattern, *shape, limit_bytes)
    next_QC = np.full(shape, -1, np.int32)
    next_QC[: columns_CQ.shape[1], : len(columns_CQ)] = columns_CQ.T
    accepting_Q = np.zeros(shape[0], bool)
    accepting_Q[: columns_CQ.shape[1]] = automaton.accepting_S[live_S]
    return RegularConstraint(
        jnp.asarray(next_QC),
        jnp.asarray(column_C[class_V[:-1]], jnp.int32),
        jnp.asarray(accepting_Q),
    )


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _check_size(pattern: str, states: int, columns: int, limit_bytes: int) -> None:
    size = 4 * states * columns
    if size > limit_bytes:
        raise CapacityError(
            f"cannot constrain: pattern {quote(pattern)}: takes {size / 1e6:.4g} MB "
            f"({states} states, {columns} kinds of tokens), expected at most "
            f"{limit_bytes / 1e6:.4g} MB. Shorten its repetitions, or write it as a "
            f"grammar, which needs no table: lark:FILE."
        )


def _walk_tokens(
    next_SX: np.ndarray, vocabulary: Sequence[bytes], pattern: str, limit_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Walks the bytes of all tokens through the automaton, from all states at once.

    Byte by byte: tokens whose first bytes make the same walk go on together.

    Args:
      next_SX: int32 `[S, 256]`.
      vocabulary: Bytes of each token.
      pattern: For a message.
      limit_bytes: Most bytes that the walks may take.

    Returns:
      int32 `[U, S]`, where each walk leads to from each state, and int64 `[V]`, the
      walk of each token; -1 where it leads nowhere at all.
    """
    states = len(next_SX)
    # A last row for -1, from which nothing goes on.
    step = np.concatenate([next_SX, np.full((1, 256), -1, np.int32)])
    length_V = np.array([len(content) for content in vocabulary])
    start_V = np.cumsum(length_V) - length_V
    content = np.frombuffer(b"".join(vocabulary), np.uint8)
    walks = [np.arange(states, dtype=np.int32)]
    known = {walks[0].tobytes(): 0, np.full(states, -1, np.int32).tobytes(): -1}
    walk_V = np.where(length_V > 0, 0, -1)
    for depth in range(max(length_V, default=0)):
        active = np.flatnonzero((length_V > depth) & (walk_V >= 0))
        byte = content[start_V[active] + depth]
        pairs, pair = np.unique(walk_V[active] * 256 + byte, return_inverse=True)
        found = np.empty(len(pairs), np.int64)
        block = max(1, _WALK_STEPS // states)
        for first in range(0, len(pairs), block):
            before = pairs[first : first + block]
            walked = np.stack([walks[walk] for walk in before // 256])
            after = step[walked, (before % 256)[:, None]]
            for at, row in enumerate(after):
                walk = known.setdefault(row.tobytes(), len(walks))
                if walk == len(walks):
                    walks.append(row)
                found[first + at] = walk
            _check_size(pattern, states, len(walks), limit_bytes)
        walk_V[active] = found[pair]
    return np.stack(walks), walk_V


def compile_regex_reference(
    pattern: str, vocabulary: Sequence[bytes]
) -> tuple[list[dict[int, int]], list[bool]]:
    """Compiles a pattern one token and one character at a time; the oracle.

    Arguments as for `compile_regex`.

    Returns:
      For every state the allowed tokens and the states behind them, state 0 being the
      first; and whether each state accepts. Both empty if no word can be spelled.
    """
    fsm = parse_pattern(pattern)
    Place = tuple[Any, bytes]  # a state, and the bytes of a character begun

    def read(place: Place, content: bytes) -> Place | None:
        state, begun = place
        for byte in content:
            begun += bytes([byte])
            try:
                sign = begun.decode()
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    return None
                continue
            after = fsm.map.get(state, {}).get(fsm.alphabet[sign])
            if after is None:
                return None
            state, begun = after, b""
        return state, begun

    first: Place = (fsm.initial, b"")
    places, moves = [first], []
    for place in places:  # which grows as it is read
        found = {}
        for token, content in enumerate(vocabulary):
            after = read(place, content) if content else None
            if after is not None:
                found[token] = after
                if after not in places:
                    places.append(after)
        moves.append(found)
    alive = {p for p in places if p[0] in fsm.finals and not p[1]}
    growing = True
    while growing:
        more = {
            place
            for place, found in zip(places, moves, strict=True)
            if alive.intersection(found.values())
        }
        growing = not more <= alive
        alive |= more
    if first not in alive:
        return [], []
    kept = [place for place in places if place in alive]
    table = [
        {t: kept.index(p) for t, p in moves[places.index(place)].items() if p in alive}
        for place in kept
    ]
    return table, [place[0] in fsm.finals and not place[1] for place in kept]

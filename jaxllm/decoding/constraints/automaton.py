"""Regular expressions as automata that read the bytes of UTF-8.

A token may hold part of a character, so what follows tokens has to step by bytes.

Letters: S states, X any number of symbols, Q states between characters, K kinds of
characters that a pattern tells apart.
"""

import dataclasses
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.checkpoints.files import first_line, quote
from jaxllm.core.errors import ConfigError
from jaxllm.decoding.constraints.packages import optional_package

if TYPE_CHECKING:
    import interegular

__all__ = [
    "ByteAutomaton",
    "compile_bytes",
    "distinct_rows",
    "live_states",
    "parse_pattern",
]

_CODE_POINTS = 0x110000
_BLOCK = 64  # what one continuation byte tells apart

# One sign of a pattern: what a backslash makes, a class, the opening of a group, a
# quantifier with what follows it at once.
_SIGN = re.compile(
    r"""\\. | \[\^?\]?(?:\\.|[^\]\\])*\] | \(\?<?[=!#] | (?:[*+?]|\{[\d,]*\})\+?
    | [\^$] | .""",
    re.VERBOSE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class ByteAutomaton:
    """A deterministic automaton over bytes; state 0 is the first.

    Attributes:
      next_SX: int32 `[S, 256]`; -1 where no text goes on to a match.
      accepting_S: Whether the text may end here.
    """

    next_SX: np.ndarray
    accepting_S: np.ndarray


def parse_pattern(pattern: str) -> "interegular.FSM":
    """Turns a pattern into an automaton over characters.

    Args:
      pattern: As of Python's `re`, matched whole, with the classes of `re.ASCII`.

    Raises:
      ConfigError: It is no pattern, or uses what no automaton does (groups that are
        referred to, lookaround), or what is read differently here than by `re`.
    """
    interegular = optional_package("interegular")

    def refuse(found: str, action: str) -> ConfigError:
        return ConfigError(
            f"cannot constrain: pattern {quote(pattern)}: {found}, expected a regular "
            f"expression that is matched whole. {action}"
        )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as cause:
        raise refuse(first_line(cause), "Correct the pattern.") from None
    for sign in _SIGN.findall(pattern):
        found = _misread(sign)
        if found is not None:
            raise refuse(f"has {quote(sign)}, {found[0]}", found[1])
    try:
        return interegular.parse_pattern(pattern).to_fsm()
    except (interegular.Unsupported, interegular.InvalidSyntax) as cause:
        reason = f" ({first_line(cause)})" if str(cause) else ""
        raise refuse(
            f"has what no automaton can do, or writes it in an unusual way{reason}",
            "Put a backslash before signs that stand for themselves, or write it "
            "without what is named here.",
        ) from None


def _misread(sign: str) -> tuple[str, str] | None:
    """Says what is wrong with a sign that `interegular` reads otherwise than `re`."""
    if sign in ("^", "$"):
        return "which only repeats that all of it has to match", "Leave it out."
    if sign == "(?#":
        return "a comment", "Leave it out."
    if sign.startswith("(?"):
        return "which looks around", "Write out what may stand there."
    if sign == "{}":
        return "which repeats nothing", r"Write \{\} for the signs themselves."
    if len(sign) > 1 and sign[0] in "*+?{" and sign[-1] == "+":
        return "which gives nothing back", "Leave out the second sign."
    if sign.startswith(("[]", "[^]")):
        return "a class that begins with its end", r"Write \] inside the class."
    if sign[0] == "[" and len(re.findall(r"\\[DSW]", sign.replace(r"\\", ""))) > 1:
        return "a class with two complements", "Write it as alternatives."
    return None


def live_states(next_SX: np.ndarray, accepting_S: np.ndarray) -> np.ndarray:
    """Returns which states lie on a way from state 0 to an accepting one.

    Args:
      next_SX: int32 `[S, X]`, the state after each symbol; -1 for none.
      accepting_S: bool.

    Returns:
      bool `[S]`.
    """
    after = [np.unique(row[row >= 0]) for row in next_SX]
    reached_S = _closure([0], after)
    target = np.concatenate([*after, np.zeros(0, np.int32)])
    source = np.repeat(np.arange(len(after)), [len(row) for row in after])
    order = np.argsort(target, kind="stable")
    cuts = np.searchsorted(target[order], np.arange(1, len(after)))
    before = np.split(source[order], cuts)
    return reached_S & _closure(np.flatnonzero(reached_S & accepting_S), before)


def _closure(first: "np.ndarray | list[int]", steps: list[np.ndarray]) -> np.ndarray:
    found_S = np.zeros(len(steps), bool)
    found_S[first] = True
    waiting = list(first)
    while waiting:
        fresh = steps[waiting.pop()]
        fresh = fresh[~found_S[fresh]]
        found_S[fresh] = True
        waiting.extend(fresh.tolist())
    return found_S


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct rows of a matrix, and which of them each row is."""
    known: dict[bytes, int] = {}
    which = [known.setdefault(row.tobytes(), len(known)) for row in rows]
    found = np.frombuffer(b"".join(known), rows.dtype)
    return found.reshape(len(known), rows.shape[1]), np.asarray(which, np.int64)


def compile_bytes(pattern: str) -> ByteAutomaton:
    """Compiles a pattern to an automaton over the bytes of UTF-8.

    Args:
      pattern: As for `parse_pattern`.

    Raises:
      ConfigError: As for `parse_pattern`.
    """
    next_QK, accepting_Q, kinds = _character_table(parse_pattern(pattern))
    live_Q = live_states(next_QK, accepting_Q)
    dead = (next_QK < 0) | ~live_Q[next_QK]
    return _read_bytes(np.where(dead, -1, next_QK), accepting_Q, kinds)


def _character_table(
    fsm: "interegular.FSM",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns transitions `[Q, K]`, accepting states, and every code point's kind."""
    states = {s: i for i, s in enumerate([fsm.initial, *fsm.states - {fsm.initial}])}
    groups = fsm.alphabet.by_transition
    columns = {key: column for column, key in enumerate(groups)}
    # One column more, in which nothing goes on: what is no character has it.
    next_QK = np.full((len(states), len(columns) + 1), -1, np.int32)
    for state, row in fsm.map.items():
        for key, after in row.items():
            next_QK[states[state], columns[key]] = states[after]
    accepting_Q = np.zeros(len(states), bool)
    accepting_Q[[states[s] for s in fsm.finals]] = True
    kinds = np.full(_CODE_POINTS, len(columns), np.int32)
    for key, symbols in groups.items():
        if not all(isinstance(symbol, str) for symbol in symbols):
            kinds[:] = columns[key]  # the symbol for all that is not listed
    for key, symbols in groups.items():
        signs = [s for s in symbols if isinstance(s, str) and len(s) == 1]
        kinds[[ord(sign) for sign in signs]] = columns[key]
    kinds[0xD800:0xE000] = len(columns)  # surrogates, which UTF-8 does not encode
    return next_QK, accepting_Q, kinds


def _read_bytes(
    next_QK: np.ndarray, accepting_Q: np.ndarray, kinds: np.ndarray
) -> ByteAutomaton:
    """Puts states inside characters between those between characters.

    A state inside a character is what its 64 continuation bytes lead to: two that lead
    to the same are one. They are made from the last byte to the first.
    """
    states = len(next_QK)
    tables = [np.full((states, 256), -1, np.int32)]

    def inside(after_QX: np.ndarray, blocks_X64: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns states `[Q, X]` that read a byte more, and the block of each row."""
        nonlocal states
        unique_X64, block_X = distinct_rows(blocks_X64)
        rows, row = distinct_rows(after_QX[:, unique_X64].reshape(-1, _BLOCK))
        alive = (rows >= 0).any(axis=1)
        number = np.where(alive, states + np.cumsum(alive) - 1, -1)
        states += int(alive.sum())
        table = np.full((int(alive.sum()), 256), -1, np.int32)
        table[:, 0x80:0xC0] = rows[alive]
        tables.append(table)
        found = number[row.reshape(len(after_QX), -1)]
        # A last column for what is not written with this many bytes.
        none_Q1 = np.full((len(after_QX), 1), -1)
        return np.concatenate([found, none_Q1], axis=1), block_X

    code = np.arange(_CODE_POINTS)
    wide = np.where(code < 0x80, next_QK.shape[1] - 1, kinds)
    last_QX, last = inside(next_QK, wide.reshape(-1, _BLOCK))
    wide = np.where(code[::_BLOCK] < 0x800, last_QX.shape[1] - 1, last)
    middle_QX, middle = inside(last_QX, wide.reshape(-1, _BLOCK))
    wide = np.full(5 * _BLOCK, middle_QX.shape[1] - 1)
    wide[16 : len(middle)] = middle[16:]
    first_QX, first = inside(middle_QX, wide.reshape(-1, _BLOCK))
    tables[0][:, :0x80] = next_QK[:, kinds[:0x80]]
    tables[0][:, 0xC2:0xE0] = last_QX[:, last[2:32]]
    tables[0][:, 0xE0:0xF0] = middle_QX[:, middle[:16]]
    tables[0][:, 0xF0:0xF5] = first_QX[:, first]
    next_SX = np.concatenate(tables)
    accepting_S = np.zeros(len(next_SX), bool)
    accepting_S[: len(accepting_Q)] = accepting_Q
    return ByteAutomaton(next_SX, accepting_S)

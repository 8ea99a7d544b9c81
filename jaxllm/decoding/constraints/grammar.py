"""JSON schemas and context-free grammars, matched on the host by `llguidance`.

The loop asks the host once a step, for the masks of all nodes of all rows.

Letters: B rows, M draft nodes, V vocabulary, K tokens of a text, W words of 32 bits.
"""

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.checkpoints.files import first_line, quote
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.core.pytree import pytree_dataclass, static
from jaxllm.decoding.constraints.constraint import walk_states
from jaxllm.decoding.constraints.packages import optional_package
from jaxllm.decoding.protocol import Draft

__all__ = ["Grammar", "GrammarConstraint", "Written", "compile_grammar"]

# At most one space behind a comma or a colon: with as much white space as JSON allows,
# a model can go on with it for ever.
_JSON_SPACE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}

CAPACITY = 1024
"""Tokens of a text that the state has room for unless more is asked for."""


@pytree_dataclass
class Written:
    """What rows have written since their prompts.

    Attributes:
      tokens_BK: int32, left aligned.
      count_B: int32.
    """

    tokens_BK: Array
    count_B: Array


@pytree_dataclass
class GrammarConstraint:
    """The text obeys a grammar; see `compile_grammar`.

    The state is the text itself, so that what the host answers depends on nothing else.
    A token may lead where a vocabulary without some bytes has none to go on with: the
    row ends there. A vocabulary with all 256 bytes has no such place.

    Attributes:
      grammar: Matches on the host.
      capacity: K. A row ends with the first token that there is no room for.
    """

    grammar: "Grammar" = static()
    capacity: int = static(default=CAPACITY)

    def init(self, rows: int) -> Written:
        """Returns the state of rows that have written nothing."""
        tokens_BK = jnp.zeros((rows, self.capacity), jnp.int32)
        return Written(tokens_BK, jnp.zeros((rows,), jnp.int32))

    def advance(self, state: Written, token_B: Array) -> Written:
        """Returns the state after a token."""
        row_B = jnp.arange(token_B.shape[0])
        at = (row_B, state.count_B)
        return Written(
            state.tokens_BK.at[at].set(token_B, mode="drop"), state.count_B + 1
        )

    def allowed(self, state: Written) -> Array:
        """Returns bool `[B, V]`, the tokens that may come next."""
        return self.walk(state, _root(state))[0][:, 0]

    def accepting(self, state: Written) -> Array:
        """Returns bool `[B]`, whether the text may end here."""
        return self.walk(state, _root(state))[1][:, 0]

    def walk(self, state: Written, draft: Draft) -> tuple[Array, Array, Written]:
        """Walks a draft with one call of the host.

        Args:
          state: Behind the pending token.
          draft: Chain or tree.

        Returns:
          bool `[B, M, V]`, bool `[B, M]` and the states at every node. Behind a node
          that the grammar does not allow nothing is.
        """
        rows, nodes = draft.tokens_BM.shape
        parents_BM = draft.parents_BM
        if parents_BM is None:
            chain = jnp.arange(nodes, dtype=jnp.int32) - 1
            parents_BM = jnp.broadcast_to(chain, (rows, nodes))
        bits_BMW = jax.pure_callback(
            self.grammar.masks,
            jax.ShapeDtypeStruct((rows, nodes, self.grammar.words), jnp.uint32),
            state.tokens_BK,
            state.count_B,
            draft.tokens_BM,
            parents_BM,
            draft.valid_BM,
        )
        bit_32 = jnp.arange(32, dtype=jnp.uint32)
        bits = (bits_BMW[..., None] >> bit_32) & 1
        V = self.grammar.vocabulary
        bits_BMX = bits.reshape(rows, nodes, -1)[..., : V + 1].astype(bool)
        states = walk_states(self, state, draft)
        return bits_BMX[..., :V], bits_BMX[..., V], states


def _root(state: Written) -> Draft:
    pending_B1 = jnp.zeros((state.count_B.shape[0], 1), jnp.int32)
    return Draft(pending_B1, jnp.ones_like(pending_B1, bool))


class Grammar:
    """A grammar for a vocabulary, and the matchers of the rows that use it.

    Two are equal if they were made of the same things; a compiled loop that has one
    serves the other. Matchers remember where their row stood, which saves time and
    changes no answer.

    Attributes:
      vocabulary: V; the bit of an end token of its own follows those of the tokens.
      words: W.
    """

    def __init__(
        self,
        source: str,
        vocabulary: Sequence[bytes],
        encode: Callable[[str], list[int]] | None = None,
    ):
        """Compiles a grammar.

        Args:
          source: As `llguidance` writes grammars.
          vocabulary: The bytes of every token.
          encode: The tokenizer, for texts that the grammar leaves no choice about:
            they are written as it would. The longest tokens first when None.

        Raises:
          ConfigError: The grammar is wrong, or this vocabulary spells no text of it.
        """
        llguidance = optional_package("llguidance")
        self.vocabulary = len(vocabulary)
        self.words = -(-(self.vocabulary + 1) // 32)
        digest = hashlib.sha256(repr(list(vocabulary)).encode()).hexdigest()
        self._key = (source, digest, encode is None)
        spelling = llguidance.TokenizerWrapper(_Spelling(vocabulary, encode))
        self._tokenizer = llguidance.LLTokenizer(
            spelling, n_vocab=self.vocabulary + 1, eos_token=self.vocabulary
        )
        error = llguidance.LLMatcher.validate_grammar(source, self._tokenizer)
        if error and not error.startswith("WARNING"):
            raise ConfigError(
                f"cannot constrain: grammar: {first_line(ValueError(error))}, expected "
                f"one that llguidance reads. Correct it."
            )
        self._start = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        self._rows: list[_Row] = []
        self._lock = threading.Lock()
        bits = np.zeros((1, self.words), np.int32)
        _Row(self._start).fill([], bits, 0)
        if not bits.any():
            raise ConfigError(
                f"cannot constrain: grammar {quote(source)}: no sequence of this "
                f"vocabulary's tokens begins a text, expected at least one. Correct "
                f"the grammar, or use a tokenizer that has its characters."
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grammar) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def masks(
        self,
        tokens_BK: Array,
        count_B: Array,
        tokens_BM: Array,
        parents_BM: Array,
        valid_BM: Array,
    ) -> np.ndarray:
        """Returns which tokens may follow every node: the host's side of `walk`.

        Args:
          tokens_BK: int32, what the rows have written.
          count_B: int32, how much of it there is.
          tokens_BM: int32 draft; node 0 is written already.
          parents_BM: int32.
          valid_BM: bool.

        Returns:
          uint32 `[B, M, W]`: bit v for token v, bit V for the end. All zero where a row
          has written what the grammar does not allow, or more than there is room for.
        """
        rows, nodes = np.shape(tokens_BM)
        bits_BMW = np.zeros((rows, nodes, self.words), np.int32)
        counts = np.asarray(count_B).tolist()
        texts, drafts = np.asarray(tokens_BK), np.asarray(tokens_BM).tolist()
        parents = np.asarray(parents_BM).tolist()
        valid = np.asarray(valid_BM).tolist()
        with self._lock:
            while len(self._rows) < rows:
                self._rows.append(_Row(self._start))
            for row, count in enumerate(counts):
                if count > texts.shape[1]:
                    continue
                children: list[list[int]] = [[] for _ in range(nodes)]
                for node in range(1, nodes):
                    if valid[row][node]:
                        children[parents[row][node]].append(node)
                text = texts[row, :count].tolist()
                self._visit(row, text, 0, children, drafts[row], bits_BMW[row])
        return bits_BMW.view(np.uint32)

    def _visit(
        self,
        row: int,
        text: list[int],
        node: int,
        children: list[list[int]],
        tokens: list[int],
        bits_MW: np.ndarray,
    ) -> None:
        """Fills in the masks of a node, behind a text, and of all below it."""
        self._rows[row].fill(text, bits_MW, node)
        for child in children[node]:
            token = tokens[child]
            known = 0 <= token < self.vocabulary
            if known and bits_MW[node, token >> 5] >> (token & 31) & 1:
                below = [*text, token]
                self._visit(row, below, child, children, tokens, bits_MW)


class _Row:
    """A matcher, and the tokens that it has taken."""

    def __init__(self, start: Any):
        self._start, self._matcher = start, start.deep_copy()
        self._taken: list[int] = []

    def fill(self, text: list[int], bits_MW: np.ndarray, node: int) -> None:
        """Writes which tokens may follow a text; none if it is not allowed itself."""
        if not self._follow(text):
            return
        fill = optional_package("llguidance.numpy").fill_next_token_bitmask
        fill(self._matcher, bits_MW, node)
        if self._matcher.is_error():
            reason = first_line(ValueError(self._matcher.get_error()))
            # It has begun a character that no token of this vocabulary ends.
            bits_MW[node] = 0
            if reason != "NoExtensionBias":
                raise UserError(
                    f"cannot constrain: grammar: {reason}, expected less work for a "
                    f"token. Make the grammar simpler."
                )

    def _follow(self, text: list[int]) -> bool:
        """Brings the matcher to the end of a text; says whether it got there."""
        known = min(len(self._taken), len(text))
        if self._taken[:known] != text[:known]:
            pairs = zip(self._taken, text, strict=False)
            known = next(i for i, (taken, token) in enumerate(pairs) if taken != token)
        back = len(self._taken) - known
        if self._matcher.is_error() or (back and not self._matcher.rollback(back)):
            self._matcher, known = self._start.deep_copy(), 0
        took = self._matcher.try_consume_tokens(text[known:])
        self._taken = text[: known + took]
        return len(self._taken) == len(text)


class _Spelling:
    """What `llguidance` wants to know of a vocabulary."""

    def __init__(
        self, vocabulary: Sequence[bytes], encode: Callable[[str], list[int]] | None
    ):
        self.tokens = [*vocabulary, b""]
        # An end of its own: those of the model are the engine's business.
        self.eos_token_id = len(vocabulary)
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]
        self._encode = encode

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        return {content: token for token, content in enumerate(self.tokens) if content}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)

    def __call__(self, content: bytes) -> list[int]:
        """Returns tokens that write these bytes."""
        if self._encode is not None:
            ids = self._encode(content.decode(errors="replace"))
            # SentencePiece puts a space before a text, which is none of ours.
            for tokens in (ids, ids[1:]):
                if b"".join(self.tokens[token] for token in tokens) == content:
                    return tokens
        return self._spell(content)

    def _spell(self, content: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(content):
            for length in range(self._longest, 0, -1):
                token = self._ids.get(content[at : at + length])
                if token is not None:
                    tokens.append(token)
                    at += length
                    break
            else:
                break  # The rest has no tokens, and so no place in a text either.
        return tokens


def compile_grammar(
    kind: str,
    text: str,
    vocabulary: Sequence[bytes],
    encode: Callable[[str], list[int]] | None = None,
    capacity: int = CAPACITY,
) -> GrammarConstraint:
    """Compiles a grammar for a vocabulary.

    Where the grammar leaves no choice, such as the name of a JSON field, the text is
    split into tokens as the tokenizer would.

    Args:
      kind: `"json"` (a JSON schema), `"lark"` or `"regex"`, as `llguidance` reads them.
      text: The grammar. JSON has no white space but one space behind a comma or a
        colon, unless `"x-guidance"` in the schema, with options of `llguidance`, says
        otherwise: `{"whitespace_flexible": true}`.
      vocabulary: The bytes of every token, as `token_bytes` finds them; empty for
        tokens that are never part of a text.
      encode: Turns text into ids, without special tokens.
      capacity: K, most tokens of a text; `jaxllm.generate` sees to it.

    Raises:
      ConfigError: The grammar is wrong, or this vocabulary spells no text of it.
    """
    matcher = optional_package("llguidance").LLMatcher
    sources = {
        "json": lambda schema: matcher.grammar_from_json_schema(schema, _JSON_SPACE),
        "lark": matcher.grammar_from_lark,
        "regex": matcher.grammar_from_regex,
    }
    try:
        source = sources[kind](text)
    except ValueError as cause:
        raise ConfigError(
            f"cannot constrain: {kind}: {first_line(cause)}, expected a JSON object. "
            f"Correct the schema."
        ) from None
    return GrammarConstraint(Grammar(source, vocabulary, encode), capacity)

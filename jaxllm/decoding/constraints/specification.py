"""Constraints written as one string: `regex:...`, `json:...`, `lark:...`."""

import dataclasses
import functools
import json
from collections.abc import Collection
from pathlib import Path

from jaxllm.checkpoints.files import quote
from jaxllm.checkpoints.tokenizer import Tokenizer
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.core.registry import unknown_name
from jaxllm.decoding.buckets import prompt_bucket
from jaxllm.decoding.constraints.constraint import Constraint
from jaxllm.decoding.constraints.grammar import GrammarConstraint, compile_grammar
from jaxllm.decoding.constraints.regular import compile_regex
from jaxllm.decoding.constraints.vocabulary import token_bytes

__all__ = ["make_constraint", "with_room"]

_KINDS = ("json", "lark", "regex")


def make_constraint(
    text: str,
    tokenizer: Tokenizer | None,
    vocabulary: int,
    eos_ids: Collection[int] = (),
) -> Constraint:
    """Makes the constraint that a string describes.

    What is constrained is the text as it follows the prompt, a space at its beginning
    included; `Result.text` of a SentencePiece model is shown without such a space.

    Args:
      text: `regex:PATTERN`; `json:SCHEMA`, a JSON schema written out or the path of a
        file with one; or `lark:FILE`, a grammar in the syntax of `llguidance`.
      tokenizer: The model's.
      vocabulary: V, ids of the model.
      eos_ids: Tokens that end a text.

    Raises:
      ConfigError: The string, or what it describes, is wrong.
      CapacityError: The table of a pattern would be too large.
      UserError: There is no tokenizer, or no such file.
    """
    kind, colon, body = text.partition(":")
    if not colon or kind not in _KINDS:
        raise unknown_name("constraint", kind, [f"{name}:..." for name in _KINDS])
    if tokenizer is None:
        raise UserError(
            "cannot constrain: the model: has no tokenizer, expected one that says "
            "what its tokens write. Make a constraint in Python, from their bytes."
        )
    contents = token_bytes(tokenizer, vocabulary, eos_ids)
    if kind == "regex":
        return compile_regex(body, contents)
    source = _read_schema(body) if kind == "json" else _read_file(body, "a grammar")
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return compile_grammar(kind, source, contents, encode)


def with_room(constraint: Constraint, tokens: int) -> Constraint:
    """Returns a constraint whose state has room for a text of this many tokens."""
    if isinstance(constraint, GrammarConstraint):
        return dataclasses.replace(constraint, capacity=prompt_bucket(max(tokens, 1)))
    return constraint


def _read_file(path: str, wanted: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as cause:
        found = getattr(cause, "strerror", None) or "is no text in UTF-8"
        raise UserError(
            f"cannot constrain: {quote(path)}: {found}, expected a file with {wanted}. "
            f"Correct the path."
        ) from None


def _read_schema(body: str) -> str:
    inline = body.lstrip().startswith("{")
    text = body if inline else _read_file(body, "a JSON schema")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as cause:
        reason = cause.msg if isinstance(cause, json.JSONDecodeError) else "is no JSON"
        raise ConfigError(
            f"cannot constrain: {quote(body)}: {reason}, expected a JSON schema. "
            f"Correct it."
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"cannot constrain: {quote(body)}: is a {type(found).__name__}, expected "
            f"an object that is a JSON schema. Correct it."
        )
    return text

"""Rows of a JSONL job: what a line asks for, or why it cannot be read.

    {"id"?, "prompt" | "messages" | "token_ids",
     "max_new_tokens"?, "temperature"?, "top_p"?, "top_k"?, "min_p"?,
     "repetition_penalty"?, "presence_penalty"?, "stop"?, "seed"?}

A line that cannot be read becomes a `Failure`, and the job goes on. Blank lines are
skipped; a byte order mark and carriage returns at the ends of lines do no harm.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxllm.core.errors import UserError
from jaxllm.core.registry import unknown_name

__all__ = ["Failure", "Row", "read_rows"]

_CONTENT = ("prompt", "messages", "token_ids")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CUT = 40


@dataclasses.dataclass(frozen=True)
class Row:
    """What one line asks for.

    Attributes:
      line: Its number in the file, from 1.
      id: Its own, or the line number.
      prompt: Text, token ids, or a list of chat messages.
      options: What the line says of generation; the flags hold for the rest.
    """

    line: int
    id: str | int
    prompt: str | list[int] | list[Any]
    is_chat: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A row without a result.

    Attributes:
      line: Its number in the file, from 1.
      id: The row's, or the line number where it has none that can be read.
      error: Why, beginning with the line number.
      sample: Which sample of the row; 0 for the row as a whole.
    """

    line: int
    id: str | int
    error: str
    sample: int = 0

    @classmethod
    def of(
        cls, line: int, id: str | int, error: Exception, sample: int = 0
    ) -> "Failure":
        """Returns the failure that an error caused."""
        return cls(line, id, f"line {line}: {' '.join(str(error).split())}", sample)


def read_rows(lines: Iterable[bytes]) -> Iterator[Row | Failure]:
    """Reads rows one by one.

    Args:
      lines: Lines of a file opened in binary mode.

    Yields:
      A `Row`, or a `Failure` for a line that is no row or repeats an id.
    """
    seen: dict[str | int, int] = {}
    for number, raw in enumerate(lines, start=1):
        raw = raw.removeprefix(_BYTE_ORDER_MARK)
        if not raw.strip():
            continue
        id: str | int = number
        try:
            content = _parse(raw)
            id = _read_id(content, number)
            if id in seen:
                raise UserError(
                    f"cannot read row: id {json.dumps(id)}: is that of line "
                    f"{seen[id]} too, expected another. Give every row its own id."
                )
            row = _read_row(content, number, id)
        except UserError as error:
            yield Failure.of(number, id, error)
        else:
            seen[id] = number
            yield row


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as cause:
        raise UserError(
            f"cannot read row: byte {cause.start + 1} is not UTF-8, expected JSON in "
            "UTF-8. Save the file in UTF-8."
        ) from None
    except json.JSONDecodeError as cause:
        raise UserError(
            f"cannot read row: column {cause.colno}: {cause.msg}, expected a JSON "
            "object on one line. Correct the line."
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError):
        # Numbers of thousands of digits, or thousands of nested brackets.
        raise UserError(
            "cannot read row: it is too deeply nested or has a number that is too "
            "long, expected a JSON object. Correct the line."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"cannot read row: it is a {type(content).__name__}, expected an object "
            '{"prompt": ...}. Correct the line.'
        )
    # Tables written as JSONL have null where a row lacks a value.
    return {name: value for name, value in content.items() if value is not None}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"cannot read row: field {twice[:_CUT]!r}: is there twice, expected once. "
            "Leave one out."
        )
    return content


def _read_id(content: dict[str, Any], line: int) -> str | int:
    id = content.get("id", line)
    if type(id) not in (str, int):
        raise _misfit("id", id, "a string or an integer")
    return id


def _read_row(content: dict[str, Any], line: int, id: str | int) -> Row:
    known = ("id", *_CONTENT, *_OPTIONS)
    for name in content:
        if name not in known:
            raise unknown_name("field", name, known, of="row")
    given = [name for name in _CONTENT if name in content]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(
            f"cannot read row: what to continue: {found} is given, expected one of "
            f"{', '.join(_CONTENT)}. Give one of them."
        )
    prompt = content[given[0]]
    if given[0] == "prompt" and not isinstance(prompt, str):
        raise _misfit("prompt", prompt, "a string")
    if given[0] == "messages" and not _is_list_of(prompt, dict):
        raise _misfit("messages", prompt, "a list of objects")
    if given[0] == "token_ids" and not _is_list_of(prompt, int):
        raise _misfit("token_ids", prompt, "a list of integers")
    options = {}
    for name, (fits, wanted) in _OPTIONS.items():
        if name in content:
            value = content[name]
            if not fits(value):
                raise _misfit(name, value, wanted)
            options[name] = value
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    return Row(line, id, prompt, given[0] == "messages", options)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


# Whether a number is in range is checked where it is used; here only what it is.
_OPTIONS = {
    "max_new_tokens": (_is_count, "an integer of 0 or more"),
    "temperature": (_is_number, "a number"),
    "top_p": (_is_number, "a number"),
    "top_k": (_is_count, "an integer of 0 or more"),
    "min_p": (_is_number, "a number"),
    "repetition_penalty": (_is_number, "a number"),
    "presence_penalty": (_is_number, "a number"),
    "stop": (_is_stop, "a string or a list of strings, none of them empty"),
    "seed": (_is_seed, f"an integer from 0 to {2**32 - 1}"),
}


def _misfit(name: str, value: Any, wanted: str) -> UserError:
    text = json.dumps(value)
    text = text if len(text) <= _CUT else f"{text[: _CUT - 3]}..."
    return UserError(
        f"cannot read row: field {name!r}: {text}, expected {wanted}. Correct the line."
    )

"""Prompts to measure with: those of the package, and files of benchmark suites.

A file is JSONL; a row has what to continue under one of these names, and whatever else
stands in it is left alone, so that files of Spec-Bench and MT-Bench are read as they
are:

    {"id" | "question_id"?, "category"?, "prompt" | "turns" | "question" | "token_ids"}

`turns` are a conversation's; the first is taken.
"""

import collections
import dataclasses
import hashlib
import importlib.resources
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from jaxllm.core.errors import UserError

__all__ = ["PromptRow", "PromptSet", "default_prompts", "read_prompts"]

NO_CATEGORY = "all"
"""Category of a row that names none."""

_READ = "cannot read prompts"
_CONTENT = ("prompt", "turns", "question", "token_ids")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CUT = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One prompt.

    Attributes:
      id: What it is known by.
      prompt: Text, or token ids.
      category: What kind of text it is.
    """

    id: str | int
    prompt: str | Sequence[int]
    category: str = NO_CATEGORY


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts, and where they are from.

    Attributes:
      rows: At least one.
      path: The file as it was named, or None for rows made in Python.
      sha256: Digest of the file, also where only some of its rows are taken.
    """

    rows: tuple[PromptRow, ...]
    path: str | None
    sha256: str

    @classmethod
    def of(cls, prompts: Iterable[str | Sequence[int]]) -> "PromptSet":
        """Returns texts or lists of ids as rows of one category."""
        rows = tuple(PromptRow(id=i, prompt=p) for i, p in enumerate(prompts, start=1))
        contents = json.dumps([r.prompt for r in rows]).encode()
        return cls(rows=rows, path=None, sha256=hashlib.sha256(contents).hexdigest())

    @property
    def categories(self) -> tuple[str, ...]:
        """Every category once, in the order of their first rows."""
        return tuple(dict.fromkeys(row.category for row in self.rows))

    def first(self, count: int | None) -> "PromptSet":
        """Returns the first rows of every category, or all of them for None."""
        if count is None:
            return self
        seen: collections.Counter[str] = collections.Counter()
        rows = []
        for row in self.rows:
            seen[row.category] += 1
            if seen[row.category] <= count:
                rows.append(row)
        return dataclasses.replace(self, rows=tuple(rows))

    def described(self) -> dict[str, Any]:
        """Returns `path`, `sha256` and `count`, as results carry them."""
        return {"path": self.path, "sha256": self.sha256, "count": len(self.rows)}


def default_prompts() -> PromptSet:
    """Returns the prompts of the package: beginnings of stories for children.

    Four each of `story` (free openings), `repetition` (phrases come back) and
    `dialogue`. With the shipped models all of them fall into one compiled shape.
    """
    file = importlib.resources.files("jaxllm").joinpath("_data/prompts/stories.jsonl")
    return _parse(file.read_bytes(), "jaxllm/_data/prompts/stories.jsonl")


def read_prompts(path: str | os.PathLike[str]) -> PromptSet:
    """Reads a JSONL file of prompts.

    Args:
      path: The file; see the module for its rows.

    Returns:
      All rows, in order.

    Raises:
      UserError: The file cannot be read or has no rows, or a line is no row. The
        message names the line.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = file.read()
    except OSError as cause:
        raise UserError(
            f"{_READ}: {name}: {cause.strerror}, expected a JSONL file. Correct "
            "--prompts."
        ) from None
    return _parse(content, name)


def _parse(content: bytes, name: str) -> PromptSet:
    rows: dict[str | int, PromptRow] = {}
    lines = content.removeprefix(_BYTE_ORDER_MARK).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{_READ}: {name}: line {number}"
        row = _row(line, number, where)
        if row.id in rows:
            raise UserError(
                f"{where}: has id {row.id!r} of an earlier line, expected another. "
                "Give every row its own id."
            )
        rows[row.id] = row
    if not rows:
        raise UserError(
            f"{_READ}: {name}: holds no rows, expected at least one. Write one JSON "
            "object a line."
        )
    digest = hashlib.sha256(content).hexdigest()
    return PromptSet(rows=tuple(rows.values()), path=name, sha256=digest)


def _row(line: bytes, number: int, where: str) -> PromptRow:
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UserError(
            f"{where}: is not JSON in UTF-8, expected an object on one line. Correct "
            "the line."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{where}: is a {type(content).__name__}, expected an object "
            '{"prompt": ...}. Correct the line.'
        )
    given = [name for name in _CONTENT if content.get(name) is not None]
    if len(given) != 1:
        raise UserError(
            f"{where}: what to continue: {' and '.join(given) or 'none'} is given, "
            f"expected one of {', '.join(_CONTENT)}. Give one of them."
        )
    id = next(
        (content[n] for n in ("id", "question_id") if content.get(n) is not None),
        number,
    )
    category = content.get("category")
    category = NO_CATEGORY if category is None else category
    if type(id) not in (str, int):
        raise _misfit(where, "id", id, "a string or an integer")
    if not isinstance(category, str):
        raise _misfit(where, "category", category, "a string")
    prompt = _prompt(given[0], content[given[0]], where)
    return PromptRow(id=id, prompt=prompt, category=category)


def _prompt(field: str, value: Any, where: str) -> str | list[int]:
    if field == "token_ids":
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            raise _misfit(where, field, value, "a list of integers")
        return value
    if field == "turns":
        if not isinstance(value, list) or not all(isinstance(t, str) for t in value):
            raise _misfit(where, field, value, "a list of strings")
        if not value:
            raise _misfit(where, field, value, "at least one turn")
        return value[0]
    if not isinstance(value, str):
        raise _misfit(where, field, value, "a string")
    return value


def _misfit(where: str, field: str, value: Any, wanted: str) -> UserError:
    text = json.dumps(value)
    text = text if len(text) <= _CUT else f"{text[: _CUT - 3]}..."
    return UserError(
        f"{where}: field {field!r}: {text}, expected {wanted}. Correct the line."
    )

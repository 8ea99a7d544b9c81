"""Typed access to `config.json`: every error names the file, the key and the rule."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxllm.core.errors import ConfigError

__all__ = ["FILE_NAME", "REQUIRED", "Fields", "shown"]

FILE_NAME = "config.json"
# The default of a key that has none.
REQUIRED: Any = object()

_SHOWN = 80

T = TypeVar("T")


def shown(value: Any) -> str:
    """Returns a value as JSON writes it, cut to a length that fits a message.

    Args:
      value: Anything; a damaged file may hold megabytes.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        # No JSON value, or an integer of thousands of digits.
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@dataclasses.dataclass(frozen=True)
class Fields:
    """One object of `config.json`.

    A key that is `null` counts as absent, except where a method says otherwise.

    Attributes:
      values: The object.
      place: What stands before a key of it in messages: `""`, `"text_config."`.
    """

    values: Mapping[str, Any]
    place: str = ""

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self.values.get(key) is not None

    def error(
        self, key: str, wanted: str, action: str = "Correct the file."
    ) -> ConfigError:
        """Returns the error, to be raised, for a key's value.

        Args:
          key: The key.
          wanted: What was expected, completing "expected ...".
          action: What to do about it.
        """
        found = "is missing"
        if key in self.values:
            found = f"is {shown(self.values[key])}"
        return ConfigError(
            f"cannot read config: {FILE_NAME}: '{self.place}{key}' {found}, expected "
            f"{wanted}. {action}"
        )

    def integer(self, key: str, default: Any = REQUIRED, *, high: int) -> int:
        """Returns an integer from 1 to `high`.

        Args:
          key: The key.
          default: Stands for an absent key; `REQUIRED` makes absence an error.
          high: Largest value; beyond it a file is damaged, not large.

        Raises:
          ConfigError: The value is absent, no integer, a bool or out of range.
        """
        if not self.has(key) and default is not REQUIRED:
            return default
        value = self.values.get(key)
        if type(value) is not int or not 1 <= value <= high:
            raise self.error(key, f"an integer from 1 to {high}")
        return value

    def optional_integer(
        self, key: str, default: int | None, *, high: int
    ) -> int | None:
        """Returns an integer from 1 to `high`, or None where the key is null."""
        if key in self.values and self.values[key] is None:
            return None
        return self.integer(key, default, high=high)

    def number(
        self, key: str, default: Any = REQUIRED, *, low: float, high: float
    ) -> Any:
        """Returns a float from `low` to `high`.

        Args:
          key: The key.
          default: Stands for an absent key, and may be None; `REQUIRED` makes absence
            an error.
          low: Smallest value.
          high: Largest value.

        Raises:
          ConfigError: The value is absent, no number, a bool, NaN or out of range.
        """
        if not self.has(key) and default is not REQUIRED:
            return default
        value = self.values.get(key)
        wanted = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, wanted)
        # NaN fails the comparison; an int too large for a float never becomes one.
        if not low <= value <= high:
            raise self.error(key, wanted)
        return float(value)

    def optional_number(
        self, key: str, default: float | None, *, low: float, high: float
    ) -> float | None:
        """Returns a float from `low` to `high`, or None where the key is null."""
        if key in self.values and self.values[key] is None:
            return None
        return self.number(key, default, low=low, high=high)

    def numbers(
        self, key: str, count: int, *, low: float, high: float
    ) -> tuple[float, ...]:
        """Returns a list of `count` floats, each from `low` to `high`."""
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise self.error(key, f"a list of {count} numbers")
        if any(type(v) not in (int, float) or not low <= v <= high for v in values):
            raise self.error(key, f"{count} numbers from {low:g} to {high:g}")
        return tuple(float(v) for v in values)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, T], default: str) -> T:
        """Returns what a word stands for.

        Args:
          key: The key.
          choices: Every word that is understood.
          default: The word that an absent key stands for.

        Raises:
          ConfigError: The value is none of the words; the message lists them.
        """
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            raise self.error(
                key,
                f"one of {', '.join(choices)}",
                "Only these are implemented.",
            )
        return choices[value]

    def words(self, key: str, count: int, choices: Iterable[str]) -> list[str]:
        """Returns a list of `count` words, each one of `choices`."""
        values, known = self.values.get(key), list(choices)
        wanted = f"a list of {count} words out of {', '.join(known)}"
        if not isinstance(values, list) or len(values) != count:
            raise self.error(key, wanted)
        if any(not isinstance(v, str) or v not in known for v in values):
            raise self.error(key, wanted)
        return list(values)

    def section(self, key: str) -> "Fields | None":
        """Returns an object inside this one, or None where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object {...}")
        return Fields(value, f"{self.place}{key}.")

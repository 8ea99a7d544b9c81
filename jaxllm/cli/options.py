"""Flags of a command: declared on its own `FlagValues`, parsed with plain messages.

Nothing here imports jax, so that `--help` and a misspelt flag are answered at once.
"""

import dataclasses
import difflib
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

__all__ = [
    "MESH",
    "MODEL",
    "SAMPLING",
    "SHARED",
    "Choice",
    "Flag",
    "Number",
    "Switch",
    "Texts",
    "UsageError",
    "describe",
    "nearest",
    "parse",
]

_WIDTH = 88
_INDENT = " " * 8


class UsageError(Exception):
    """A mistake on the command line itself, found before anything heavy is imported.

    Its message has the form of a `UserError`'s, which it is not, because that class
    comes with jax.
    """


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag that takes text, at most once.

    Attributes:
      name: Of the flag.
      default: Its value when it is not given.
      help: For `--help`.
    """

    name: str
    default: Any
    help: str

    def declare(self, values: flags.FlagValues) -> None:
        """Declares the flag among those of a command."""
        flags.DEFINE(
            self._parser(),
            self.name,
            self.default,
            self.help,
            flag_values=values,
            allow_overwrite=False,
        )

    def _parser(self) -> flags.ArgumentParser:
        return flags.ArgumentParser()


@dataclasses.dataclass(frozen=True)
class Switch(Flag):
    """A flag that is given or not."""

    default: bool = False
    help: str = ""

    def declare(self, values: flags.FlagValues) -> None:
        """Declares the flag among those of a command."""
        flags.DEFINE_boolean(
            self.name,
            self.default,
            self.help,
            flag_values=values,
            allow_overwrite=False,
        )


@dataclasses.dataclass(frozen=True)
class Texts(Flag):
    """A flag that takes text and may be repeated."""

    def declare(self, values: flags.FlagValues) -> None:
        """Declares the flag among those of a command."""
        flags.DEFINE_multi_string(
            self.name, self.default, self.help, flag_values=values
        )


@dataclasses.dataclass(frozen=True)
class Choice(Flag):
    """A flag that takes one of a few words.

    Attributes:
      words: All of them.
    """

    words: tuple[str, ...] = ()

    def _parser(self) -> flags.ArgumentParser:
        return _Words(self.words)


@dataclasses.dataclass(frozen=True)
class Number(Flag):
    """A flag that takes a finite number.

    Attributes:
      low: Least value.
      high: Largest value; None for no limit.
      integer: Whether it has to be whole.
    """

    low: float = -math.inf
    high: float | None = None
    integer: bool = False

    def _parser(self) -> flags.ArgumentParser:
        return _Numbers(self)


class _Words(flags.ArgumentParser):
    """Parses one of a few words."""

    def __init__(self, words: tuple[str, ...]):
        super().__init__()
        self.words = words

    def parse(self, argument: Any) -> str:
        if argument not in self.words:
            raise ValueError(f"expected one of {', '.join(self.words)}")
        return argument


class _Numbers(flags.ArgumentParser):
    """Parses a finite number within bounds."""

    def __init__(self, flag: Number):
        super().__init__()
        self.flag = flag
        kind = "an integer" if flag.integer else "a number"
        if flag.high is None:
            self.wanted = f"{kind}, {flag.low:.10g} or more"
        else:
            self.wanted = f"{kind}, from {flag.low:.10g} to {flag.high:.10g}"

    def parse(self, argument: Any) -> int | float:
        low, high = self.flag.low, self.flag.high
        try:
            value = int(argument) if self.flag.integer else float(argument)
            inside = low <= value and (high is None or value <= high)
        except ValueError:
            inside = False
        if not inside or math.isinf(value):
            raise ValueError(f"expected {self.wanted}")
        return value


MODEL = Flag(
    "model", "demo", "a Hugging Face directory, hf:org/name, or a shipped model"
)
MESH = Flag("mesh", None, "devices to use, such as data=1,tensor=4")

SAMPLING = (
    Number("temperature", 0.0, "0 is greedy", low=0),
    Number("top_p", 1.0, "keep this much probability", low=1e-6, high=1),
    Number("top_k", 0, "keep the k likeliest tokens; 0 keeps all", low=0, integer=True),
    Number(
        "min_p",
        0.0,
        "keep tokens at least this likely relative to the likeliest",
        low=0,
        high=1 - 1e-6,
    ),
)
"""How tokens are drawn."""

SHARED = (
    Flag("profile_dir", None, "write a trace for TensorBoard or xprof to this folder"),
    Switch("traceback", False, "show where an error came from"),
    Switch("help", False, "show this text"),
)
"""What every command has, behind its own flags."""


def parse(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Parses a command's arguments into its flags.

    Args:
      values: The declared flags; they hold the result.
      arguments: What stands behind the command's name.

    Raises:
      UsageError: A flag is unknown (the message names the nearest), is given twice or
        has a wrong value, or there is an argument that is no flag.
    """
    try:
        rest = values(["jaxllm", *arguments])[1:]
    except flags.UnrecognizedFlagError as cause:
        raise UsageError(
            f"cannot read flags: --{cause.flagname}: no such flag, expected one that "
            f"--help lists. {nearest(cause.flagname, values, prefix='--')}"
        ) from None
    except (flags.Error, ValueError) as cause:
        raise UsageError(f"cannot read flags: {_reason(cause)}") from None
    if rest:
        raise UsageError(
            f"cannot read flags: {rest[0]!r}: is no flag, expected --name=value. "
            "Put a value with spaces in quotes."
        )


def _reason(cause: Exception) -> str:
    """Rewrites a message of absl's: `<flag>: <found>, expected <wanted>. <action>.`."""
    text = " ".join(str(cause).split())
    if text.startswith("Missing value for flag "):
        name = text.rsplit(" ", 1)[1]
        return f"{name}: has no value, expected one. Write {name}=VALUE."
    name, _, rest = text.removeprefix("flag ").partition(": ")
    if rest.startswith("already defined as "):
        name, _, value = name.partition("=")
        first = rest.removeprefix("already defined as ")
        found = f"is given twice ({first}, then {value})"
        return f"{name}: {found}, expected once. Leave one out."
    if rest.startswith("expected "):
        name, _, value = name.partition("=")
        return f"{name}: {value!r}, {rest}. Correct it."
    if "Non-boolean" in rest:
        name, _, value = name.partition("=")
        return f"{name}: {value!r}, expected true or false. Write {name} alone."
    return f"{text}, expected --name=value. Run with --help."


def nearest(found: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns a sentence that names the known word most like the one found."""
    close = difflib.get_close_matches(found, list(known), n=1, cutoff=0.5)
    return f"Did you mean {prefix}{close[0]}?" if close else "Run with --help."


def describe(declared: Iterable[Flag], program: str, summary: str) -> str:
    """Returns the text of `--help`.

    Args:
      declared: The command's flags.
      program: `jaxllm generate`.
      summary: What the command does, and examples.
    """
    lines = [f"usage: {program} [--FLAG=VALUE ...]", "", summary.strip(), ""]
    for flag in declared:
        about = flag.help
        if not (isinstance(flag, Switch | Texts) or flag.default is None):
            about += f" (default: {flag.default})"
        value = "" if isinstance(flag, Switch) else f"={flag.name.upper()}"
        lines.append(f"  --{flag.name}{value}")
        lines.append(
            textwrap.fill(
                about, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT
            )
        )
    return "\n".join(lines)

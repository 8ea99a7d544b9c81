"""Method strings: `name:field=value,...` into a frozen dataclass of options.

The grammar, with spaces around any part ignored:

    method := name [ ":" field "=" value ( "," field "=" value )* ]
    value  := item ( "+" item )*            # several items make a tuple
    item   := scalar | "(" method ")"

A scalar runs to the next `,`, `+`, `(` or `)` and is kept as text: what it means
is decided by the declared type of the field that it is given to. A scalar that has
one of these signs in it is written as a JSON string, `path="a+b"`; a number with
a signed exponent, `1e+5`, needs no quotes.

Each room keeps its own registry, a literal dict from name to dataclass; this module
only reads strings and matches them with such a dict.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from jaxllm.core.errors import ConfigError

__all__ = [
    "MethodSpec",
    "Value",
    "alternatives",
    "build",
    "coerce",
    "field_types",
    "parse_method",
    "parse_value",
    "unknown_name",
]

T = TypeVar("T")

Value: TypeAlias = "str | MethodSpec | tuple[str | MethodSpec, ...]"
"""What stands behind a `=`: a scalar's text, a method, or a tuple of these."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r"[^,+()]+")
_SPACE = re.compile(r"\s*")
# Far more than any cascade of methods, far less than the interpreter's recursion.
_MAX_DEPTH = 32
_SHOWN = 80


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method string taken apart, before anything is looked up.

    `str(spec)` is the canonical string: parsing it gives an equal spec.

    Args:
      name: What the method is called in its registry.
      options: Pairs of a field's name and its value, in the order given. A scalar
        is its text; a tuple has two items or more.

    Raises:
      ConfigError: A name or a field is not a word, a field comes twice, or a tuple
        has fewer than two items.
    """

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise _syntax_error(self.name, "is not a name", "a word such as 'jacobi'")
        seen = set()
        for field, value in self.options:
            if not _FIELD.fullmatch(field):
                raise _syntax_error(field, "is not a field", "a word such as 'window'")
            if field in seen:
                raise _syntax_error(field, "is given twice", "each field once")
            if isinstance(value, tuple) and len(value) < 2:
                raise _syntax_error(field, "has a tuple of one item", "two or more")
            seen.add(field)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        options = (f"{field}={_written(value)}" for field, value in self.options)
        return f"{self.name}:{','.join(options)}"


def parse_method(text: str) -> MethodSpec:
    """Reads a method string; nothing is looked up.

    Args:
      text: `name[:field=value(,field=value)*]`, see the module's docstring.

    Returns:
      The name and the options, scalars still as text.

    Raises:
      ConfigError: The text does not follow the grammar; the message says where.
    """
    return _Reader(text, "method").whole(_Reader.method)


def parse_value(text: str) -> Value:
    """Reads what may stand behind a `=` in a method string.

    Args:
      text: A scalar, a method in parentheses, or several joined by `+`.

    Returns:
      A scalar's text, a `MethodSpec`, or a tuple of two or more of these.

    Raises:
      ConfigError: The text does not follow the grammar.
    """
    return _Reader(text, "value").whole(_Reader.value)


def build(
    method: str | MethodSpec,
    registry: Mapping[str, type[T]],
    registries: Mapping[Any, Mapping[str, type]] | None = None,
) -> T:
    """Makes the dataclass that a method string names.

    Args:
      method: A method string or a parsed one.
      registry: The known methods: name to frozen dataclass.
      registries: For fields that are methods themselves: the declared type of the
        field, a protocol say, to the registry in which its value is looked up.

    Returns:
      An instance of the dataclass, its options converted to the fields' types.

    Raises:
      ConfigError: The string cannot be read, the method or a field is unknown (the
        message lists the known ones and the nearest), a value does not fit its
        field's type, or a field without a default is missing.
    """
    spec = parse_method(method) if isinstance(method, str) else method
    if spec.name not in registry:
        raise unknown_name("method", spec.name, registry)
    cls = registry[spec.name]
    declared = field_types(cls)
    for field, _ in spec.options:
        if field not in declared:
            raise unknown_name("field", field, declared, of=spec.name)
    given = {
        field: coerce(value, declared[field], f"{spec.name}.{field}", registries)
        for field, value in spec.options
    }
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.init
        and field.name not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"incomplete method: {spec.name!r}: no value for {', '.join(missing)}, "
            f"expected one. Write '{spec.name}:{missing[0]}=...'."
        )
    return cls(**given)


def coerce(
    value: Value,
    declared: Any,
    where: str,
    registries: Mapping[Any, Mapping[str, type]] | None = None,
) -> Any:
    """Converts what was written to the type that a field declares.

    Args:
      value: A scalar's text, a parsed method, or a tuple of these.
      declared: The field's annotation: `int`, `float`, `bool`, `str`, `None`,
        `Literal`, a union or a tuple of such types, `Any`, or a key of `registries`.
        A lone item given to a tuple field becomes a tuple of one.
      where: The field as the message should name it, `jacobi.window`.
      registries: See `build`.

    Returns:
      The converted value. Under `Any` a scalar becomes what it looks like.

    Raises:
      ConfigError: The value does not fit.
    """
    registries = registries or {}
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is typing.Annotated:
        return coerce(value, arguments[0], where, registries)
    if declared in registries and isinstance(value, MethodSpec):
        return build(value, registries[declared], registries)
    if len(alternatives(declared)) > 1:
        return _coerce_union(value, declared, where, registries)
    if origin is Sequence:
        arguments = (*arguments, ...)
    if declared is tuple or origin in (tuple, Sequence):
        return _coerce_tuple(value, arguments, where, registries)
    if not isinstance(value, str):
        raise _misfit(value, declared, where, registries)
    if declared is Any:
        return _coerce_union(value, None | bool | int | float | str, where, {})
    if origin is typing.Literal:
        for option in arguments:
            if value == str(option):
                return option
        raise unknown_name("value", value, map(str, arguments), of=where)
    try:
        return _SCALARS[declared](value)
    except (KeyError, ValueError):
        raise _misfit(value, declared, where, registries) from None


def alternatives(declared: Any) -> tuple[Any, ...]:
    """The types that an annotation offers.

    Args:
      declared: An annotation.

    Returns:
      The members of a union; of any other type, the type alone.
    """
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is typing.Annotated:
        return alternatives(arguments[0])
    return arguments if origin in (typing.Union, types.UnionType) else (declared,)


def field_types(cls: Any) -> dict[str, Any]:
    """The fields that a dataclass is made from, with their declared types.

    Args:
      cls: A dataclass.

    Returns:
      Name to resolved annotation, in order, without fields that are not given to
      the constructor.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def unknown_name(
    kind: str, found: str, known: Iterable[str], of: str | None = None
) -> ConfigError:
    """The error for a name that is not among the known ones.

    Args:
      kind: What the name should be: "method", "field", "architecture".
      found: The name that was given.
      known: Every name that would do.
      of: Where the name was looked for: a method, a section of a configuration.

    Returns:
      A `ConfigError`, to be raised, that lists the known names and the nearest.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(found[:_SHOWN], names, n=1, cutoff=0.65)
    place = f"{of}: " if of else ""
    wanted = f"one of {', '.join(names)}" if names else "none"
    if nearest:
        action = f"Did you mean {nearest[0]!r}?"
    else:
        action = "Choose one of these." if names else f"Leave this {kind} out."
    return ConfigError(
        f"unknown {kind}: {place}{_shown(found)}, expected {wanted}. {action}"
    )


class _Reader:
    """A recursive descent over one string; `at` is the next character to read."""

    def __init__(self, text: str, what: str):
        self.text = text
        self.what = what
        self.at = 0
        self.depth = 0

    def whole(self, rule: Any) -> Any:
        result = rule(self)
        self.skip_space()
        if self.at < len(self.text):
            raise self.error("the end or one of ',', '+', ')' in its place")
        return result

    def method(self) -> MethodSpec:
        name = self.word(_NAME, "the name of a method")
        options: list[tuple[str, Value]] = []
        separator = ":"
        while self.take(separator):
            field = self.word(_FIELD, "the name of a field")
            if not self.take("="):
                raise self.error(f"'=' after {_shown(field)}")
            options.append((field, self.value()))
            separator = ","
        return MethodSpec(name, tuple(options))

    def value(self) -> Value:
        items = [self.item()]
        while self.take("+"):
            items.append(self.item())
        return items[0] if len(items) == 1 else tuple(items)

    def item(self) -> str | MethodSpec:
        if not self.take("("):
            return self.scalar()
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.error(f"at most {_MAX_DEPTH} methods inside each other")
        inner = self.method()
        if not self.take(")"):
            raise self.error("')'")
        self.depth -= 1
        return inner

    def scalar(self) -> str:
        self.skip_space()
        if self.text.startswith('"', self.at):
            return self.quoted()
        # A number first, because the '+' of 1e+5 does not begin a next item.
        for pattern in (_NUMBER, _PLAIN):
            match = pattern.match(self.text, self.at)
            if match and self.ends_item(match.end()):
                self.at = match.end()
                text = match.group().strip()
                if text:
                    return text
        raise self.error("a value")

    def quoted(self) -> str:
        try:
            text, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except ValueError:
            raise self.error("a closing quote") from None
        if not self.ends_item(self.at):
            raise self.error("',', '+' or ')' after the quotes")
        return text

    def word(self, pattern: re.Pattern[str], wanted: str) -> str:
        self.skip_space()
        match = pattern.match(self.text, self.at)
        if not match:
            raise self.error(wanted)
        self.at = match.end()
        self.skip_space()
        return match.group()

    def take(self, sign: str) -> bool:
        self.skip_space()
        found = self.text.startswith(sign, self.at)
        self.at += len(sign) if found else 0
        return found

    def skip_space(self) -> None:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]

    def ends_item(self, at: int) -> bool:
        at = _SPACE.match(self.text, at).end()  # type: ignore[union-attr]
        return at >= len(self.text) or self.text[at] in ",+)"

    def error(self, wanted: str) -> ConfigError:
        if self.at < len(self.text):
            found = f"{_shown(self.text[self.at :], 12)} at character {self.at + 1}"
        else:
            found = "the text ends"
        return _syntax_error(self.text, found, wanted, self.what)


def _coerce_union(
    value: Value, declared: Any, where: str, registries: Mapping[Any, Any]
) -> Any:
    """The first member that takes the value, the strictest members first."""
    members = alternatives(declared)
    somethings = [member for member in members if member is not type(None)]
    if not isinstance(value, str) and len(somethings) == 1:
        # The reason why the one candidate refuses is the message to show.
        return coerce(value, somethings[0], where, registries)

    def strictness(member: Any) -> int:
        order = (type(None), bool, int, float)
        if member in order:
            return order.index(member)
        return len(order) + (member is str)

    for member in sorted(members, key=strictness):
        try:
            return coerce(value, member, where, registries)
        except ConfigError:
            continue
    raise _misfit(value, declared, where, registries)


def _coerce_tuple(
    value: Value, members: Sequence[Any], where: str, registries: Mapping[Any, Any]
) -> tuple[Any, ...]:
    items = value if isinstance(value, tuple) else (value,)
    if not members:
        members = (Any,) * len(items)
    elif members[-1] is Ellipsis:
        members = (members[0],) * len(items)
    if len(members) != len(items):
        raise ConfigError(
            f"bad value: {where}: {len(items)} items, expected {len(members)}. "
            "Join them by '+'."
        )
    return tuple(
        coerce(item, member, f"{where}[{index}]", registries)
        for index, (item, member) in enumerate(zip(items, members, strict=True))
    )


def _as_bool(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def _as_none(text: str) -> None:
    if text not in ("None", "none"):
        raise ValueError(text)


_SCALARS: dict[Any, Any] = {
    bool: _as_bool,
    int: int,
    float: float,
    str: str,
    type(None): _as_none,
    None: _as_none,
}


def _misfit(
    value: Value, declared: Any, where: str, registries: Mapping[Any, Any]
) -> ConfigError:
    if isinstance(value, str) and declared in registries:
        action = f"Put a method in parentheses: ({value[:40]})."
    elif isinstance(value, tuple):
        action = "Give one value, without '+'."
    elif isinstance(value, MethodSpec):
        action = "Give a plain value, without parentheses."
    else:
        action = "Write a value of that type."
    return ConfigError(
        f"bad value: {where}: {_shown(_written(value))}, "
        f"expected {_type_name(declared)}. {action}"
    )


def _type_name(declared: Any) -> str:
    """How a message calls a type: `int`, `float or None`, `tuple[int, ...]`."""
    if len(alternatives(declared)) > 1:
        return " or ".join(map(_type_name, alternatives(declared)))
    if declared is type(None):
        return "None"
    if typing.get_origin(declared) is None and isinstance(declared, type):
        return declared.__name__
    return str(declared).replace("typing.", "")


def _written(value: Value) -> str:
    """A value as a method string holds it."""
    if isinstance(value, tuple):
        return "+".join(map(_written, value))
    if isinstance(value, MethodSpec):
        return f"({value})"
    plain = _NUMBER.fullmatch(value) or _PLAIN.fullmatch(value)
    if plain and value == value.strip() and not value.startswith('"'):
        return value
    return json.dumps(value)


def _shown(text: str, limit: int = _SHOWN) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _syntax_error(
    text: str, found: str, wanted: str, what: str = "method"
) -> ConfigError:
    form = {"method": "name:field=value,field=value", "value": "item+item"}[what]
    return ConfigError(
        f"cannot read {what}: {_shown(text)}: {found}, expected {wanted}. "
        f"The form is {form}."
    )

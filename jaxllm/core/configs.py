"""Changes to nested configurations, as `--set a.b=value` writes them.

A configuration is a frozen dataclass whose fields may be frozen dataclasses in turn.
Nothing is changed in place: every change gives a new configuration.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxllm.core import registry
from jaxllm.core.errors import ConfigError

__all__ = ["apply_overrides"]

T = TypeVar("T")


def apply_overrides(
    config: T,
    overrides: Iterable[str],
    registries: Mapping[Any, Mapping[str, type]] | None = None,
) -> T:
    """Applies overrides to a configuration, in order.

    Args:
      config: A frozen dataclass, nested as deep as it likes.
      overrides: Strings `a.b=value`: a path of field names and a value in the form
        that method strings use, `3+8` for a tuple. A field of type `str` takes
        everything behind the first `=` as it stands.
      registries: For fields that are methods, see `registry.build`.

    Returns:
      A new configuration of the same type.

    Raises:
      ConfigError: An override has no `=`, a field is unknown (the message lists the
        known ones and the nearest), a section is given a value or a value a
        section, or the value does not fit the declared type.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(
                f"cannot read override: {override[:80]!r}: no '=', expected "
                "field=value. Write --set a.b=value."
            )
        names = [name.strip() for name in path.split(".")]
        config = _replaced(config, names, 0, text, registries or {})
    return config


def _replaced(
    config: Any,
    names: list[str],
    depth: int,
    text: str,
    registries: Mapping[Any, Mapping[str, type]],
) -> Any:
    """`config` with the field at `names[depth:]` set to what `text` says."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(
            f"unknown field: {'.'.join(names)[:80]!r}: {'.'.join(names[:depth])!r} is "
            f"{type(config).__name__}, expected a section with fields. "
            f"Set {'.'.join(names[:depth])!r} itself."
        )
    name, where = names[depth], ".".join(names[: depth + 1])
    declared = registry.field_types(type(config))
    if name not in declared:
        section = ".".join(names[:depth]) or type(config).__name__
        raise registry.unknown_name("field", name, declared, of=section)
    current = getattr(config, name)
    if depth + 1 < len(names):
        value = _replaced(current, names, depth + 1, text, registries)
    elif dataclasses.is_dataclass(current) and not any(
        member in registries or member is type(None)
        for member in registry.alternatives(declared[name])
    ):
        fields = ", ".join(registry.field_types(type(current)))
        raise ConfigError(
            f"bad value: {where}: {text[:80]!r}, expected one of its fields: {fields}. "
            f"Write {where}.FIELD=value."
        )
    else:
        value = _parsed(text, declared[name], where, registries)
    return dataclasses.replace(config, **{name: value})


def _parsed(
    text: str,
    declared: Any,
    where: str,
    registries: Mapping[Any, Mapping[str, type]],
) -> Any:
    # A path or a prompt may hold any sign, and nothing else could be meant.
    if set(registry.alternatives(declared)) <= {str, type(None)}:
        return registry.coerce(text, declared, where)
    return registry.coerce(registry.parse_value(text), declared, where, registries)

"""`jaxllm systems`: what is implemented, read from the registries."""

import dataclasses
import importlib
import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from jaxllm.cli.options import Switch

__all__ = ["FLAGS", "SUMMARY", "run"]

SUMMARY = """show what is implemented, with its evidence

  jaxllm systems
  jaxllm systems --json

SYSTEMS.md in the repository has the papers' figures and ours beside each other.
"""


@dataclasses.dataclass(frozen=True)
class Registry:
    """Where a kind of method is registered.

    Attributes:
      kind: What the command line calls it.
      module: The module that holds the dict.
      name: The dict.
      evidence: The test that every entry has to pass; `{module}` is the entry's own.
    """

    kind: str
    module: str
    name: str
    evidence: str


REGISTRIES = (
    Registry(
        "--decode", "jaxllm.drafting", "METHODS", "tests/drafting/test_{module}.py"
    ),
    Registry(
        "quantization",
        "jaxllm.quantization",
        "METHODS",
        "tests/quantization/test_{module}.py",
    ),
    Registry(
        "family", "jaxllm.models.families", "FAMILIES", "tests/models/test_parity.py"
    ),
)

_STATUS = "implemented"
_COLUMNS = ("kind", "name", "status", "evidence", "what")


FLAGS = (Switch("json", False, "print a JSON list"),)


def run(values: flags.FlagValues) -> int:
    """Runs the command; returns the exit code."""
    rows = [row for registry in REGISTRIES for row in entries(registry)]
    if values.json:
        json.dump(rows, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        print(table(rows))
    return 0


def entries(registry: Registry) -> Iterator[dict[str, Any]]:
    """Yields a row for everything that is registered.

    Args:
      registry: Where to look.

    Yields:
      `kind`, `name`, `status`, `evidence` (a test of the repository), `what`, `source`
      (the paper, or None), `options` with their defaults, and the `module`.
    """
    found: Mapping[str, Any] = getattr(
        importlib.import_module(registry.module), registry.name
    )
    for name, entry in found.items():
        is_method = inspect.isclass(entry)
        module = entry.__module__ if is_method else registry.module
        about = inspect.getdoc(entry) or "" if is_method else ""
        what = _first_sentence(about) or ", ".join(entry.architectures)
        yield {
            "kind": registry.kind,
            "name": name,
            "status": _STATUS,
            "evidence": registry.evidence.format(module=module.rsplit(".", 1)[1]),
            "what": what,
            "source": _source(about),
            "options": _options(entry) if is_method else {},
            "module": module,
        }


def _first_sentence(about: str) -> str:
    return " ".join(about.split("\n\n")[0].split())


def _source(about: str) -> str | None:
    """Returns the paper that a docstring names behind `Source:`."""
    for paragraph in about.split("\n\n"):
        if paragraph.startswith("Source:"):
            return " ".join(paragraph.removeprefix("Source:").split())
    return None


def _options(method: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(method):
        return {}
    return {
        field.name: None
        if field.default is dataclasses.MISSING
        else field.default
        if isinstance(field.default, bool | int | float | str | None)
        else str(field.default)
        for field in dataclasses.fields(method)
        if field.init
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as text, as wide as the terminal."""
    header = {name: name for name in _COLUMNS}
    shown = [header, *rows]
    widths = {n: max(len(row[n]) for row in shown) for n in _COLUMNS[:-1]}
    lines = []
    for row in shown:
        head = "".join(row[name].ljust(widths[name] + 2) for name in widths)
        width = max(shutil.get_terminal_size((120, 24)).columns, len(head) + 24)
        text = textwrap.fill(
            row[_COLUMNS[-1]],
            width,
            initial_indent=head,
            subsequent_indent=" " * len(head),
        )
        lines.append(text)
    return "\n".join(lines)


if __name__ == "__main__":
    from jaxllm.cli.main import main

    sys.exit(main(["systems", *sys.argv[1:]]))

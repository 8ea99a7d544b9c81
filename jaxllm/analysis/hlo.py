"""Reading a compiled program's text: what it sends, copies and calls."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

__all__ = ["Collective", "Program", "read_program"]

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_COPY = re.compile(r"= (.*?) copy(-start)?\(")
_FUSION = re.compile(r"= (.*?) fusion\(.*calls=%?([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|called_computations|"
    r"true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_KERNEL = re.compile(
    r"%?([\w.-]+) = .*custom-call\(.*custom_call_target=\"tpu_custom_call\""
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind at one depth of loops, on one device.

    Attributes:
      kind: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"`,
        `"collective-permute"` or `"all-to-all"`.
      loop_depth: How many loops they stand in: 0 outside all, 1 in the decode loop, 2
        in its loop over layers.
      count: How many stand in the text; one in a loop runs once a turn.
      bytes: Of all their results, each once.
      largest_bytes: Of the largest result.
    """

    kind: str
    loop_depth: int
    count: int
    bytes: int
    largest_bytes: int

    @property
    def in_loop(self) -> bool:
        """Whether they run once a turn of a loop."""
        return self.loop_depth > 0


@dataclasses.dataclass(frozen=True)
class Program:
    """What was read of a program.

    Attributes:
      collectives: By kind and depth.
      kernels: Mosaic kernels by name, and how many calls of each stand in the text.
      largest_copy_bytes: Of the largest array that is copied.
    """

    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    largest_copy_bytes: int


def read_program(text: str) -> Program:
    """Reads the text of a compiled program.

    Args:
      text: As `jax.stages.Compiled.as_text` gives it.
    """
    bodies = dict(_computations(text))
    depth = _depths(bodies)
    fused = {
        called
        for lines in bodies.values()
        for line in lines
        if " fusion(" in line
        for called in re.findall(r"calls=%?([\w.-]+)", line)
    }
    sizes: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    kernels: collections.Counter[str] = collections.Counter()
    largest = 0
    for name, lines in bodies.items():
        for line in lines:
            if found := _COLLECTIVE.search(line):
                started = found[3] is not None and found[2] != "all-reduce"
                sizes[found[2], depth[name]].append(_nbytes(found[1], started))
            elif found := _KERNEL.search(line):
                kernels[re.sub(r"\.\d+$", "", found[1])] += 1
            elif name not in fused:
                largest = max(largest, _copied(line, bodies))
    collectives = tuple(
        Collective(kind, loops, len(each), sum(each), max(each))
        for (kind, loops), each in sorted(sizes.items())
    )
    return Program(collectives, dict(kernels), largest)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, list[str]()
    for line in text.splitlines():
        if name is None:
            found = _HEAD.match(line)
            if found:
                name, lines = found[1], []
        elif line.startswith("}"):
            yield name, lines
            name = None
        else:
            lines.append(line)


def _depths(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Returns how many loops every computation stands in."""
    callers: dict[str, set[tuple[str, int]]] = collections.defaultdict(set)
    for name, lines in bodies.items():
        for line in lines:
            for how, several, one in _CALLED.findall(line):
                turn = int(how in ("body", "condition"))
                for called in re.findall(r"[\w.-]+", several or one):
                    callers[called].add((name, turn))

    @functools.cache
    def depth(name: str) -> int:
        return max((depth(c) + turn for c, turn in callers[name]), default=0)

    return {name: depth(name) for name in bodies}


def _copied(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns the bytes that an instruction outside fusions copies."""
    if found := _COPY.search(line):
        return _nbytes(found[1], found[2] is not None)
    found = _FUSION.search(line)
    # Where the result takes the operand's place nothing moves.
    if not found or "output_to_operand_aliasing" in line:
        return 0
    root = next((x for x in bodies.get(found[2], ()) if "ROOT" in x), "")
    return _nbytes(found[1], False) if _COPY.search(root) else 0


def _nbytes(text: str, only_largest: bool) -> int:
    """Returns the bytes of an instruction's result.

    Args:
      text: The result's type: an array or a tuple of arrays.
      only_largest: Of an instruction that was started, which gives operands and results
        at once.
    """
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8
        for dtype, dims in _ARRAY.findall(text)
    ]
    return max(sizes, default=0) if only_largest else sum(sizes)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8

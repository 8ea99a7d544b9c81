"""What machines can do at most: a table of datasheets, and a probe of this CPU.

A name such as `v5e:2x4` is a generation and how its chips are laid out; `parse_slice`
reads it. Figures of accelerators are their makers', without sparsity; no program
reaches them.
"""

import concurrent.futures
import dataclasses
import math
import os
import time
from collections.abc import Mapping

import numpy as np

from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import unknown_name
from jaxllm.training.throughput import peak_flops

__all__ = ["HARDWARE", "Hardware", "Slice", "parse_slice", "probe_cpu"]

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One chip.

    Attributes:
      name: As `--hardware` spells it.
      memory_bytes: Memory of a chip, in bytes.
      bandwidth: Bytes a second from that memory.
      peaks: Operations a second by dtype of the operands; a multiplication and an
        addition are two. `peak` says what stands for a dtype that is not here.
      interconnect: Bytes a second that a chip sends to others over all its links, in
        one direction; 0 where there are no others.
      source: Where the figures are from.
      date: When they were taken from there, or measured.
      layout: How many axes the arrangement of chips has, 0 for a machine of one.
      most_chips: Chips of the largest machine.
      devices_per_chip: Devices that jax sees in a chip, which share all of the above.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    peaks: Mapping[str, float] = dataclasses.field(hash=False)
    interconnect: float
    source: str
    date: str
    layout: int = 0
    most_chips: int = 1
    devices_per_chip: int = 1

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler knows it."""
        return self.layout > 1

    def peak(self, dtype: str) -> float:
        """Returns operations a second with operands of a dtype.

        Where the sheet has no figure for it, that for bfloat16 stands: a TPU multiplies
        float32 in passes of bfloat16, and int8 on a chip without integer units is
        widened. On a CPU, where only float32 is measured, that.
        """
        if dtype in self.peaks:
            return self.peaks[dtype]
        return self.peaks.get("bfloat16", self.peaks.get("float32", 0.0))

    def device(self) -> "Hardware":
        """Returns one device of the chip, with its share of everything."""
        ways = self.devices_per_chip
        return dataclasses.replace(
            self,
            memory_bytes=self.memory_bytes // ways,
            bandwidth=self.bandwidth / ways,
            peaks={dtype: peak / ways for dtype, peak in self.peaks.items()},
            interconnect=self.interconnect / ways,
            devices_per_chip=1,
        )


_CLOUD = "datasheet: cloud.google.com/tpu/docs/"
_NVIDIA = "datasheet: nvidia.com/en-us/data-center/"

HARDWARE: dict[str, Hardware] = {
    "v4": Hardware(
        name="v4",
        memory_bytes=32 * _GIB,
        bandwidth=1.2e12,
        peaks={"bfloat16": 275e12, "int8": 275e12},
        interconnect=300e9,
        source=_CLOUD + "v4, links from the TPU v4 paper (arXiv 2304.01433)",
        date="2026-11",
        layout=3,
        most_chips=4096,
    ),
    "v5e": Hardware(
        name="v5e",
        memory_bytes=16 * _GIB,
        bandwidth=819e9,
        peaks={"bfloat16": 197e12, "int8": 393e12},
        interconnect=200e9,
        source=_CLOUD + "v5e",
        date="2026-11",
        layout=2,
        most_chips=256,
    ),
    "v5p": Hardware(
        name="v5p",
        memory_bytes=95 * _GIB,
        bandwidth=2765e9,
        peaks={"bfloat16": 459e12, "int8": 918e12},
        interconnect=600e9,
        source=_CLOUD + "v5p, int8 from the announcement of v5p",
        date="2026-11",
        layout=3,
        most_chips=6144,
    ),
    "v6e": Hardware(
        name="v6e",
        memory_bytes=32 * _GIB,
        bandwidth=1638e9,
        peaks={"bfloat16": 918e12, "int8": 1836e12},
        interconnect=400e9,
        source=_CLOUD + "v6e",
        date="2026-11",
        layout=2,
        most_chips=256,
    ),
    "tpu7x": Hardware(
        name="tpu7x",
        memory_bytes=192 * _GIB,
        bandwidth=7380e9,
        peaks={"bfloat16": 2307e12, "float8": 4614e12},
        interconnect=600e9,
        source=_CLOUD + "tpu7x",
        date="2026-11",
        layout=3,
        most_chips=9216,
        devices_per_chip=2,
    ),
    "a100": Hardware(
        name="a100",
        memory_bytes=80 * 10**9,
        bandwidth=2039e9,
        peaks={"bfloat16": 312e12, "int8": 624e12, "float32": 156e12},
        interconnect=300e9,
        source=_NVIDIA + "a100, SXM 80 GB; float32 as TF32",
        date="2026-11",
        layout=1,
        most_chips=8,
    ),
    "h100": Hardware(
        name="h100",
        memory_bytes=80 * 10**9,
        bandwidth=3350e9,
        peaks={
            "bfloat16": 989e12,
            "int8": 1979e12,
            "float8": 1979e12,
            "float32": 494e12,
        },
        interconnect=450e9,
        source=_NVIDIA + "h100, SXM; float32 as TF32",
        date="2026-11",
        layout=1,
        most_chips=8,
    ),
    "h200": Hardware(
        name="h200",
        memory_bytes=141 * 10**9,
        bandwidth=4800e9,
        peaks={
            "bfloat16": 989e12,
            "int8": 1979e12,
            "float8": 1979e12,
            "float32": 494e12,
        },
        interconnect=450e9,
        source=_NVIDIA + "h200, SXM; float32 as TF32",
        date="2026-11",
        layout=1,
        most_chips=8,
    ),
}
"""Every accelerator; `cpu` is measured where it is asked for."""

_NAMES = (*HARDWARE, "cpu")
_EXAMPLES = {1: "8", 2: "2x4", 3: "2x2x1"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some chips of one kind.

    Attributes:
      hardware: The kind.
      topology: How many chips along each axis; `(1,)` or `(1, 1, 1)` for one.
    """

    hardware: Hardware
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.topology)

    @property
    def devices(self) -> int:
        """Number of devices that jax sees."""
        return self.chips * self.hardware.devices_per_chip

    @property
    def name(self) -> str:
        """Such as `v5e:2x4`."""
        if not self.hardware.layout:
            return self.hardware.name
        return f"{self.hardware.name}:{'x'.join(map(str, self.topology))}"


def parse_slice(text: str) -> Slice:
    """Parses what `--hardware` takes.

    Args:
      text: A name of `HARDWARE` for one chip, with `:2x4` (v5e, v6e), `:2x2x1` (v4,
        v5p, tpu7x) or `:8` (GPUs) for several; or `cpu`, which is then measured.

    Raises:
      ConfigError: The name is unknown, or the chips cannot stand like that.
    """
    name, colon, shape = text.partition(":")
    if name not in _NAMES:
        raise unknown_name("hardware", name, _NAMES)
    if name == "cpu":
        if colon:
            raise _wrong_topology(text, "cpu alone, which is this machine")
        return Slice(probe_cpu(), (1,))
    hardware = HARDWARE[name]
    if not colon:
        return Slice(hardware, (1,) * hardware.layout)
    parts = shape.split("x")
    example = _EXAMPLES[hardware.layout]
    digits = all(part.isascii() and part.isdigit() for part in parts)
    if len(parts) != hardware.layout or not digits:
        raise _wrong_topology(
            text, f"chips along {hardware.layout} axes, such as {name}:{example}"
        )
    found = Slice(hardware, tuple(int(part[:9]) for part in parts))
    if not 1 <= found.chips <= hardware.most_chips:
        raise _wrong_topology(text, f"1 to {hardware.most_chips} chips")
    return found


def _wrong_topology(text: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"cannot analyze: hardware {text!r} is no such machine, expected {wanted}. "
        "Correct --hardware."
    )


def probe_cpu() -> Hardware:
    """Measures this machine, in about a second.

    Returns:
      Its memory, how fast all its cores together read it, and the best of a few large
      float32 products.
    """
    return Hardware(
        name="cpu",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=_read_bandwidth(),
        peaks={"float32": peak_flops() or 0.0},
        interconnect=0.0,
        source="measured on this machine, beside whatever else ran",
        date=time.strftime("%Y-%m-%d"),
    )


def _read_bandwidth(megabytes: int = 256, rounds: int = 4) -> float:
    """Returns bytes a second, read by a thread for each core."""
    affinity = getattr(os, "sched_getaffinity", None)
    threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    # Written, not only allocated: untouched pages all read the same zero page.
    words = np.ones(megabytes * 2**20 // 8, np.uint64)
    # Many pieces, so that no thread waits long for a slow one.
    parts = np.array_split(words, threads * 16)
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in pool.map(np.bitwise_or.reduce, parts):
                pass
            best = max(best, words.nbytes / (time.perf_counter() - start))
    return best

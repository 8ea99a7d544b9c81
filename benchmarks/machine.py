"""What the machine can do and what it is: read bandwidth, peak memory, versions."""

import concurrent.futures
import importlib.metadata
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "OtherWork",
    "ReadBandwidth",
    "available_cores",
    "environment",
    "load_average",
    "peak_bytes",
    "use_cores",
]

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "torch",
    "transformers",
    "ctranslate2",
    "llama-cpp-python",
)


class ReadBandwidth:
    """Measures how fast all threads together read memory.

    Each thread reduces a part of its own of an array many times larger than the last
    level of cache. Which reduction is fastest depends on the build of numpy, so several
    are timed and the fastest counts: a low figure would flatter a share of it.
    """

    _REDUCTIONS: tuple[Callable[[np.ndarray], Any], ...] = (
        np.max,
        lambda x: np.bitwise_or.reduce(x.view(np.uint64)),
    )

    def __init__(self, threads: int, megabytes: int = 512):
        # Written, not only allocated: untouched pages all read the same zero page.
        array = np.ones(megabytes * 2**20 // 4, np.float32)
        self._bytes = array.nbytes
        # Many pieces, so that no thread waits long for a slow one.
        self._parts = np.array_split(array, threads * 16)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.measure()

    def measure(self) -> float:
        """Returns bytes per second of the fastest reduction."""
        best = 0.0
        for reduction in self._REDUCTIONS:
            start = time.perf_counter()
            for _ in self._pool.map(reduction, self._parts):
                pass
            best = max(best, self._bytes / (time.perf_counter() - start))
        return best


class OtherWork:
    """Watches how busy other processes keep the machine.

    They do not slow all alike: a library whose threads meet at barriers waits whenever
    one of them has lost its core. Ratios measured beside other work mean nothing.
    """

    def __init__(self, own: list[int]):
        """Starts watching; `own` are the ids of processes that are not others."""
        self._own = own
        self._start = self._read()

    def cores(self) -> float | None:
        """Returns how many cores others used since the start; None if unknown."""
        end = self._read()
        if self._start is None or end is None:
            return None
        seconds, used = (b - a for a, b in zip(self._start, end, strict=True))
        return round(max(0.0, used / seconds), 2) if seconds else None

    def _read(self) -> tuple[float, float] | None:
        """Returns the time and the CPU seconds of all others so far."""
        try:
            ticks = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()
            user, nice, system, _, _, irq, softirq, steal = map(int, ticks[1:9])
            busy = user + nice + system + irq + softirq + steal
            for pid in self._own:
                stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
                # The second field, a name in brackets, may hold anything.
                busy -= sum(map(int, stat.rpartition(")")[2].split()[11:13]))
        except (OSError, ValueError):
            return None
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK")


def peak_bytes() -> int:
    """Returns the most memory that this process has had resident."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Not the first choice: on Linux a child begins with the peak of its parent.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def use_cores(threads: int) -> None:
    """Keeps this process and its later threads on the first cores it may use.

    XLA sizes its thread pool by this set and has no setting of its own.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def available_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Returns versions and hardware, without the machine's name or any path."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": available_cores(),
    }


def load_average() -> float | None:
    """Returns how many processes wanted to run over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()

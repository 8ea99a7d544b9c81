"""What a user sees of a run on stderr: a bar, the cost, the totals."""

import json
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import jax

from jaxllm.api import Result
from jaxllm.decoding.payoff import acceptance_by_depth

__all__ = ["Bar", "Meter", "note"]

_COMPILING = "/jax/core/compile/"


def note(text: str, command: str = "generate") -> None:
    """Prints a line to stderr, of several processes the first."""
    if jax.process_index() == 0:
        print(f"jaxllm {command}: {text}", file=sys.stderr, flush=True)


class Meter:
    """Sums over results, and time spent compiling.

    Use it as a context: compiling is counted only inside.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self.rows = self.failed = 0
        self._counts = dict.fromkeys(
            ("prompt_tokens", "new_tokens", "emitted", "drafted", "target_passes"), 0
        )
        self._accepted: list[int] = []
        self._tested: list[int] = []
        self._seconds = self._compiling = 0.0

    def __enter__(self) -> "Meter":
        """Begins to count time."""
        self._begun = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops counting."""
        self._seconds += time.perf_counter() - self._begun
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_COMPILING):
            self._compiling += duration_secs

    @property
    def tokens(self) -> int:
        """New tokens so far."""
        return self._counts["new_tokens"]

    def add(self, prompt_tokens: int, result: Result) -> None:
        """Adds a result."""
        self.rows += 1
        self._counts["prompt_tokens"] += prompt_tokens
        self._counts["new_tokens"] += len(result.token_ids)
        for name in ("emitted", "drafted", "target_passes"):
            self._counts[name] += result.stats[name]
        self._accepted = _sum(self._accepted, result.stats["accepted"])
        self._tested = _sum(self._tested, result.stats["tested"])

    def totals(self) -> dict[str, Any]:
        """Returns the sums as one flat object.

        `seconds` is all of generating; `compile_seconds` is the part of it in which
        programs were traced, compiled or read from the cache, which is left out of
        `tokens_per_second`. A pass counts once for every row that took part in it.
        `emitted` counts tokens behind a stop string too, which passes were spent on.
        """
        passes = self._counts["target_passes"]
        acceptance = acceptance_by_depth(self._accepted, self._tested)
        running = self._seconds - self._compiling
        return {
            "rows": self.rows,
            "failed": self.failed,
            **self._counts,
            "tokens_per_pass": round(self._counts["emitted"] / max(passes, 1), 4),
            "acceptance_by_depth": [round(share, 4) for share in acceptance],
            "seconds": round(self._seconds, 3),
            "compile_seconds": round(self._compiling, 3),
            "tokens_per_second": round(self.tokens / running, 1) if running > 0 else 0,
        }

    def print_totals(self) -> None:
        """Prints the totals to stderr as a line of JSON."""
        print(json.dumps(self.totals()), file=sys.stderr, flush=True)


def _sum(first: list[int], second: Iterable[int]) -> list[int]:
    second = list(second)
    width = max(len(first), len(second))
    first, second = ([*x, *[0] * (width - len(x))] for x in (first, second))
    return [a + b for a, b in zip(first, second, strict=True)]


class Bar:
    """A progress bar with tokens a second and the time left, on terminals only."""

    def __init__(self, total: int | None, done: int = 0):
        """Makes the bar, not visible yet.

        Args:
          total: Rows of the job; None where that is not known.
          done: Rows that were there before.
        """
        self._total, self._done = total, done
        self._bar: Any = None
        self._begun = 0.0

    def start(self) -> None:
        """Shows the bar; what is to stand above it has been printed."""
        self._begun = time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, initial=self._done, unit="row", file=sys.stderr
            )

    def __enter__(self) -> "Bar":
        """Returns the bar."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def step(self, rows: int, tokens: int) -> None:
        """Moves on.

        Args:
          rows: Rows done since the last step.
          tokens: New tokens of all rows of this run.
        """
        if self._bar is not None:
            rate = tokens / max(time.perf_counter() - self._begun, 1e-9)
            self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            self._bar.update(rows)

"""A process for each contender, so that none disturbs another.

Thread pools and OpenMP runtimes of several libraries in one process get in each
other's way, and an idle process that waits at a pipe costs nothing. A contender whose
software is absent or fails says why and leaves; the others go on.
"""

import dataclasses
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.machine import peak_bytes, use_cores
from benchmarks.peers import KINDS, Contender

__all__ = ["ContenderError", "Job", "Worker"]


class ContenderError(RuntimeError):
    """A contender cannot take part; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is timed.

    Attributes:
      prompts: Token ids of each row, of equal length.
      count: New tokens of each row.
    """

    prompts: list[list[int]]
    count: int


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, kind: str, *options: Any):
        """Starts the process, and does not wait for it.

        Args:
          kind: A name of `KINDS`.
          *options: As for `Contender`: directory, dtype, threads, scratch.
        """
        # A fresh interpreter: a forked one would share thread pools and peak memory.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, kind, options), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid or 0

    def ask(self, question: str, *args: Any) -> Any:
        """Returns the answer of `_Answers`.

        Raises:
          ContenderError: The contender is absent, failed, or died.
        """
        try:
            self._pipe.send((question, args))
            failed, answer = self._pipe.recv()
        except (EOFError, OSError) as cause:
            self._process.join(10)
            code = self._process.exitcode
            raise ContenderError(f"its process ended with code {code}") from cause
        if failed:
            raise ContenderError(answer)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


class _Answers:
    """The contender's end: every public method answers a question of that name."""

    def __init__(self, contender: Contender):
        self._contender = contender

    def warm_up(self, job: Job) -> dict[str, Any]:
        """Runs everything that is timed later, twice; says what the first time cost."""
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            tokens = self._contender.generate(job.prompts, job.count)
            self._contender.first(job.prompts, job.count)
            seconds.append(time.perf_counter() - start)
        return {
            "tokens": tokens,
            "compile_seconds": max(0.0, seconds[0] - seconds[1]),
            "peak_bytes": peak_bytes(),
        }

    def measure(self, job: Job) -> dict[str, Any]:
        """Times a run to the first token, and a whole run."""
        # While others had their turn, caches and threads went cold.
        self._contender.first(job.prompts, job.count)
        start = time.perf_counter()
        first = self._contender.first(job.prompts, job.count)
        middle = time.perf_counter()
        tokens = first
        if job.count > 1:
            tokens = self._contender.generate(job.prompts, job.count)
        end = time.perf_counter()
        _check([len(row) for row in first], len(job.prompts), 1)
        _check([len(row) for row in tokens], len(job.prompts), job.count)
        first_seconds = middle - start
        return {
            "first_seconds": first_seconds,
            "total_seconds": end - middle if job.count > 1 else first_seconds,
        }

    def margin(self, *args: Any) -> dict[str, float]:
        """Asks the reference how close a choice was."""
        return self._contender.margin(*args)


def _check(lengths: list[int], rows: int, count: int) -> None:
    """Equal work: a row that stopped early, or ran on, is no measurement."""
    if lengths != [count] * rows:
        raise ContenderError(f"made {lengths} tokens, expected {count} for each row")


def _serve(pipe: Connection, kind: str, options: tuple[Any, ...]) -> None:
    """Loads a contender and answers until the parent hangs up."""
    *_, threads, _ = options
    use_cores(threads)
    # Read by the OpenMP runtimes as they load, before any library can be asked.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    answers, problem = None, ""
    try:
        answers = _Answers(KINDS[kind](*options))
    except Exception as error:
        problem = _one_line(error)
    while True:
        try:
            question, args = pipe.recv()
        except EOFError:
            return
        if answers is None:
            pipe.send((True, problem))
            continue
        try:
            pipe.send((False, getattr(answers, question)(*args)))
        except Exception as error:
            pipe.send((True, _one_line(error)))


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]

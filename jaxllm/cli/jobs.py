"""Many rows through one model: read, batched, generated, written, counted."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxllm import api
from jaxllm.cli.output import Results
from jaxllm.cli.progress import Bar, Meter, note
from jaxllm.cli.rows import Failure, Row
from jaxllm.cli.tasks import Settings, Task, batches, make_tasks, shape_of
from jaxllm.core.errors import UserError
from jaxllm.decoding import BoundDrafter

__all__ = ["BatchJob", "generate_batch"]

_AHEAD_ROWS = 10_000


def generate_batch(
    lm: api.LanguageModel, drafter: BoundDrafter, batch: list[Task]
) -> list[api.Result]:
    """Generates for tasks with equal `max_new_tokens` and stop strings."""
    sampling: dict[str, Any] = {
        name: [task.sampling[name] for task in batch] for name in batch[0].sampling
    }
    return api.generate(
        lm,
        [task.ids for task in batch],
        drafter=drafter,
        max_new_tokens=batch[0].max_new_tokens,
        stop=batch[0].stop,
        seed=[task.seed for task in batch],
        **sampling,
        **batch[0].shared,
    )


@dataclasses.dataclass
class BatchJob:
    """Rows of one input on their way to one output.

    Attributes:
      lm: The model.
      drafter: How tokens are proposed.
      settings: What holds for every row.
      results: Where rows go.
      meter: Counts them.
      first_error: Of the first row that failed.
    """

    lm: api.LanguageModel
    drafter: BoundDrafter
    settings: Settings
    results: Results
    meter: Meter
    first_error: str = ""

    def run(
        self, rows: Iterable[Row | Failure], bar: Bar, look_ahead: bool = True
    ) -> None:
        """Works through the rows; those that are there already are left alone.

        A batch of which a row is missing is computed whole, as in the first run: so a
        job that was killed ends with the very rows of one that was not.

        Args:
          rows: In the order of their lines.
          bar: Shows how far it is.
          look_ahead: Whether reading may run ahead, to tell the cost.
        """
        stream = batches(self._tasks(rows))
        ahead = list(_until_rows(stream, _AHEAD_ROWS)) if look_ahead else []
        self._tell_cost(ahead, whole=look_ahead and _rows(ahead) < _AHEAD_ROWS)
        bar.start()
        for item in itertools.chain(ahead, stream):
            if isinstance(item, Failure):
                bar.step(self._fail(item), self.meter.tokens)
                continue
            missing = [task for task in item if not self._is_there(task)]
            if missing:
                self._run_batch(item)
            bar.step(len(missing), self.meter.tokens)

    def _tasks(self, rows: Iterable[Row | Failure]) -> Iterator[list[Task] | Failure]:
        for row in rows:
            if isinstance(row, Failure):
                yield row
                continue
            try:
                yield make_tasks(self.lm, row, self.settings)
            except UserError as error:
                yield Failure.of(row.line, row.id, error)

    def _is_there(self, task: Task) -> bool:
        # As done, or as failed, which is known by its line.
        done, failed = ("id", task.id, task.sample), ("line", task.line, task.sample)
        return self.results.has([done, failed])

    def _run_batch(self, batch: list[Task]) -> None:
        try:
            results = generate_batch(self.lm, self.drafter, batch)
        except UserError as error:
            if len(batch) == 1:
                task = batch[0]
                self._fail(Failure.of(task.line, task.id, error, task.sample))
                return
            # One row spoils a batch, such as one that makes the model overflow.
            for task in batch:
                if not self._is_there(task):
                    self._run_batch([task])
            return
        written = []
        for task, result in zip(batch, results, strict=True):
            if not self._is_there(task):
                written.append(self._result_row(task, result))
                self.meter.add(len(task.ids), result)
        self.results.write(written)

    def _result_row(self, task: Task, result: api.Result) -> dict[str, Any]:
        sample = {"sample": task.sample} if self.settings.num_samples > 1 else {}
        return {
            "id": task.id,
            **sample,
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "prompt_tokens": len(task.ids),
            "new_tokens": len(result.token_ids),
            "target_passes": result.stats["target_passes"],
            "seconds": round(result.stats["seconds"], 4),
        }

    def _fail(self, failure: Failure) -> int:
        """Writes a failure, unless it is there; returns how many rows that were."""
        self.first_error = self.first_error or failure.error
        if self.results.has([("line", failure.line, failure.sample)]):
            return 0
        self.meter.failed += 1
        sample = {"sample": failure.sample} if failure.sample else {}
        row: dict[str, Any] = {
            "id": failure.id,
            **sample,
            "line": failure.line,
            "text": "",
            "token_ids": [],
            "finish_reason": "error",
            "prompt_tokens": 0,
            "new_tokens": 0,
            "target_passes": 0,
            "seconds": 0.0,
            "error": failure.error,
        }
        self.results.write([row])
        return 1

    def _tell_cost(self, ahead: list[list[Task] | Failure], whole: bool) -> None:
        """Says what the run will take, where there is anything to run."""
        todo = [
            item
            for item in ahead
            if not isinstance(item, Failure) and not all(map(self._is_there, item))
        ]
        if not todo:
            return
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.lm.params))
        shapes = len({shape_of(batch, self.drafter.drafter) for batch in todo})
        passes = sum(max(task.max_new_tokens for task in batch) for batch in todo)
        note(
            f"parameters {size / 1e6:.4g} MB, rows {_rows(todo)}"
            f"{'' if whole else ' and more'}, batches {len(todo)}, shapes to compile "
            f"{shapes}, target passes at most {passes}"
        )


def _rows(items: Iterable[list[Task] | Failure]) -> int:
    return sum(1 if isinstance(item, Failure) else len(item) for item in items)


def _until_rows(
    items: Iterator[list[Task] | Failure], limit: int
) -> Iterator[list[Task] | Failure]:
    count = 0
    while count < limit:
        try:
            item = next(items)
        except StopIteration:
            return
        count += _rows([item])
        yield item

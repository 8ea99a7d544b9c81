"""The run: batches through the jitted step, and on the host what belongs to it.

Metrics of a step are read while the next one runs, so the device never waits for the
host. Whatever a resumed run needs is in the checkpoint: state, counts and the position
of the data; the randomness of a step is folded from its number.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints import LanguageModel
from jaxllm.checkpoints.files import replacing
from jaxllm.checkpoints.locks import locked
from jaxllm.checkpoints.save import workdir_config, write_companions
from jaxllm.checkpoints.workdir import describe_step, find_steps
from jaxllm.core.errors import ConfigError
from jaxllm.core.partition import join
from jaxllm.core.sharding import make_mesh
from jaxllm.training import metrics as files
from jaxllm.training.checkpoints import Checkpointer
from jaxllm.training.config import (
    FREE,
    Memory,
    TrainConfig,
    describe,
    differences,
)
from jaxllm.training.evaluation import evaluate_loss, sample_texts
from jaxllm.training.interruption import Interruption, agreed
from jaxllm.training.optimizers import make_optimizer, make_schedule
from jaxllm.training.start import lay_out, start
from jaxllm.training.step import Frozen, TrainState, init_state, train_step
from jaxllm.training.streams import Stream, open_stream, place
from jaxllm.training.throughput import flops_per_token, peak_flops

__all__ = ["DivergedError", "Hook", "PreemptedError", "Run", "fit"]

CONFIG_NAME = "train_config.json"
_AHEAD = 2

Hook = Callable[[int, LanguageModel], Mapping[str, float]]
"""Measures a model at a step; its numbers are written under their names."""


class DivergedError(Exception):
    """Gradients were not finite too often; the message says what to do."""


class PreemptedError(Exception):
    """The run was asked to stop, and has saved what it did."""


def fit(
    config: TrainConfig,
    workdir: str | Path,
    *,
    hooks: Sequence[Hook] = (),
    memory: Memory | None = None,
    allow: Sequence[str] = (),
) -> LanguageModel:
    """Trains a model, or goes on with the run that a workdir holds.

    Args:
      config: The run.
      workdir: Where everything goes; made if absent.
      hooks: Called at every evaluation.
      memory: From the tokenizer to the sources of format `"memory"`, by name.
      allow: Fields of the configuration that may differ from the saved run's.

    Returns:
      The model with the last parameters.

    Raises:
      UserError: The configuration, the data or the workdir cannot be used.
      DivergedError: Loss or gradients were not finite for too many steps in a row.
      PreemptedError: A SIGTERM came; the step is saved.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            workdir.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(workdir, "cannot train", "--workdir"))
        interruption = stack.enter_context(Interruption())
        run = Run(config, workdir, hooks=hooks, memory=memory, allow=allow)
        stack.callback(run.close)
        run.train(interruption)
        return run.lm


@dataclasses.dataclass
class _Counts:
    """What a checkpoint remembers beside arrays.

    Attributes:
      tokens: Tokens that were learned from.
      seconds: Time in steps.
    """

    tokens: int = 0
    seconds: float = 0.0


class Run:
    """A run in its workdir.

    Attributes:
      config: What it does.
      state: Where it is; given away to every step.
      step: Steps done.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path,
        *,
        hooks: Sequence[Hook] = (),
        memory: Memory | None = None,
        allow: Sequence[str] = (),
    ):
        """Prepares everything, and resumes; arguments as for `fit`."""
        self.config, self.workdir, self._hooks = config, workdir, hooks
        self._check_rows()
        workdir.mkdir(parents=True, exist_ok=True)
        self._lead = jax.process_index() == 0
        self._keep_config(allow)
        begun = start(config)
        self._start = begun
        self._mesh = begun.lm.mesh
        self.objective, extra = config.objective.bind(begun.lm)
        self._frozen = Frozen(begun.fixed, extra)
        self._key = jax.random.key(config.seed)
        self._optimizer = make_optimizer(config.optimizer, config.steps)
        self._schedule = make_schedule(config.optimizer, config.steps)
        made = memory(begun.lm.tokenizer) if memory else None
        cache = workdir / "data"
        self._stream = open_stream(config.data, begun.lm.tokenizer, cache, made)
        self._held_back: Stream | None = None
        if config.evaluation is not None:
            held_back = config.evaluation.data
            self._held_back = open_stream(held_back, begun.lm.tokenizer, cache, made)
        self._checkpoints = Checkpointer(
            workdir, config.checkpoint, whole=config.lora is None
        )
        self.state, self.step, self._counts = self._resume(begun.trained)
        self._first = self.step + 1
        self._writers = self._open_writers()
        self._progress = files.Progress(config.steps, self.step) if self._lead else None
        self._peak = peak_flops() if self._lead else None
        self._loss: float | None = None

    def _check_rows(self) -> None:
        rows, parts = self.config.data.batch_rows, self.config.accumulate
        if rows % parts:
            raise ConfigError(
                f"cannot train: accumulate is {parts} for {rows} rows, expected a "
                f"divisor of data.batch_rows. Choose such a one."
            )
        if not self.config.mesh:
            return
        shape = make_mesh(self.config.mesh).shape
        ways = shape["data"] * shape["fsdp"]
        evaluation = self.config.evaluation
        asked = {"data": (rows, parts)}
        if evaluation is not None:
            asked["evaluation.data"] = (evaluation.data.batch_rows, 1)
        for name, (rows, parts) in asked.items():
            if rows % (parts * ways):
                raise ConfigError(
                    f"cannot train: {name}.batch_rows is {rows}, in {parts} parts, "
                    f"expected a multiple of {ways * parts} for the mesh "
                    f"{self.config.mesh}. Correct the rows, accumulate or mesh."
                )

    def _keep_config(self, allow: Sequence[str]) -> None:
        """Compares the configuration with the saved run's, and writes it."""
        path, own = self.workdir / CONFIG_NAME, describe(self.config)
        if path.exists():
            old = json.loads(path.read_text())
            free = (*FREE, *allow)
            wrong = [
                line
                for line in differences(old, own)
                if not any(
                    line.startswith((f"{field}:", f"{field}.")) for field in free
                )
            ]
            if wrong:
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise ConfigError(
                    f"cannot resume: {self.workdir}: the run there has another "
                    f"configuration ({'; '.join(wrong[:3])}{more}), expected the same. "
                    f"Use another --workdir, or --allow_config_change=FIELD."
                )
        if self._lead:
            with replacing(path, "cannot write the configuration") as file:
                file.write(json.dumps(own, indent=1).encode())

    def _resume(self, trained: Any) -> tuple[TrainState, int, _Counts]:
        mesh = self._mesh

        def make(params: Any) -> TrainState:
            return init_state(params, self._optimizer)

        places = lay_out(jax.eval_shape(make, trained), trained, mesh)
        # Compiled without donation: the parameters of a model that was loaded may be
        # somebody else's too.
        state = jax.jit(make, out_shardings=places)(trained)
        found = self._checkpoints.restore(state)
        if found is None:
            return state, 0, _Counts()
        position = found.meta["positions"]
        if len(position) != jax.process_count():
            raise ConfigError(
                f"cannot resume data: the position was saved by {len(position)} "
                f"processes, expected {jax.process_count()}. Run with as many."
            )
        self._stream.set_state(position[jax.process_index()])
        if self._lead:
            print(f"resumed at step {found.step}", file=sys.stderr, flush=True)
        return found.state, found.step, _Counts(**found.meta["counts"])

    def _open_writers(self) -> list[files.Writer]:
        if not self._lead:
            return []
        path = self.workdir / files.METRICS_NAME
        writers: list[files.Writer] = [files.JsonlWriter(path, self.step)]
        if self.config.tensorboard:
            folder = self.workdir / "tensorboard"
            writers.append(files.TensorBoardWriter(folder, self.step))
        return writers

    @property
    def lm(self) -> LanguageModel:
        """The model with the parameters as they are now."""
        params = join(self.state.params, self._frozen.params)
        return dataclasses.replace(self._start.lm, params=params)

    # --- Steps -------------------------------------------------------------------

    def train(self, interruption: Interruption) -> None:
        """Runs to the last step.

        Args:
          interruption: Asked after every step.

        Raises:
          DivergedError: See `fit`.
          PreemptedError: See `fit`.
        """
        config = self.config
        self._say_cost()
        pending: list[tuple[int, int, dict[str, jax.Array]]] = []
        clock, compiled = time.perf_counter(), False
        while self.step < config.steps:
            batch, tokens = self._next_batch()
            self.state, measured = self._do_step(batch)
            self.step += 1
            self._counts.tokens += tokens
            pending.append((self.step, tokens, measured))
            if not compiled:
                jax.block_until_ready(measured)
                compiled, now = True, time.perf_counter()
                self._write({"time/compile_s": now - clock})
                clock = now
            if len(pending) > _AHEAD:
                jax.block_until_ready(pending[-_AHEAD][2]["loss"])
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                now = time.perf_counter()
                self._counts.seconds += now - clock
                self._log(pending, now - clock)
                pending, clock = [], now
            stop, due = agreed(interruption.is_asked, self._checkpoints.due(self.step))
            # What is not training does not slow the reported rate down.
            clock += self._after_step(last, stop or due)
            if stop and not last:
                raise PreemptedError(f"preempted: saved step {self.step}")
        self._checkpoints.finish()
        if self._lead:
            lines = files.read_lines(self.workdir / files.METRICS_NAME)
            files.draw_curve(lines, self.workdir / files.CURVE_NAME)

    def _do_step(self, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        options: dict[str, Any] = {
            "model": self._start.lm.model,
            "objective": self.objective,
            "optimizer": self._optimizer,
            "parts": self.config.accumulate,
        }
        if self._mesh is None:
            return train_step(self.state, batch, self._key, self._frozen, **options)
        with jax.set_mesh(self._mesh):
            return train_step(self.state, batch, self._key, self._frozen, **options)

    def _next_batch(self) -> tuple[Any, int]:
        """Returns a batch on its devices, and how many tokens it holds."""
        try:
            batch = next(self._stream)
        except StopIteration:
            raise ConfigError(
                f"cannot train: the data ended after step {self.step}, expected enough "
                f"for {self.config.steps}. Leave out data.epochs, or lower steps."
            ) from None
        # Counted on the host: a device would answer behind the step that it runs.
        tokens = _tokens(batch) * jax.process_count()
        return place(batch, self._mesh), tokens

    def _after_step(self, last: bool, is_due: bool) -> float:
        """Evaluates, samples and saves where it is time; returns the seconds spent."""
        config = self.config
        evaluation, sample = config.evaluation, config.sample
        self._checkpoints.poll()
        every = evaluation.every if evaluation else 0
        is_measured = bool(every) and (last or self.step % every == 0)
        is_sampled = bool(sample.prompts) and (last or self.step % sample.every == 0)
        is_saved = last or is_due
        if not (is_measured or is_sampled or is_saved):
            return 0.0
        # The steps under way are still training.
        jax.block_until_ready(self.state.step)
        begun = time.perf_counter()
        if is_measured and self._held_back is not None:
            self._evaluate(self._held_back)
        if is_sampled:
            texts, figures = sample_texts(self.lm, sample)
            self._write(figures)
            if self._lead:
                self._tell(f"step {self.step}: {texts[0]!r}")
                for i, text in enumerate(texts):
                    for writer in self._writers:
                        writer.write_text(self.step, f"sample/{i}", text)
        if is_saved:
            self.save()
        return time.perf_counter() - begun

    def save(self) -> None:
        """Begins to save the state as it is."""
        begun = time.perf_counter()
        lm = self._start.lm
        positions = gathered(self._stream.get_state())
        described = self.state.params if self.config.lora is None else None
        meta = {
            **describe_step(lm.model, described, workdir_config(lm)),
            "counts": dataclasses.asdict(self._counts),
            "positions": positions,
            "train_config": describe(self.config),
        }
        self._checkpoints.save(self.step, self.state, meta, loss=self._loss)
        if self._lead and self.config.lora is None:
            write_companions(lm, self.workdir)
        self._write({"time/checkpoint_s": time.perf_counter() - begun})

    def _evaluate(self, held_back: Stream) -> None:
        found = evaluate_loss(self.lm, held_back)
        self._loss = found["eval/loss"]
        for hook in self._hooks:
            found |= hook(self.step, self.lm)
        self._write(found)
        if self._lead:
            figures = ", ".join(f"{name} {x:.4f}" for name, x in found.items())
            self._tell(f"step {self.step}: {figures}")

    # --- Words -------------------------------------------------------------------

    def _log(
        self, pending: Sequence[tuple[int, int, dict[str, jax.Array]]], seconds: float
    ) -> None:
        """Writes the means of the last steps, and stops a run that has diverged."""
        values = [jax.device_get(measured) for _, _, measured in pending]
        skipped = max(float(v["skipped"]) for v in values)
        if skipped > self.config.max_skipped:
            raise DivergedError(self._diverged(int(skipped)))
        # The first step of a process stands before the clock, with its compile.
        timed = pending[1:] if pending[0][0] == self._first else pending
        tokens = sum(count for _, count, _ in timed)
        means = {
            f"train/{name}": float(np.mean([v[name] for v in values]))
            for name in values[0]
        }
        rate = tokens / max(seconds, 1e-9)
        means |= {
            "train/lr": float(self._schedule(jnp.int32(self.step - 1))),
            "train/tokens": float(self._counts.tokens),
            "train/tokens_per_s": rate,
            "time/step_s": seconds / max(len(timed), 1),
        }
        figures = [f"loss {means['train/loss']:.4f}", f"{rate:.0f} tokens/s"]
        if self._peak:
            length = getattr(self.config.data, "row_length", 0)
            flops = flops_per_token(self._start.lm.config, length)
            means["train/mfu"] = rate * flops / self._peak / jax.device_count()
            figures.append(f"mfu {means['train/mfu']:.2f}")
        self._write(means)
        if self._progress:
            self._progress.show(self.step, figures)

    def _diverged(self, skipped: int) -> str:
        good = self.step - skipped
        steps = find_steps(self.workdir)
        action = "lower the learning rate"
        if steps:
            action = f"restart from step {steps[-1]}, or {action}"
        return (
            f"loss is not finite for {skipped} consecutive steps (last good step "
            f"{good}); {action}"
        )

    def _write(self, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(self.step, scalars)

    def _tell(self, text: str) -> None:
        if self._progress:
            self._progress.say(text)

    def _say_cost(self) -> None:
        """Says what the run will take, before anything is compiled."""
        if not self._lead or self.step >= self.config.steps:
            return
        trained = sum(x.size for x in jax.tree.leaves(self.state.params))
        fixed = sum(x.size for x in jax.tree.leaves(self._frozen))
        size = sum(x.nbytes for x in jax.tree.leaves((self.state, self._frozen)))
        flops = flops_per_token(
            self._start.lm.config, getattr(self.config.data, "row_length", 0)
        )
        self._tell(
            f"parameters {trained} trained, {fixed} fixed; {size / 1e6:.4g} MB of "
            f"state; {flops:.3g} operations a token; steps {self.step} to "
            f"{self.config.steps} of {self.config.data.batch_rows} rows"
        )

    def close(self) -> None:
        """Writes what is left and lets go of files and threads."""
        self._stream.close()
        if self._held_back is not None:
            self._held_back.close()
        for writer in self._writers:
            writer.close()
        if self._progress:
            self._progress.close()
        self._checkpoints.close()


def _tokens(batch: Any) -> int:
    """Returns the tokens of a batch of numpy arrays, padding left out."""
    segments = getattr(batch, "segment_BT", None)
    if segments is None:
        return sum(x.size for x in jax.tree.leaves(batch) if x.ndim > 1)
    return int(np.count_nonzero(segments))


def gathered(state: Mapping[str, Any]) -> list[Any]:
    """Returns the JSON of every process, in their order."""
    if jax.process_count() == 1:
        return [dict(state)]
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)
    ]

"""Checkpoints of a run: written in the background, checked when read, damage survived.

    <workdir>/<step>/state/          {"params": ...} of a whole model, as
                                     `checkpoints.workdir` writes and loads it
    <workdir>/<step>/train/          what else a step changes, flat: path -> array
    <workdir>/<step>/meta/           JSON: what the workdir says of a model, the data
                                     iterators' states, counts
    <workdir>/<step>.manifest.json   bytes and SHA-256 of every file of the step

A step counts when its commit file and its manifest are there and agree with the files.
A damaged step is renamed to `<step>.corrupt`, and the one before it is taken.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoints.files import first_line, replacing
from jaxllm.checkpoints.workdir import find_steps
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.training.step import TrainState

__all__ = ["CheckpointConfig", "Checkpointer", "Restored"]

_SAVE, _LOAD = "cannot save checkpoint", "cannot load checkpoint"
_DIGEST_LIMIT = 2 << 30
_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved and what is kept.

    Attributes:
      every: Steps between two saves; the last step is saved too.
      min_seconds: Least time between two saves.
      keep: Last steps kept.
      keep_every: Multiples of this step are kept for good; 0 for none.
      keep_best: Steps with the lowest evaluation loss that are kept.
    """

    every: int = 200
    min_seconds: float = 180.0
    keep: int = 3
    keep_every: int = 0
    keep_best: int = 1

    def __post_init__(self) -> None:
        for name, low in {"every": 1, "keep": 1, "keep_every": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"cannot train: checkpoint.{name} is {getattr(self, name)}, "
                    f"expected {low} or more. Correct it."
                )


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave.

    Attributes:
      step: Its number.
      state: The train state, laid out like the one that was asked for.
      meta: The JSON beside it.
    """

    step: int
    state: TrainState
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one workdir; every process of a job makes one."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig | None = None,
        *,
        whole: bool = True,
    ):
        """Opens a workdir.

        Args:
          directory: Made if absent. What a killed run left half written is removed.
          config: When and what to keep.
          whole: Whether what is trained is a whole model, which then can be loaded from
            the workdir; False for an adapter.
        """
        self.whole = whole
        self.directory = directory.absolute()
        self.config = CheckpointConfig() if config is None else config
        self._manager = self._open()
        self._saved_at = time.monotonic()
        self._last = -1
        self._unfinished: int | None = None
        self._digests: Future | None = None
        self._pool = ThreadPoolExecutor(1)
        self._lead = jax.process_index() == 0

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(self.config.keep)]
        if self.config.keep_every:
            kept.append(policies.EveryNSteps(self.config.keep_every))
        if self.config.keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics["loss"],
                reverse=True,
                n=self.config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        mode = ocp.options.AtomicityMode.COMMIT_FILE
        options = ocp.CheckpointManagerOptions(
            create=True,
            atomicity_options=ocp.options.AtomicityOptions(mode=mode),
            preservation_policy=policies.AnyPreservationPolicy(kept),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    # --- Writing -----------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Returns whether a step is one that is saved."""
        rested = time.monotonic() - self._saved_at >= self.config.min_seconds
        return step % self.config.every == 0 and rested

    def save(
        self,
        step: int,
        state: TrainState,
        meta: Mapping[str, Any],
        *,
        loss: float | None = None,
    ) -> None:
        """Begins to save a step; the arrays may be donated as soon as this returns.

        Args:
          step: Its number; one that was saved last is not saved again.
          state: What the step left.
          meta: JSON.
          loss: Of the evaluation at this step, by which the best are kept.

        Raises:
          CheckpointError: This save, or the one before it, failed.
        """
        import orbax.checkpoint as ocp

        if step == self._last:
            return
        self.finish()
        items = {
            "train": ocp.args.StandardSave(_flat(state, not self.whole)),
            "meta": ocp.args.JsonSave({**meta, "train": _forms(state)}),
        }
        if self.whole:
            items["state"] = ocp.args.StandardSave({"params": state.params})
        with self._errors(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(**items),
                metrics=None if loss is None else {"loss": loss},
                force=True,
            )
        self._unfinished = self._last = step
        self._saved_at = time.monotonic()

    def poll(self) -> None:
        """Does what is due after a save has ended; call it after every step.

        Raises:
          CheckpointError: A save failed.
        """
        if self._unfinished is None:
            return
        with self._errors(self._unfinished):
            self._manager.check_for_errors()
        if self._digests is None and not self._manager.is_saving_in_progress():
            self._digests = self._pool.submit(self._seal, self._unfinished)
        if self._digests is not None and self._digests.done():
            self.finish()

    def finish(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          CheckpointError: A save failed.
        """
        if self._unfinished is None:
            return
        with self._errors(self._unfinished):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._digests is None:
                self._seal(self._unfinished)
            else:
                self._digests.result()
        self._unfinished = self._digests = None

    def close(self) -> None:
        """Waits, and lets go of the workdir."""
        try:
            self.finish()
        finally:
            self._pool.shutdown()
            self._manager.close()

    @contextlib.contextmanager
    def _errors(self, step: int) -> Any:
        try:
            yield
        except CheckpointError:
            raise
        # What a full disk raises depends on the layer below Orbax that meets it.
        except (OSError, RuntimeError, ValueError) as cause:
            self._unfinished = self._digests = None
            raise CheckpointError(
                f"{_SAVE}: {self.directory / str(step)}: {first_line(cause)}, expected "
                "a writable directory with room for it. Free some space; the run goes "
                "on from the step before."
            ) from cause

    def _seal(self, step: int) -> None:
        """Writes the manifest of a finished step, and drops those of deleted ones."""
        if not self._lead:
            return
        folder = self.directory / str(step)
        files = {
            path.relative_to(folder).as_posix(): _fingerprint(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        with replacing(self._manifest(step), _SAVE) as file:
            file.write(json.dumps({"files": files}, indent=1).encode())
        for path in self.directory.glob("*.manifest.json"):
            if not (self.directory / path.name.partition(".")[0]).is_dir():
                path.unlink(missing_ok=True)

    def _manifest(self, step: int) -> Path:
        return self.directory / f"{step}.manifest.json"

    # --- Reading -----------------------------------------------------------------

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """Reads a checkpoint.

        Args:
          like: A state with the wanted shapes, dtypes and shardings; may be of another
            mesh than the one that was saved.
          step: Which one. The newest that is whole when None.

        Returns:
          What it holds; None for a workdir without checkpoints.

        Raises:
          CheckpointError: It holds something else than `like`; or `step` is damaged or
            absent; or every checkpoint is damaged.
        """
        steps = self._complete()
        if step is not None:
            if step not in steps:
                raise CheckpointError(
                    f"{_LOAD}: {self.directory / str(step)}: is absent or damaged, "
                    f"expected one of {', '.join(map(str, steps)) or 'none'}. Choose "
                    "another step."
                )
            return self._read(step, like)
        tried = []
        for candidate in reversed(steps):
            try:
                return self._read(candidate, like)
            except _DamageError as damage:
                tried.append(candidate)
                self._quarantine(candidate, str(damage))
        if tried or self._rejected:
            raise CheckpointError(
                f"{_LOAD}: {self.directory}: no checkpoint is whole (tried "
                f"{', '.join(map(str, [*self._rejected, *tried]))}), expected one. "
                "Train in a new workdir."
            )
        return None

    def _complete(self) -> list[int]:
        """Returns the steps whose files are as they were written, in order."""
        self._rejected: list[int] = []
        steps = list(find_steps(self.directory))
        if self._lead:
            for step in reversed(steps):
                problem = self._problem(step)
                if problem is None:
                    break
                self._quarantine(step, problem)
                self._rejected.append(step)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("checkpoints checked")
        return [step for step in find_steps(self.directory)]

    def _problem(self, step: int) -> str | None:
        """Returns what is wrong with a step's files, or None."""
        folder = self.directory / str(step)
        try:
            files = json.loads(self._manifest(step).read_text())["files"]
        except FileNotFoundError:
            return "has no manifest, expected one"
        except (OSError, ValueError, KeyError, TypeError):
            return "has an unreadable manifest, expected JSON"
        whole = sum(entry["bytes"] for entry in files.values()) < _DIGEST_LIMIT
        for name, entry in files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "is absent" if size is None else f"size {size}"
                return f"{name}: {found}, expected {entry['bytes']} bytes"
            if whole and _fingerprint(path) != entry:
                return f"{name}: has other content, expected what was written"
        return None

    def _quarantine(self, step: int, problem: str) -> None:
        if self._lead:
            print(
                f"checkpoint step {step} is damaged ({problem}); using an earlier one",
                file=sys.stderr,
                flush=True,
            )
            folder = self.directory / str(step)
            spare = folder.with_name(f"{step}.corrupt")
            if not spare.exists():
                folder.rename(spare)
            self._manifest(step).unlink(missing_ok=True)
        self._manager.close()
        self._manager = self._open()

    def _read(self, step: int, like: TrainState) -> Restored:
        import orbax.checkpoint as ocp

        def wanted(x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        flat = _flat(like, not self.whole)
        meta = self._arrays(step, meta=ocp.args.JsonRestore()).meta
        self._check(step, meta, like)
        items = {"train": ocp.args.StandardRestore(jax.tree.map(wanted, flat))}
        if self.whole:
            shapes = jax.tree.map(wanted, {"params": like.params})
            items["state"] = ocp.args.StandardRestore(shapes)
        found = self._arrays(step, **items)
        params = found.state["params"] if self.whole else None
        self._last = step
        return Restored(step, _unflat(found.train, like, params), meta)

    def _arrays(self, step: int, **items: Any) -> Any:
        import orbax.checkpoint as ocp

        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as cause:
            # Damaged files surface as whatever the layers below Orbax raise.
            raise _DamageError(first_line(cause)) from cause

    def _check(self, step: int, meta: Mapping[str, Any], like: TrainState) -> None:
        """Raises unless a step holds arrays of the wanted names, shapes and dtypes."""
        stored, wanted = meta.get("train", {}), _forms(like)
        wrong = [
            f"'{name}' is {stored.get(name, 'absent')}, expected "
            f"{wanted.get(name, 'none')}"
            for name in sorted(stored.keys() | wanted.keys())
            if stored.get(name) != wanted.get(name)
        ]
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise CheckpointError(
                f"{_LOAD}: {self.directory / str(step)}: "
                f"{'; '.join(wrong[:_SHOWN])}{more}. Use the configuration that wrote "
                "it, or a new workdir."
            )


class _DamageError(Exception):
    """A step cannot be read."""


def _flat(state: TrainState, with_params: bool) -> dict[str, Any]:
    """Returns the arrays of a state by their paths."""
    parts: dict[str, Any] = {
        "optimizer": state.optimizer,
        "step": state.step,
        "skipped": state.skipped,
    }
    if with_params:
        parts["params"] = state.params
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {_path(keys): x for keys, x in leaves}


def _forms(state: TrainState) -> dict[str, str]:
    """Returns dtype and shape of every array of a state, for people too."""
    flat = _flat(state, with_params=True)
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in flat.items()}


def _unflat(flat: Mapping[str, Any], like: TrainState, params: Any) -> TrainState:
    """Returns the state that `_flat` took apart."""

    def fill(prefix: str) -> Callable[[Any, Any], Any]:
        return lambda keys, _: flat[f"{prefix}{_path(keys)}"]

    rebuilt = jax.tree_util.tree_map_with_path
    if params is None:
        params = rebuilt(fill("params."), like.params)
    return TrainState(
        params=params,
        optimizer=rebuilt(fill("optimizer."), like.optimizer),
        step=flat["step"],
        skipped=flat["skipped"],
    )


def _path(keys: Any) -> str:
    name = jax.tree_util.keystr(keys, simple=True, separator=".")
    return re.sub(r"[^\w.\-]", "_", name)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}

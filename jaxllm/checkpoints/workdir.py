"""Orbax workdirs: parameters of any kind, with their sharding, written atomically.

    <workdir>/<step>/state/   the tree {"params": ...}, by Orbax
    <workdir>/<step>/meta/    JSON: format, architecture, and what every leaf is
    <workdir>/                config.json, generation_config.json and the tokenizer

The tree is written as it ran, stacks included: slicing stacked arrays would need the
memory of the whole model a second time. Loading regroups it where other stacks are
wanted. A step counts only when its commit file is there.
"""

import dataclasses
import re
import time
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxllm import compression, quantization
from jaxllm.checkpoints.files import first_line, quote
from jaxllm.core import Leaf, unwrapped
from jaxllm.core.errors import CheckpointError
from jaxllm.models import DecoderConfig, Model
from jaxllm.version import __version__

__all__ = ["StoredModel", "find_steps", "open_workdir", "write_step"]

FORMAT_VERSION = 1
COMMIT_NAME = "commit_success.txt"

# What a step can hold beside arrays.
LEAVES: dict[str, Any] = quantization.LEAVES | compression.LEAVES

_LOAD = "cannot load checkpoint"
_SAVE = "cannot save checkpoint"


def find_steps(directory: Path) -> tuple[int, ...]:
    """Returns the complete steps of a workdir, in order; empty for anything else."""
    if not directory.is_dir():
        return ()
    steps = [
        int(path.name)
        for path in directory.iterdir()
        if re.fullmatch(r"\d{1,18}", path.name) and (path / COMMIT_NAME).is_file()
    ]
    return tuple(sorted(steps))


def write_step(
    directory: Path,
    step: int,
    model: Model,
    params: Mapping[str, Any],
    hf_config: Mapping[str, Any],
) -> None:
    """Writes the parameters of one step; every process of a job calls it.

    Args:
      directory: The workdir; made if it is absent.
      step: Number of the step, from 0.
      model: The model.
      params: Its tree, with leaves of `LEAVES` or none.
      hf_config: Content of the `config.json` that the model came from.

    Raises:
      CheckpointError: The step exists, a leaf has an unknown type, or the directory
        cannot be written.
    """
    import orbax.checkpoint as ocp

    if step in find_steps(directory):
        raise CheckpointError(
            f"{_SAVE}: {directory / str(step)}: exists, expected a new step. Choose "
            "another step or directory, or delete it."
        )
    meta = describe_step(model, params, hf_config)
    try:
        with _manager(directory, create=True) as manager:
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave({"params": params}),
                meta=ocp.args.JsonSave(meta),
            )
            manager.save(step, args=arguments, force=True)
            manager.wait_until_finished()
    except (OSError, RuntimeError, ValueError) as cause:
        # What a full disk raises depends on the layer below Orbax that meets it.
        raise CheckpointError(
            f"{_SAVE}: {directory / str(step)}: {first_line(cause)}, expected a "
            "writable directory with room for it. Free some space or choose another "
            "directory."
        ) from cause


def describe_step(
    model: Model, params: Mapping[str, Any] | None, hf_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the JSON beside the arrays of a step.

    Args:
      model: The model.
      params: Its tree, with leaves of `LEAVES` or none; None where a step does not hold
        a whole model.
      hf_config: Content of its `config.json`.

    Raises:
      CheckpointError: A leaf has an unknown type.
    """
    return {
        "format_version": FORMAT_VERSION,
        "jaxllm_version": __version__,
        "config": dataclasses.asdict(model.config),
        "hf_config": dict(hf_config),
        "params": None if params is None else _describe(params),
        "processes": jax.process_count(),
        "time": time.time(),
    }


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """What a step of a workdir holds, before its arrays are read.

    Attributes:
      directory: The workdir.
      step: Number of the step.
      config: The architecture.
      hf_config: Content of the `config.json` that the model came from.
      shapes: The tree of parameters, with shapes in place of arrays.
    """

    directory: Path
    step: int
    config: DecoderConfig
    hf_config: dict[str, Any]
    shapes: dict[str, Any]

    @property
    def stacks(self) -> tuple[int, ...]:
        """Layers of each stack, as they were written."""
        return tuple(jax.tree.leaves(s)[0].shape[0] for s in self.shapes["stacks"])

    @property
    def is_quantized(self) -> bool:
        """Whether some parameter is a leaf, or an adapter around one."""
        weights = jax.tree.leaves(self.shapes, is_leaf=lambda x: isinstance(x, Leaf))
        return any(isinstance(unwrapped(weight), Leaf) for weight in weights)

    def read(self, dtype: Any, shardings: Any = None) -> dict[str, Any]:
        """Reads the parameters, in the stacks in which they were written.

        Args:
          dtype: What the parameters shall be; it must be what they are, because Orbax
            would cast without a word.
          shardings: A tree like `shapes`: where each array goes, whatever mesh it came
            from. The default device when None.

        Returns:
          The parameters.

        Raises:
          CheckpointError: Parameters have another dtype, or data is damaged.
        """
        import orbax.checkpoint as ocp

        self._check_dtypes(dtype)
        if shardings is None:
            here = SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: here, self.shapes)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.shapes,
            shardings,
        )
        restore = ocp.args.StandardRestore({"params": wanted})
        restored = _restore(self.directory, self.step, state=restore)
        return restored.state["params"]

    def _check_dtypes(self, dtype: Any) -> None:
        found = jax.tree_util.tree_leaves_with_path(
            self.shapes, is_leaf=lambda x: isinstance(x, Leaf)
        )
        for path, wrapped in found:
            weight = unwrapped(wrapped)
            if isinstance(weight, Leaf) or weight.dtype == dtype:
                continue
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise CheckpointError(
                f"{_LOAD}: {self.directory / str(self.step)}: '{name}' has dtype "
                f"{weight.dtype}, expected {jnp.dtype(dtype)}. Load it with "
                f"dtype={str(weight.dtype)!r}; save that as a Hugging Face directory "
                "to convert it."
            )


def open_workdir(directory: Path, step: int | None = None) -> StoredModel:
    """Reads what a step of a workdir holds, without its arrays.

    Args:
      directory: The workdir.
      step: Which step; the last complete one when None.

    Returns:
      The description.

    Raises:
      CheckpointError: There is no such step, or its description is damaged or was
        written by a later version.
    """
    import orbax.checkpoint as ocp

    steps = find_steps(directory)
    if not steps or (step is not None and step not in steps):
        found = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"{_LOAD}: {directory}: has no complete step"
            f"{'' if step is None else f' {step}'}, expected one (complete: {found}). "
            "Check the path."
        )
    step = steps[-1] if step is None else step
    meta = _restore(directory, step, meta=ocp.args.JsonRestore()).meta
    where = f"{_LOAD}: {directory / str(step)}"
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: has format_version {quote(version)}, expected {FORMAT_VERSION}. "
            "Load it with the version of jaxllm that wrote it."
        )
    try:
        config = _rebuild(DecoderConfig, meta["config"])
        return StoredModel(
            directory, step, config, meta["hf_config"], _shapes(meta["params"])
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise CheckpointError(
            f"{where}: its description is damaged ({first_line(cause)}), expected what "
            "jaxllm writes. Use another step."
        ) from None


def _manager(directory: Path, *, create: bool = False) -> Any:
    import orbax.checkpoint as ocp

    # Renaming a finished step is not atomic on object storage, and on a disk a step
    # without its commit file would pass for complete.
    mode = ocp.options.AtomicityMode.COMMIT_FILE
    options = ocp.CheckpointManagerOptions(
        create=create,
        enable_async_checkpointing=False,
        atomicity_options=ocp.options.AtomicityOptions(mode=mode),
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _restore(directory: Path, step: int, **items: Any) -> Any:
    import orbax.checkpoint as ocp

    try:
        with _manager(directory) as manager:
            return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as cause:
        # Damaged files surface as whatever the layers below Orbax raise.
        raise CheckpointError(
            f"{_LOAD}: {directory / str(step)}: {first_line(cause)}, expected a step "
            "as it was written. Use another step."
        ) from cause


def _describe(tree: Any) -> dict[str, Any]:
    """Returns a tree of parameters as JSON: kinds, shapes and dtypes."""
    if isinstance(tree, Mapping):
        return {"kind": "dict", "items": {k: _describe(v) for k, v in tree.items()}}
    if isinstance(tree, tuple):
        return {"kind": "tuple", "items": [_describe(v) for v in tree]}
    if not isinstance(tree, Leaf):
        dtype = jnp.dtype(tree.dtype).name
        return {"kind": "array", "shape": list(tree.shape), "dtype": dtype}
    kind = type(tree).__name__
    if LEAVES.get(kind) is not type(tree):
        raise CheckpointError(
            f"{_SAVE}: a weight is {kind}, expected an array or one of "
            f"{', '.join(LEAVES)}. Turn it into one of these first."
        )
    fields = dataclasses.fields(tree)  # type: ignore[arg-type]
    return {
        "kind": kind,
        "static": {
            f.name: getattr(tree, f.name) for f in fields if f.metadata.get("static")
        },
        "items": {
            f.name: _describe(getattr(tree, f.name))
            for f in fields
            if not f.metadata.get("static")
        },
    }


def _shapes(tree: Any) -> Any:
    """Returns the tree that `_describe` described, with shapes for arrays."""
    kind = tree["kind"]
    if kind == "array":
        return jax.ShapeDtypeStruct(tuple(tree["shape"]), jnp.dtype(tree["dtype"]))
    if kind == "tuple":
        return tuple(_shapes(item) for item in tree["items"])
    items = {name: _shapes(item) for name, item in tree["items"].items()}
    return items if kind == "dict" else LEAVES[kind](**items, **tree["static"])


def _rebuild(declared: Any, value: Any) -> Any:
    """Returns a value of a declared type from what JSON made of it."""
    origin, members = typing.get_origin(declared), typing.get_args(declared)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _rebuild(next(m for m in members if m is not type(None)), value)
    if origin is tuple:
        return tuple(_rebuild(members[0], item) for item in value)
    if not dataclasses.is_dataclass(declared):
        return value
    types_of = typing.get_type_hints(declared)
    fields: dict[str, Any] = {k: _rebuild(types_of[k], v) for k, v in value.items()}
    return declared(**fields)  # type: ignore[operator]

"""A `LanguageModel` to a Hugging Face directory, or to a step of an Orbax workdir."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints.assembly import cast_into
from jaxllm.checkpoints.directory import CONFIG_NAME, GENERATION_NAME
from jaxllm.checkpoints.files import replacing
from jaxllm.checkpoints.language_model import LanguageModel
from jaxllm.checkpoints.matching import TreePath
from jaxllm.checkpoints.safetensors import PendingTensor
from jaxllm.checkpoints.weights import write_weights
from jaxllm.checkpoints.workdir import write_step
from jaxllm.compression import LoraTensor
from jaxllm.core import Leaf, unwrapped
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.models import DecoderConfig
from jaxllm.models.families import (
    FAMILIES,
    Family,
    TensorRule,
    decoder_config,
    family_of,
)
from jaxllm.models.stacks import stack_size

__all__ = [
    "any_family",
    "locate",
    "new_directory",
    "save_language_model",
    "save_workdir",
    "workdir_config",
    "write_companions",
    "write_json",
]

_SAVE = "cannot save model"
# What a configuration says beside the architecture and is worth keeping when the
# architecture has changed.
_KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_language_model(
    lm: LanguageModel,
    directory: str | os.PathLike[str],
    *,
    dequantize: bool = False,
    merge: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model as a Hugging Face directory, which transformers reads as well.

    The directory appears under its name only when it is complete. Parameters are
    written in the dtype that they have, one tensor in memory at a time; loading them
    in that dtype gives the same bits.

    Args:
      lm: The model.
      directory: Where; absent or empty, whatever is in it. Nothing is overwritten.
      dequantize: Whether quantized weights are written as plain ones, in the dtype of
        the model; they are refused otherwise.
      merge: Whether adapters are written as part of the weights that they are around,
        at the strength that they have; they are refused otherwise, because the files
        would not tell them apart. `save_adapter` writes one alone.
      max_shard_bytes: The most bytes in one file of weights.

    Raises:
      CheckpointError: The directory is not empty or cannot be written, there is too
        little room, or weights are quantized or adapted.
      ConfigError: No family of Hugging Face can express the model.
    """
    hf_config, family = _hf_config(lm)
    _refuse_leaves(lm, dequantize, merge)
    tensors = _pending_tensors(lm, family)
    with new_directory(Path(directory), _SAVE) as new:
        _check_room(new, sum(tensor.nbytes for tensor in tensors))
        write_weights(new, tensors, max_shard_bytes)
        _write_companions(lm, new, hf_config)


def save_workdir(
    lm: LanguageModel, directory: str | os.PathLike[str], step: int = 0
) -> None:
    """Writes a model as a step of an Orbax workdir: quantized, adapted, as it is.

    Every process of a job calls it and writes what its devices hold. The workdir loads
    onto any mesh.

    Args:
      lm: The model.
      directory: The workdir; steps that it has stay.
      step: Number of the step, from 0; one that exists is not overwritten.

    Raises:
      CheckpointError: The step exists, or cannot be written.
    """
    write_step(Path(directory), step, lm.model, lm.params, workdir_config(lm))
    if jax.process_index() == 0:
        write_companions(lm, directory)


def workdir_config(lm: LanguageModel) -> dict[str, Any]:
    """Returns the `config.json` of a model in a workdir; {} where none expresses it."""
    hf_config = dict(lm.hf_config)
    if not hf_config:
        # A model that no family expresses has no config.json, and needs none here.
        with contextlib.suppress(ConfigError):
            hf_config, _ = _hf_config(lm)
    return hf_config


def write_companions(lm: LanguageModel, directory: str | os.PathLike[str]) -> None:
    """Writes configuration and tokenizer of a workdir, for people and for `load`."""
    _write_companions(lm, Path(directory), workdir_config(lm))


def _hf_config(lm: LanguageModel) -> tuple[dict[str, Any], Family]:
    """Returns the content of `config.json`, and the family whose names it promises."""
    original = dict(lm.hf_config)
    if original:
        content = family_of(original).to_hf(lm.config)
    else:
        content = any_family(lm.config)
    family = family_of(content)
    same = (
        bool(original)
        and family_of(original) is family
        and decoder_config(original) == lm.config
    )
    if same:
        # As it was written: it says more than the architecture.
        content = original | {"architectures": content["architectures"]}
        content.pop("auto_map", None)
    else:
        kept = {key: original[key] for key in _KEPT_KEYS if key in original}
        content = content | kept
    name = jnp.dtype(lm.model.policy.params).name
    for key in [key for key in ("torch_dtype", "dtype") if key in content] or ["dtype"]:
        content[key] = name
    return content, family


def any_family(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of the first family that can express a model.

    Raises:
      ConfigError: None can.
    """
    for family in FAMILIES.values():
        with contextlib.suppress(ConfigError):
            return family.to_hf(config)
    raise ConfigError(
        f"{_SAVE}: {CONFIG_NAME}: no family has this combination of features, expected "
        f"one of {', '.join(FAMILIES)}. Save it as an Orbax workdir."
    )


def _refuse_leaves(lm: LanguageModel, dequantize: bool, merge: bool) -> None:
    """Refuses what plain arrays cannot express, unless it was asked for."""
    weights = jax.tree.leaves(lm.params, is_leaf=lambda x: isinstance(x, Leaf))
    adapted = sum(isinstance(weight, LoraTensor) for weight in weights)
    if adapted and not merge:
        raise CheckpointError(
            f"{_SAVE}: {adapted} weights carry adapters, expected plain arrays. Pass "
            "merge=True to write them merged, write the adapter alone with "
            "save_adapter, or save an Orbax workdir."
        )
    insides = [unwrapped(weight) for weight in weights]
    leaves = [weight for weight in insides if isinstance(weight, Leaf)]
    if leaves and not dequantize:
        raise CheckpointError(
            f"{_SAVE}: {len(leaves)} weights are {type(leaves[0]).__name__}, expected "
            "plain arrays. Pass dequantize=True to write them as "
            f"{jnp.dtype(lm.model.policy.params).name}, or save an Orbax workdir."
        )


def _pending_tensors(lm: LanguageModel, family: Family) -> list[PendingTensor]:
    dtype = lm.model.policy.params
    sources: dict[str, list[TensorRule]] = {}
    for rule in family.rules(lm.config):
        sources.setdefault(rule.source, []).append(rule)
    return [
        _pending(
            source, sorted(rules, key=lambda r: r.part or (0, 0)), lm.params, dtype
        )
        for source, rules in sources.items()
    ]


def _pending(
    source: str, rules: list[TensorRule], params: Mapping[str, Any], dtype: Any
) -> PendingTensor:
    """Returns a stored tensor, joined from the arrays that are parts of it."""
    transpose = rules[0].transpose
    axis = 0 if transpose else -1
    picked = [locate(params, rule.path) for rule in rules]
    stored = []
    for weight, layer in picked:
        shape = weight.shape if layer is None else weight.shape[1:]
        stored.append(shape[::-1] if transpose else shape)
    joined = list(stored[0])
    joined[axis] = sum(shape[axis] for shape in stored)
    leaf = isinstance(picked[0][0], Leaf)
    found = np.dtype(dtype if leaf else picked[0][0].dtype)

    def compute() -> np.ndarray:
        whole = np.empty(joined, found)
        start = 0
        for weight, layer in picked:
            array = _to_host(weight, layer, dtype)
            array = array.T if transpose else array
            stop = start + array.shape[axis]
            index = slice(start, stop) if transpose else (..., slice(start, stop))
            cast_into(whole[index], array, blocked=transpose)
            start = stop
        return whole

    return PendingTensor(source, tuple(joined), found, compute)


def locate(params: Mapping[str, Any], path: TreePath) -> tuple[Any, int | None]:
    """Returns the stacked weight that holds a path, and the layer inside its stack.

    Args:
      params: The tree of a model.
      path: With layers counted singly: `("layers", 3, "mlp", "up", "kernel")`.

    Returns:
      The weight, and the layer; None for the layer outside the stacks.
    """
    tree: Any = params
    layer = None
    if path[0] == "layers":
        layer, path = int(path[1]), path[2:]
        for tree in params["stacks"]:
            if layer < stack_size(tree):
                break
            layer -= stack_size(tree)
    for name in path:
        tree = tree[name]
    return tree, layer


def _to_host(weight: Any, layer: int | None, dtype: Any) -> np.ndarray:
    if layer is not None and weight.shape[0] > 1:
        weight = jax.tree.map(lambda x: x[layer : layer + 1], weight)
    if isinstance(weight, Leaf):
        weight = weight.dequantize(dtype)
    if not weight.is_fully_addressable:
        raise CheckpointError(
            f"{_SAVE}: weights are spread over {jax.process_count()} processes, "
            "expected all in one. Save an Orbax workdir."
        )
    array = np.asarray(weight)
    return array if layer is None else array.reshape(array.shape[1:])


def _write_companions(
    lm: LanguageModel, directory: Path, hf_config: Mapping[str, Any]
) -> None:
    if hf_config:
        write_json(directory / CONFIG_NAME, hf_config)
    generation: dict[str, Any] = {}
    if hf_config.get("bos_token_id") is not None:
        generation["bos_token_id"] = hf_config["bos_token_id"]
    if lm.generation.eos_ids:
        ids = list(lm.generation.eos_ids)
        generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    if lm.generation.pad_id is not None:
        generation["pad_token_id"] = lm.generation.pad_id
    if lm.generation.stop_strings:
        generation["stop_strings"] = list(lm.generation.stop_strings)
    if generation:
        write_json(directory / GENERATION_NAME, generation)
    if lm.tokenizer is not None:
        lm.tokenizer.save(directory)


def write_json(path: Path, content: Mapping[str, Any], what: str = _SAVE) -> None:
    """Writes a JSON file for people to read; `what` is what fails when it cannot."""
    with replacing(path, what) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def new_directory(directory: Path, what: str) -> Iterator[Path]:
    """Makes a directory that appears under its name only when it is complete.

    Args:
      directory: Where; absent or empty.
      what: What fails when it cannot be written: `cannot save model`.

    Yields:
      A sibling that takes the name when all went well.

    Raises:
      CheckpointError: The directory is not empty, or cannot be written.
    """
    try:
        occupied = any(directory.iterdir())
    except FileNotFoundError:
        occupied = False
    except NotADirectoryError:
        occupied = True
    if occupied:
        raise CheckpointError(
            f"{what}: {directory}: is not empty, expected a new or an empty "
            "directory. Choose another or delete it."
        )
    directory = directory.absolute()
    new = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        new.mkdir(parents=True)
        yield new
        if directory.exists():
            directory.rmdir()
        new.rename(directory)
    except OSError as cause:
        raise CheckpointError(
            f"{what}: {directory}: {cause.strerror}, expected a writable directory "
            "with room for it. Free some space or choose another directory."
        ) from cause
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{_SAVE}: {directory.parent}: has {free} bytes free, expected at least "
            f"{needed}. Free some space or choose another directory."
        )

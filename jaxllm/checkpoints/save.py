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
from jaxllm.core import Leaf
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.models import DecoderConfig
from jaxllm.models.families import (
    FAMILIES,
    Family,
    TensorRule,
    decoder_config,
    family_of,
)
from jaxllm.models.freeze import stack_size

__all__ = ["save_language_model", "save_workdir"]

_SAVE = "cannot save model"
# What a configuration says beside the architecture and is worth keeping when the
# architecture has changed.
_KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_language_model(
    lm: LanguageModel,
    directory: str | os.PathLike[str],
    *,
    dequantize: bool = False,
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
      max_shard_bytes: The most bytes in one file of weights.

    Raises:
      CheckpointError: The directory is not empty or cannot be written, there is too
        little room, or weights are quantized.
      ConfigError: No family of Hugging Face can express the model.
    """
    hf_config, family = _hf_config(lm)
    tensors = _pending_tensors(lm, family, dequantize)
    with _new_directory(Path(directory)) as new:
        _check_room(new, sum(tensor.nbytes for tensor in tensors))
        write_weights(new, tensors, max_shard_bytes)
        _write_companions(lm, new, hf_config)


def save_workdir(
    lm: LanguageModel, directory: str | os.PathLike[str], step: int = 0
) -> None:
    """Writes a model as a step of an Orbax workdir, quantized or not, as it is.

    Every process of a job calls it and writes what its devices hold. The workdir loads
    onto any mesh.

    Args:
      lm: The model.
      directory: The workdir; steps that it has stay.
      step: Number of the step, from 0; one that exists is not overwritten.

    Raises:
      CheckpointError: The step exists, or cannot be written.
    """
    directory = Path(directory)
    hf_config = dict(lm.hf_config)
    if not hf_config:
        # A model that no family expresses has no config.json, and needs none here.
        with contextlib.suppress(ConfigError):
            hf_config, _ = _hf_config(lm)
    write_step(directory, step, lm.model, lm.params, hf_config)
    if jax.process_index() == 0:
        _write_companions(lm, directory, hf_config)


def _hf_config(lm: LanguageModel) -> tuple[dict[str, Any], Family]:
    """Returns the content of `config.json`, and the family whose names it promises."""
    original = dict(lm.hf_config)
    if original:
        content = family_of(original).to_hf(lm.config)
    else:
        content = _any_family(lm.config)
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


def _any_family(config: DecoderConfig) -> dict[str, Any]:
    for family in FAMILIES.values():
        with contextlib.suppress(ConfigError):
            return family.to_hf(config)
    raise ConfigError(
        f"{_SAVE}: {CONFIG_NAME}: no family has this combination of features, expected "
        f"one of {', '.join(FAMILIES)}. Save it as an Orbax workdir."
    )


def _pending_tensors(
    lm: LanguageModel, family: Family, dequantize: bool
) -> list[PendingTensor]:
    dtype = lm.model.policy.params
    weights = jax.tree.leaves(lm.params, is_leaf=lambda x: isinstance(x, Leaf))
    leaves = [weight for weight in weights if isinstance(weight, Leaf)]
    if leaves and not dequantize:
        raise CheckpointError(
            f"{_SAVE}: {len(leaves)} weights are {type(leaves[0]).__name__}, expected "
            "plain arrays. Pass dequantize=True to write them as "
            f"{jnp.dtype(dtype).name}, or save an Orbax workdir."
        )
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
    picked = [_pick(params, rule.path) for rule in rules]
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


def _pick(params: Mapping[str, Any], path: TreePath) -> tuple[Any, int | None]:
    """Returns the stacked weight that holds a path, and the layer inside its stack."""
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
        _write_json(directory / CONFIG_NAME, hf_config)
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
        _write_json(directory / GENERATION_NAME, generation)
    if lm.tokenizer is not None:
        lm.tokenizer.save(directory)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path, _SAVE) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """Yields a sibling that takes the directory's name when all went well."""
    try:
        occupied = any(directory.iterdir())
    except FileNotFoundError:
        occupied = False
    except NotADirectoryError:
        occupied = True
    if occupied:
        raise CheckpointError(
            f"{_SAVE}: {directory}: is not empty, expected a new or an empty "
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
            f"{_SAVE}: {directory}: {cause.strerror}, expected a writable directory "
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

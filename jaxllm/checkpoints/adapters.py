"""LoRA adapters in the layout of the PEFT library, in and out.

A directory holds `adapter_config.json` and `adapter_model.safetensors`, whose tensors
are `base_model.model.<module>.lora_A.weight` `[R, I]` and `lora_B.weight` `[O, R]`.

Letters: I and O input and output axis of a module, R rank.
"""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints.adapter_config import (
    CONFIG_NAME,
    AdapterConfig,
    config_content,
    read_adapter_config,
)
from jaxllm.checkpoints.adapter_modules import AdapterModule, Fused, adapter_modules
from jaxllm.checkpoints.files import quote
from jaxllm.checkpoints.language_model import LanguageModel
from jaxllm.checkpoints.safetensors import (
    LazyTensor,
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from jaxllm.checkpoints.save import locate, new_directory, write_json
from jaxllm.checkpoints.source import HUB_PREFIX, resolve
from jaxllm.checkpoints.weights import PICKLE_SUFFIXES
from jaxllm.compression import LoraFactors, adapter_names, layered, with_adapter
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.core.partition import TreePath
from jaxllm.core.registry import unknown_name
from jaxllm.models.sharding import param_shardings

__all__ = ["AdapterWarning", "load_adapter", "save_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"

_LOAD = "cannot load adapter"
_SAVE = "cannot save adapter"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Of our own metadata: `Fused.blocks` by module, so that blocks come back apart.
_BLOCKS = "jaxllm_blocks"


class AdapterWarning(UserWarning):
    """An adapter fits the model's shapes, but names another base model."""


def load_adapter(
    directory: str | os.PathLike[str], lm: LanguageModel, *, name: str = "default"
) -> LanguageModel:
    """Puts the adapter of a directory around a model's weights.

    The factors keep the dtype of the file; the weights, quantized or not, are not
    touched. Warns with `AdapterWarning` where the adapter names another base model.

    Args:
      directory: What `save_adapter` or the PEFT library wrote, or `hf:org/name`.
      lm: The model, with other adapters or none.
      name: What the adapter is called from now on.

    Returns:
      The model with the adapter at strength 1.

    Raises:
      CheckpointError: Files are missing, damaged or pickles; a tensor belongs to no
        projection of the model, is missing or has another shape or rank.
      ConfigError: The adapter is of a kind that is not implemented, or the model has
        one of that name.

    Source: the layout that PEFT 0.21 reads and writes.
    """
    folder = _find(directory)
    config = read_adapter_config(folder)
    tensors = _open(folder)
    found = _match(tensors, adapter_modules(lm), config, folder)
    blocks = _read_blocks(folder)
    factors: dict[TreePath, LoraFactors] = {}
    for module, (a, b) in found.items():
        rank = config.rank_of(module.names)
        _check(module, a, b, rank)
        fused = Fused(
            np.array(a.read()),
            np.array(b.read()),
            config.scaling_of(module.names, rank),
            blocks.get(module.name, {}),
        )
        factors |= module.cut(fused)
    _warn_of_another_base(config, lm)
    params = with_adapter(lm.params, factors, name)
    if lm.mesh is not None:
        places = param_shardings(lm.model, params, lm.mesh, lm.model.rules)
        params = jax.device_put(params, places)
    return dataclasses.replace(lm, params=params)


def save_adapter(
    lm: LanguageModel, directory: str | os.PathLike[str], *, name: str | None = None
) -> None:
    """Writes one adapter of a model, which the PEFT library reads as well.

    What it counts is written as `lora_alpha` over the rank, also where it was made with
    alpha over the rank's root: the number is the same. Its strength is not written.

    Args:
      lm: The model.
      directory: Where; absent or empty.
      name: Which adapter; the only one when None.

    Raises:
      CheckpointError: The directory is not empty or cannot be written, or the arrays
        are spread over several processes.
      ConfigError: The model has no such adapter, or several and no name is given.
    """
    name = _which(lm, name)
    tensors: dict[str, np.ndarray] = {}
    blocks: dict[str, Mapping[str, int]] = {}
    adapted: dict[str, tuple[int, np.float32]] = {}
    modules = adapter_modules(lm)
    for module in modules:
        parts = {path: _factors(lm.params, path, name) for path, _ in module.parts}
        found = {path: part for path, part in parts.items() if part is not None}
        if not found:
            continue
        fused = module.fuse(found)
        if fused.blocks:
            blocks[module.name] = fused.blocks
        tensors[f"{_PREFIX}{module.name}.lora_A.weight"] = fused.a_RI
        tensors[f"{_PREFIX}{module.name}.lora_B.weight"] = fused.b_OR
        adapted[module.name] = (len(fused.a_RI), np.float32(fused.scaling))
    metadata = {"format": "pt"}
    if blocks:
        metadata[_BLOCKS] = json.dumps(blocks)
    is_transposed = any(m.is_transposed for m in modules if m.name in adapted)
    content = config_content(
        lm.name, adapted, [module.name for module in modules], is_transposed
    )
    with new_directory(Path(directory), _SAVE) as new:
        write_safetensors(new / WEIGHTS_NAME, tensors, metadata)
        write_json(new / CONFIG_NAME, content, _SAVE)


def _find(directory: str | os.PathLike[str]) -> Path:
    name = os.fspath(directory)
    local = Path(os.path.expanduser(name))
    if local.is_dir():
        return local
    if name.startswith(HUB_PREFIX):
        return resolve(name)
    raise CheckpointError(
        f"{_LOAD}: {quote(name)}: no such directory, expected one with {CONFIG_NAME}, "
        "or 'hf:org/name'. Check the path."
    )


def _open(folder: Path) -> dict[str, LazyTensor]:
    if (folder / WEIGHTS_NAME).is_file():
        return read_safetensors(folder / WEIGHTS_NAME)
    for name in sorted(os.listdir(folder)):
        if name.lower().endswith(PICKLE_SUFFIXES):
            raise CheckpointError(
                f"refusing to load {quote(name)}: pickle files can run code. Convert "
                "it to safetensors with peft and torch, where you trust it: load it "
                "there and call save_pretrained('converted')."
            )
    raise CheckpointError(
        f"{_LOAD}: {folder}: has no weights, expected {WEIGHTS_NAME}. Check the path."
    )


def _read_blocks(folder: Path) -> dict[str, dict[str, int]]:
    """Returns the blocks of fused modules, where the metadata has them as we write."""
    try:
        blocks = json.loads(read_metadata(folder / WEIGHTS_NAME).get(_BLOCKS, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(blocks, dict):
        return {}
    return {
        module: ranks
        for module, ranks in blocks.items()
        if isinstance(ranks, dict)
        and all(type(rank) is int and rank >= 1 for rank in ranks.values())
    }


def _match(
    tensors: Mapping[str, LazyTensor],
    modules: Sequence[AdapterModule],
    config: AdapterConfig,
    folder: Path,
) -> dict[AdapterModule, tuple[LazyTensor, LazyTensor]]:
    """Finds A and B of every adapted module; every tensor has to be one of them."""
    by_name = {name: module for module in modules for name in module.names}
    where = f"{_LOAD}: {folder / WEIGHTS_NAME}"
    found: dict[AdapterModule, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        parsed = _TENSOR.fullmatch(key)
        if parsed is None:
            raise CheckpointError(
                f"{where}: {quote(key)} is neither A nor B of a projection, expected "
                f"names such as '{_PREFIX}{modules[0].name}.lora_A.weight'. Only plain "
                "LoRA of projections is implemented."
            )
        module = by_name.get(parsed[1])
        if module is None:
            known = dict.fromkeys(m.name.rsplit(".", 1)[-1] for m in modules)
            raise CheckpointError(
                f"{where}: {quote(parsed[1])} is no projection of the model, expected "
                f"{', '.join(known)} of its layers. Check that the adapter was made "
                "for this model."
            )
        found.setdefault(module, {})[parsed[2]] = tensor
    missing = [
        f"{_PREFIX}{module.name}.lora_{side}.weight"
        for module in modules
        for side in "AB"
        if (module in found or config.is_target(module.names))
        and side not in found.get(module, {})
    ]
    if missing or not found:
        first = f", the first is {quote(missing[0])}" if missing else ""
        raise CheckpointError(
            f"{where}: {len(missing) or 'all'} tensors are missing{first}, expected A "
            "and B of every module that is adapted. Download it again, or check that "
            "it was made for this model."
        )
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _check(module: AdapterModule, a: LazyTensor, b: LazyTensor, rank: int) -> None:
    for tensor, wanted, axis in (
        (a, (rank, module.inputs), 0),
        (b, (module.outputs, rank), 1),
    ):
        where = f"{_LOAD}: {tensor.path}: {quote(tensor.name)}"
        if tensor.shape != wanted:
            action = "Check that the adapter was made for this model."
            if len(tensor.shape) == 2 and tensor.shape[axis] != rank:
                action = f"Check r and rank_pattern in {CONFIG_NAME}."
            raise CheckpointError(
                f"{where} has shape {tensor.shape}, expected {wanted}. {action}"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise CheckpointError(
                f"{where} has dtype {tensor.dtype}, expected floating numbers. Save "
                "the adapter as float32."
            )


def _warn_of_another_base(config: AdapterConfig, lm: LanguageModel) -> None:
    # Only the last part: the same model lies under many paths.
    theirs, ours = (
        name.rstrip("/").rsplit("/", 1)[-1].removeprefix(HUB_PREFIX)
        for name in (config.base_model, lm.name)
    )
    if theirs and ours and theirs.lower() != ours.lower():
        warnings.warn(
            f"the adapter was made for {quote(config.base_model)} and is used with "
            f"{quote(lm.name)}: its shapes fit, but is it the same model?",
            AdapterWarning,
            stacklevel=3,
        )


def _which(lm: LanguageModel, name: str | None) -> str:
    names = adapter_names(lm.params)
    if name is not None and name not in names:
        raise unknown_name("adapter", name, names)
    if name is None and len(names) != 1:
        raise ConfigError(
            f"{_SAVE}: name: the model has {len(names)} adapters "
            f"({', '.join(names) or 'none'}), expected one. "
            f"{'Give the name of one.' if names else 'Add one with add_lora.'}"
        )
    return names[0] if name is None else name


def _factors(params: Mapping[str, Any], path: TreePath, name: str) -> Any:
    """Returns what an adapter holds for one projection as numpy, None if nothing."""
    weight, layer = locate(params, (*path, "kernel"))
    found = [adapter for adapter in layered(weight) if adapter.name == name]
    if not found:
        return None
    arrays = []
    for array in (found[0].a_IR, found[0].b_RO, found[0].scaling):
        if not array.is_fully_addressable:
            raise CheckpointError(
                f"{_SAVE}: its arrays are spread over {jax.process_count()} processes, "
                "expected all in one. Save an Orbax workdir."
            )
        arrays.append(np.asarray(array if layer is None else array[layer]))
    return LoraFactors(arrays[0], arrays[1], arrays[2].item())

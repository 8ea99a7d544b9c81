"""The weights of a checkpoint directory: one file or shards, never a pickle."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxllm.checkpoints.files import quote, read_json_object, replacing
from jaxllm.checkpoints.safetensors import (
    LazyTensor,
    PendingTensor,
    as_pending,
    read_safetensors,
    write_safetensors,
)
from jaxllm.core.errors import CheckpointError

__all__ = ["open_weights", "refuse_pickles", "write_weights"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_LOAD = "cannot load weights"
_SAVE = "cannot save weights"
# transformers has refused files without it; what it says is the axis order.
_METADATA = {"format": "pt"}


def open_weights(directory: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Opens all the tensors of a checkpoint directory; reads none.

    `model.safetensors` is taken where there is one, otherwise the shards that
    `model.safetensors.index.json` names, which must hold exactly the tensors that it
    lists.

    Args:
        directory: a directory in Hugging Face layout.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: no weights, only pickles, a malformed file or index, a missing
            shard, or a tensor that is missing, unlisted or in two shards.
    """
    directory = Path(directory)
    if (directory / SINGLE_NAME).is_file():
        return read_safetensors(directory / SINGLE_NAME)
    if (directory / INDEX_NAME).is_file():
        return _open_shards(directory)
    refuse_pickles(directory)
    raise CheckpointError(
        f"{_LOAD}: {directory}: has no weights, expected {SINGLE_NAME} or "
        f"{INDEX_NAME}. Check the path."
    )


def refuse_pickles(directory: str | os.PathLike[str]) -> None:
    """Refuses a directory whose weights are only there as pickles; opens none.

    Args:
        directory: a checkpoint directory.

    Raises:
        CheckpointError: it has pickle files and no safetensors weights; the message
            says how to convert them.
    """
    directory = Path(directory)
    try:
        names = sorted(os.listdir(directory))
    except OSError as cause:
        raise CheckpointError(
            f"{_LOAD}: {directory}: {cause.strerror}, expected a directory. "
            "Check the path."
        ) from None
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if not pickles or SINGLE_NAME in names or INDEX_NAME in names:
        return
    # training_args.bin and optimizer.pt lie beside weights; name the weights.
    pickles.sort(key=lambda name: not name.startswith("pytorch_model"))
    raise CheckpointError(
        f"refusing to load {quote(pickles[0])}: pickle files can run code. Convert it "
        "to safetensors with transformers and torch, where you trust it: "
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        ".save_pretrained('converted')."
    )


def _open_shards(directory: Path) -> dict[str, LazyTensor]:
    index = directory / INDEX_NAME
    listed = _read_weight_map(index)
    shards = sorted(set(listed.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{_LOAD}: {index}: {len(missing)} of {len(shards)} shards are missing, "
            f"the first is {quote(missing[0])}, expected them beside the index. "
            "Download them."
        )
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        for name, tensor in read_safetensors(directory / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{_LOAD}: {directory / shard}: {quote(name)} is also in "
                    f"{quote(tensors[name].path.name)}, expected it once. "
                    "Download the shards again."
                )
            if listed.get(name) != shard:
                place = quote(listed[name]) if name in listed else "nowhere"
                raise CheckpointError(
                    f"{_LOAD}: {directory / shard}: {quote(name)} is in this shard, "
                    f"expected {place} by {INDEX_NAME}. Download the index again."
                )
            tensors[name] = tensor
    for name, shard in listed.items():
        if name not in tensors:
            raise CheckpointError(
                f"{_LOAD}: {directory / shard}: {quote(name)} is absent, expected in "
                f"this shard by {INDEX_NAME}. Download the shard again."
            )
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json_object(index, _LOAD, CheckpointError)
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            f"{_LOAD}: {index}: 'weight_map' is {quote(listed)}, expected an object "
            "of tensor names and files. Download the index again."
        )
    for name, shard in listed.items():
        # A plain file name: an index must not reach outside its directory.
        if (
            not isinstance(shard, str)
            or os.path.basename(shard) != shard
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{_LOAD}: {index}: {quote(name)} is in {quote(shard)}, expected the "
                "name of a .safetensors file beside the index. Correct the index."
            )
    return listed


def write_weights(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[PendingTensor],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the weights of a checkpoint: one file, or shards and their index.

    The index is written last, so an interrupted call leaves nothing that loads.

    Args:
        directory: an existing directory without weights.
        tensors: arrays (numpy, JAX or `LazyTensor`) by name, or tuples
            (name, shape, dtype, function that returns the array).
        max_shard_bytes: the most tensor bytes in a file; a tensor larger than that has
            a file of its own.

    Raises:
        CheckpointError: the directory already holds weights or cannot be written, or a
            tensor has a dtype that safetensors files cannot hold.
    """
    directory = Path(directory)
    _refuse_overwriting(directory)
    pending = as_pending(tensors)
    shards = _split(pending, max_shard_bytes)
    if len(shards) <= 1:
        write_safetensors(directory / SINGLE_NAME, pending, _METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for tensor in shard:
            if tensor.name in weight_map:
                raise CheckpointError(
                    f"{_SAVE}: {directory}: {quote(tensor.name)} is given twice, "
                    "expected a name of its own. Rename it."
                )
            weight_map[tensor.name] = name
        write_safetensors(directory / name, shard, _METADATA)
    total = sum(tensor.nbytes for tensor in pending)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with replacing(directory / INDEX_NAME, _SAVE) as file:
        file.write(json.dumps(content, indent=2, sort_keys=True).encode())


def _split(
    pending: list[PendingTensor], max_shard_bytes: int
) -> list[list[PendingTensor]]:
    shards: list[list[PendingTensor]] = []
    room = -1
    for tensor in pending:
        if tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _refuse_overwriting(directory: Path) -> None:
    # A reader prefers the single file, so an old one would hide new shards.
    try:
        names = os.listdir(directory)
    except OSError as cause:
        raise CheckpointError(
            f"{_SAVE}: {directory}: {cause.strerror}, expected a directory. "
            "Create it first."
        ) from None
    old = [
        name
        for name in names
        if name == INDEX_NAME
        or (name.startswith("model") and name.endswith(".safetensors"))
    ]
    if old:
        raise CheckpointError(
            f"{_SAVE}: {directory}: already holds {quote(min(old))}, expected no "
            "weights. Choose another directory or delete them."
        )

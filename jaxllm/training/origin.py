"""What data was made with, written beside it and compared before it is continued."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoints.files import quote, read_json_object, replacing
from jaxllm.core.errors import UserError

__all__ = ["digest_of_params", "digest_of_prompts", "keep_origin"]

_SAMPLE = 16


def digest_of_prompts(prompts: Iterable[Sequence[int]]) -> str:
    """Returns the SHA-256 of token ids, as hexadecimal digits."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([int(i) for i in prompt]).encode())
    return digest.hexdigest()


def digest_of_params(params: Any) -> str:
    """Returns a digest of shapes and of some numbers of every array.

    Training moves nearly every number, so a few tell one model from another, and
    nothing large leaves the devices.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # Indexed, not reshaped: a view of a sharded array would gather it.
        corner = leaf[tuple(slice(0, 1) for _ in leaf.shape[:-1])]
        numbers = np.ascontiguousarray(corner).reshape(-1)[:_SAMPLE]
        digest.update(
            f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode()
        )
        digest.update(numbers.tobytes())
    return digest.hexdigest()


def keep_origin(path: Path, origin: Mapping[str, Any]) -> None:
    """Writes what data is made with, or compares it with what is written.

    Args:
      path: The JSON file; its directory exists.
      origin: Names and values that JSON has.

    Raises:
      UserError: The data was begun with something else.
    """
    if not path.exists():
        with replacing(path, "cannot make data") as file:
            file.write(json.dumps(origin, indent=2).encode() + b"\n")
        return
    earlier = read_json_object(path, "cannot continue")
    for name in [*earlier, *origin]:
        before, now = earlier.get(name), origin.get(name)
        if before != json.loads(json.dumps(now)):
            raise UserError(
                f"cannot continue: {path}: was made with {name} {quote(before)}, "
                f"expected {quote(now)} as given now. Give the same again, or choose "
                f"another place."
            )

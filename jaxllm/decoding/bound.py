"""A drafter bound to its target, with what it learns from batch to batch."""

import os
from typing import Any

import jax

from jaxllm.checkpoints import LanguageModel
from jaxllm.checkpoints.safetensors import read_safetensors, write_safetensors
from jaxllm.core.errors import CheckpointError
from jaxllm.decoding.protocol import Drafter

__all__ = ["MEMORY", "BoundDrafter"]

MEMORY = "memory"
"""Name, in a drafter's parameters, of what it learns while it drafts."""


class BoundDrafter:
    """A drafter ready to run on one model; the one object here that changes.

    Pass it again and again as `drafter=` of `generate`: files are loaded once, and an
    online drafter goes on with what it has learned.

    Attributes:
      lm: The target.
      drafter: What the engine runs.
      params: The drafter's own parameters.
    """

    def __init__(self, lm: LanguageModel, drafter: Drafter):
        self.lm = lm
        self.drafter, self.params = drafter.bind(lm)

    def arguments(self, constraint: Any = None) -> dict[str, Any]:
        """Returns the parameters that the engine takes."""
        found = {"target": self.lm.params, "drafter": self.params}
        return found if constraint is None else {**found, "constraint": constraint}

    def save_memory(self, path: str | os.PathLike[str]) -> None:
        """Writes what the drafter has learned to a safetensors file."""
        write_safetensors(path, self._memory())

    def load_memory(self, path: str | os.PathLike[str]) -> None:
        """Goes on with what was learned and saved before.

        Raises:
          CheckpointError: The file is damaged, or another drafter's, or of a drafter
            with other options.
        """
        tensors = read_safetensors(path)
        wanted = self._memory()
        for name, x in wanted.items():
            found = tensors.get(name)
            shape = None if found is None else tuple(found.shape)
            if shape != x.shape:
                raise CheckpointError(
                    f"cannot warm-start: {os.fspath(path)}: {name} has shape {shape}, "
                    f"expected {x.shape}. Use the options that it was saved with."
                )

        def pick(at: Any, x: Any) -> Any:
            name = _name(at)
            if name not in wanted:
                return x
            return jax.numpy.asarray(tensors[name].read(), x.dtype)

        self.params = jax.tree_util.tree_map_with_path(pick, self.params)

    def _memory(self) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        return {
            _name(at): x
            for at, x in leaves
            if any(getattr(key, "key", None) == MEMORY for key in at)
        }


def _name(at: Any) -> str:
    return jax.tree_util.keystr(at, simple=True, separator=".")

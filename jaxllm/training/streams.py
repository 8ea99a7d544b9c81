"""The streams of batches that a run may learn from, opened by what configures them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoints import Tokenizer
from jaxllm.core.errors import ConfigError
from jaxllm.training.data import DataConfig, open_data
from jaxllm.training.documents import Documents
from jaxllm.training.trajectories import TrajectoryDataset

__all__ = ["Stream", "TrajectoryData", "open_stream", "place"]


class Stream(Protocol):
    """Batches one by one, with a position that can be saved."""

    def __next__(self) -> Any:
        """Returns the next batch, leaves numpy arrays with this process's rows first.

        Raises:
          StopIteration: There is none.
        """

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON data; each process has its own."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; raises `ConfigError` for that of another stream."""

    def close(self) -> None:
        """Lets go of threads and files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryData:
    """A finished collection of Jacobi trajectories, for the objective `consistency`.

    Attributes:
      directory: What `write_trajectories` has written.
      batch_rows: Blocks of a batch, over all processes.
      max_prefix: Blocks behind more tokens are left out; none when None.
      phase_in: Batches over which all positions of a block come to count.
      augment: As for `TrajectoryDataset`.
      seed: Of the order, the iterates and the augmentation.
    """

    directory: str
    batch_rows: int = 16
    max_prefix: int | None = None
    phase_in: int = 0
    augment: bool = True
    seed: int = 0


class TrajectoryStream:
    """Batches of trajectories without end; a position is the number of a batch."""

    def __init__(
        self, config: TrajectoryData, process_index: int = 0, process_count: int = 1
    ):
        """Opens a collection.

        Args:
          config: The collection and the shape of batches.
          process_index: Of this process.
          process_count: Processes that share every batch.

        Raises:
          ConfigError: The batch cannot be shared.
          CheckpointError: The collection is not finished.
        """
        if config.batch_rows < 1 or config.batch_rows % process_count:
            raise ConfigError(
                f"cannot open data: batch_rows: {config.batch_rows} rows for "
                f"{process_count} processes, expected a multiple of the processes. "
                f"Correct it."
            )
        self._items = TrajectoryDataset(
            config.directory,
            seed=config.seed,
            epochs=2**31,
            augment=config.augment,
            max_prefix=config.max_prefix,
            phase_in=config.phase_in * config.batch_rows,
        )
        self._rows = config.batch_rows // process_count
        self._share, self._shares, self._next = process_index, process_count, 0

    def __next__(self) -> Any:
        """Returns the next `TrajectoryBatch`."""
        first = (self._next * self._shares + self._share) * self._rows
        self._next += 1
        items = [self._items[i] for i in range(first, first + self._rows)]
        return jax.tree.map(lambda *xs: np.stack(xs), *items)

    def get_state(self) -> dict[str, Any]:
        """Returns the number of the next batch."""
        return {"batch": self._next, "blocks": len(self._items)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a batch."""
        if state.get("blocks") != len(self._items):
            raise ConfigError(
                f"cannot resume data: the saved position is one of "
                f"{state.get('blocks')} items, expected {len(self._items)}. Use the "
                f"trajectories of the saved run, or a new workdir."
            )
        self._next = int(state["batch"])

    def close(self) -> None:
        """Does nothing."""


def place(batch: Any, mesh: Mesh | None) -> Any:
    """Puts a batch on its devices, rows over the axes that share them.

    Args:
      batch: numpy arrays with this process's rows first.
      mesh: None for the default device.

    Returns:
      The batch of all processes.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def put(x: np.ndarray) -> jax.Array:
        spec = PartitionSpec(("data", "fsdp"), *(None,) * (x.ndim - 1))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(put, batch)


def open_stream(
    config: DataConfig | TrajectoryData,
    tokenizer: Tokenizer | None,
    cache: Path,
    memory: Mapping[str, Documents] | None = None,
) -> Stream:
    """Opens what a configuration of data names, for this process.

    Args:
      config: The data.
      tokenizer: Of the model.
      cache: Folder of token files.
      memory: As for `open_data`.

    Raises:
      UserError: As `open_data` or `TrajectoryStream`.
    """
    index, count = jax.process_index(), jax.process_count()
    if isinstance(config, TrajectoryData):
        return TrajectoryStream(config, index, count)
    if tokenizer is None:
        raise ConfigError(
            "cannot open data: the model has no tokenizer, expected one. Add its "
            "tokenizer.json."
        )
    return open_data(config, tokenizer, cache, index, count, memory)

"""A job of several processes: joined at the start, with one of them speaking.

All processes run the same calls on the same rows. The first one reads and writes the
output and prints; what the others have to know of it is sent to them.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

from jaxllm.cli.options import Flag, Number, UsageError

__all__ = ["PROCESSES", "Mirror", "first_says", "join_processes"]

AUTO = "auto"

PROCESSES = (
    Flag(
        "coordinator",
        None,
        "of several processes: the first one's host:port, or auto where the cluster "
        "says all (a TPU pod, Slurm, MPI, Kubernetes)",
    ),
    Number("num_processes", None, "processes of the job", low=1, integer=True),
    Number("process_id", None, "which of them this is, from 0", low=0, integer=True),
    Number(
        "initialization_timeout",
        300,
        "seconds to wait for the other processes",
        low=1,
        integer=True,
    ),
)


def join_processes(values: flags.FlagValues, action: str) -> None:
    """Joins the processes of a job; has to come before anything uses a device.

    Only the first one prints to standard output from here on.

    Args:
      values: The parsed flags, `PROCESSES` among them.
      action: What fails otherwise, such as `cannot train`.

    Raises:
      UsageError: Flags are missing, or no cluster is there to ask.
    """
    given = (values.num_processes, values.process_id)
    if values.coordinator is None and given == (None, None):
        return
    auto = values.coordinator == AUTO
    whole = values.coordinator is not None and (auto or None not in given)
    if not whole or (auto and given != (None, None)):
        raise UsageError(
            f"{action}: --coordinator, --num_processes and --process_id are given in "
            "part, expected all three, or --coordinator=auto alone. Add the others."
        )
    import jax

    options = {"initialization_timeout": values.initialization_timeout}
    if auto:
        try:
            jax.distributed.initialize(**options)
        except ValueError as cause:
            raise UsageError(
                f"{action}: --coordinator: auto, but no cluster says who is there "
                f"({cause}), expected a TPU pod, Slurm, MPI or Kubernetes. Give "
                "HOST:PORT, --num_processes and --process_id."
            ) from None
    else:
        jax.distributed.initialize(values.coordinator, *given, **options)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


class Mirror:
    """What the processes that do not write know of the rows that are there."""

    def __init__(self, keys: Iterable[Any], found: int, found_failed: int):
        """Starts with the rows that an earlier run left."""
        self._keys = {tuple(key) for key in keys}
        self.found, self.found_failed = found, found_failed

    def has(self, keys: Iterable[Any]) -> bool:
        """Returns whether one of these rows is there already."""
        return any(key in self._keys for key in keys)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Notes rows that the first process writes."""
        from jaxllm.cli.output import key_of

        self._keys.update(map(key_of, rows))


def first_says(make: Callable[[], Any]) -> Any:
    """Returns on every process what a function gives on the first.

    Args:
      make: Returns plain data, or raises a `UserError`, which all processes raise then.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from jaxllm.core.errors import UserError

    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            said = {"value": make()}
        except UserError as error:
            said = {"error": str(error)}
    data = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, len(data))] = data[:size]
    heard = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if "error" in heard:
        raise UserError(heard["error"])
    return heard["value"]

"""A wish to stop, from outside: SIGTERM, which schedulers send before they take a node.

Nothing is decided by one process alone: what one has heard, all must know, or some
would wait for others in a collective for ever.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np

__all__ = ["Interruption", "agreed"]


class Interruption:
    """Listens for SIGTERM while it is entered; the second one ends the process."""

    def __init__(self) -> None:
        """Has heard nothing yet."""
        self.is_asked = False
        self._before: Any = None

    def __enter__(self) -> "Interruption":
        """Begins to listen; outside of the main thread nobody can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        """Puts things back as they were."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.is_asked = True


def agreed(*wishes: bool) -> tuple[bool, ...]:
    """Returns of each wish whether any process of the job has it; all must ask."""
    if jax.process_count() == 1:
        return wishes
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.asarray(wishes))
    return tuple(found.any(axis=0).tolist())

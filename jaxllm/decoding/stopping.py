"""Stop strings, found in decoded text however tokens split them."""

from collections.abc import Sequence
from typing import Any

__all__ = ["StopText"]


class StopText:
    """Turns new tokens of one row into text that is safe to show.

    Text that might begin a stop string is withheld until it is known not to. A stop
    string may span tokens and accepted blocks; the text ends where it begins.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        """Makes a reader for one row.

        Args:
          tokenizer: Has `stream()`, which turns ids into text piece by piece.
          stop: Strings that end the row.
        """
        self._stream = tokenizer.stream()
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False
        self.tokens = 0
        """Tokens read, the one that completed a stop string included."""

    def step(self, ids: Sequence[int]) -> str:
        """Returns the text that further tokens make safe to show."""
        shown = []
        for token in ids:
            if self.stopped:
                break
            self.tokens += 1
            self._held += self._stream.step([token])
            shown.append(self._release())
        return "".join(shown)

    def finish(self) -> str:
        """Returns what was withheld, once the row has ended."""
        if self.stopped:
            return ""
        self._held += self._stream.finish()
        shown = self._release()
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _release(self) -> str:
        found = [i for i in (self._held.find(s) for s in self._stop) if i >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            self.stopped = True
            return shown
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0

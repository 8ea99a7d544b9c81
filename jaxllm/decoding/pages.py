"""Who owns which page of a paged cache: plain Python on the host.

A page is free, or read by one or several rows. A free page keeps its tokens until it is
taken, so a prompt that begins like an earlier one finds pages that are filled already.
Rows only write to pages that are theirs alone.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["Found", "PagePool"]


@dataclasses.dataclass(frozen=True)
class Found:
    """Pages that hold the beginning of a prompt.

    Attributes:
      pages: Full ones, in order.
      partial: A page that goes on like the prompt for `count` tokens; None where there
        is none. A row has to copy it, because it will write behind them.
      count: See there.
    """

    pages: list[int]
    partial: int | None = None
    count: int = 0


class PagePool:
    """Free pages, owners and contents.

    Source: PagedAttention (arXiv 2309.06180), sections 4.3 and 4.4; what free pages
      hold is kept as in its implementation's prefix cache.

    Attributes:
      pages: P, how many there are.
      page_slots: Tokens of a page.
    """

    def __init__(self, pages: int, page_slots: int):
        self.pages, self.page_slots = pages, page_slots
        self._readers = [0] * pages
        # In the order in which they are taken: those that were free longest first.
        self._free = collections.OrderedDict.fromkeys(range(pages))
        # What a page holds, and under which beginning: (digest before it, its tokens).
        self._content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self._full: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self._begins: dict[tuple[bytes, int], dict[int, None]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody reads."""
        return len(self._free)

    def readers(self, page: int) -> int:
        """Returns how many rows read a page."""
        return self._readers[page]

    def take(self, count: int) -> list[int] | None:
        """Returns pages for a row to write, or None where there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in taken:
            self._forget(page)
            self._readers[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Adds a reader to pages, free ones too."""
        for page in pages:
            self._free.pop(page, None)
            self._readers[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes a reader from a row's pages; those without any are free.

        The last page of a row is taken again first, so that beginnings stay longest.

        Raises:
          ValueError: A page had no reader.
        """
        for page in reversed(pages):
            if not self._readers[page]:
                raise ValueError(f"cannot release page {page}: nobody reads it")
            self._readers[page] -= 1
            if not self._readers[page]:
                self._free[page] = None

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Notes what a row's pages hold, so that other prompts find them.

        Args:
          tokens: Those whose keys and values are in the cache, from position 0.
          pages: The row's; the last may be part full.
        """
        before = b""
        for i, page in enumerate(pages):
            held = tuple(tokens[i * self.page_slots : (i + 1) * self.page_slots])
            if not held:
                return
            if self._content.get(page) != (before, held):
                self._forget(page)
                self._content[page] = (before, held)
                self._begins.setdefault((before, held[0]), {})[page] = None
            if len(held) == self.page_slots:
                self._full.setdefault((before, held), page)
            before = _digest(before, held)

    def find(self, tokens: Sequence[int]) -> Found:
        """Returns pages that hold the longest known beginning of some tokens."""
        found: list[int] = []
        before, slots = b"", self.page_slots
        for start in range(0, len(tokens), slots):
            wanted = tuple(tokens[start : start + slots])
            page = self._full.get((before, wanted))
            if page is None:
                best = (0, -1)
                for other in self._begins.get((before, wanted[0]), ()):
                    best = max(best, (_common(self._content[other][1], wanted), other))
                count, page = best
                return Found(found, page, count) if count else Found(found)
            found.append(page)
            before = _digest(before, wanted)
        return Found(found)

    def _forget(self, page: int) -> None:
        content = self._content.pop(page, None)
        if content is None:
            return
        before, held = content
        if self._full.get(content) == page:
            del self._full[content]
        others = self._begins[before, held[0]]
        del others[page]
        if not others:
            del self._begins[before, held[0]]


def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
    held = np.asarray(tokens, np.int64).tobytes()
    return hashlib.blake2b(before + held, digest_size=16).digest()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many first tokens agree."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))

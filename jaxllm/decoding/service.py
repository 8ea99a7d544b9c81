"""What a server is given: its sizes, and the rows that want to be decoded.

Letters: B places, S slots of a row, N pages of a row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.core.errors import ConfigError
from jaxllm.decoding.sampling import Sampler, make_sampler

__all__ = ["NOBODY", "Arrival", "Row", "Service", "join_sampling"]

_SAMPLING: dict[str, float] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """The sizes of a server; each is a compiled shape.

    Attributes:
      rows: B, rows that are decoded together.
      capacity: S, most tokens of a row: prompt, answer and a draft's depth.
      page_slots: Tokens of a page.
      pages: Pages of the pool; when None enough for every place to be full.
      steps: Steps between two looks of the host.
      verify: As in `make_sampler`.
    """

    rows: int = 8
    capacity: int = 1024
    page_slots: int = 16
    pages: int | None = None
    steps: int = 16
    verify: str = "match"

    def __post_init__(self) -> None:
        for name in ("rows", "capacity", "page_slots", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"cannot serve: {name} is {getattr(self, name)}, expected 1 or "
                    f"more. Correct it."
                )

    @property
    def row_pages(self) -> int:
        """N, pages of a full row."""
        return -(-self.capacity // self.page_slots)

    @property
    def pool(self) -> int:
        """Pages of the pool."""
        return self.rows * self.row_pages if self.pages is None else self.pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """A row that wants to be decoded.

    Attributes:
      prompt: Token ids, at least one.
      max_new_tokens: Most tokens to generate.
      seed: Of the row.
      sampling: Options of `make_sampler` for this row, but `verify`; greedy when
        empty.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
    """A row on its way: what is known of it, and where it stands.

    Attributes:
      index: Its number, in the order of submission.
      arrival: What it wants.
      tokens: Prompt and output so far.
      logprobs: Of the output so far.
      stats: Counts of earlier stays.
      ended: Whether an end token stopped it.
      pages: Its pages, in order.
    """

    index: int
    arrival: Arrival
    tokens: list[int]
    logprobs: list[float] = dataclasses.field(default_factory=list)
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    ended: bool = False
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def limit(self) -> int:
        """Tokens at which it stops."""
        return len(self.arrival.prompt) + self.arrival.max_new_tokens


NOBODY = Row(-1, Arrival(prompt=[0], max_new_tokens=0), [0])


def join_sampling(arrivals: Sequence[Arrival], verify: str) -> Sampler:
    """Returns the sampler of some rows; what one leaves out is the default.

    Raises:
      ConfigError: An option is unknown or out of range.
    """
    for arrival in arrivals:
        for name in arrival.sampling:
            if name not in _SAMPLING:
                raise ConfigError(
                    f"cannot serve: sampling has {name!r}, expected one of "
                    f"{', '.join(_SAMPLING)}. Correct it."
                )
    columns: dict[str, Any] = {
        name: [arrival.sampling.get(name, default) for arrival in arrivals]
        for name, default in _SAMPLING.items()
    }
    return make_sampler(len(arrivals), **columns, verify=verify)

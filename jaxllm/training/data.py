"""Data: what is read, how it is packed into rows, and the stream of batches.

Documents come in a shuffled order, several of them share a row, and rows make batches.
Where every document of the stream stands depends on the configuration alone, so a
stream can be stopped anywhere, and go on elsewhere with the same batches.

    concat      documents follow each other without a gap and are split at the ends of
                rows. A piece is a document of its own: positions from 0, and its first
                token is not learned
    first_fit   a document goes whole into the first row with room for it; what a row
                cannot hold is cut off and counted

An endless stream takes from every source by its weight, and each process reads its own
share of the documents. A stream of a given number of epochs reads every document that
often, fills the last batch with rows of weight 0, and is the same for any number of
processes: each packs all documents and takes its rows of every batch.

Letters: B rows of this process, T tokens of a row.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.checkpoints import Tokenizer
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.core.registry import unknown_name
from jaxllm.training.batch import Batch
from jaxllm.training.corpus import Progress
from jaxllm.training.documents import Documents
from jaxllm.training.sources import (
    OpenSource,
    SourceConfig,
    SourceSummary,
    open_source,
)

if TYPE_CHECKING:
    import grain

__all__ = [
    "PACKINGS",
    "BatchStream",
    "DataConfig",
    "open_data",
]

_OPEN = "cannot open data"
_STATE_VERSION = 1
# More rows open at a time leave less padding, and take longer to restore.
_OPEN_ROWS = 32
_FEW = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from, and in which order and shape.

    Attributes:
      sources: At least one.
      row_length: T, from 2.
      batch_rows: Rows of a batch, over all processes.
      packing: `"concat"` or `"first_fit"`.
      epochs: How often each document is read; None for an endless stream.
      shuffle: Whether documents come in an order of their own in every epoch.
      seed: Of the order; 0 to 2**32 - 1.
      prefetch: Batches made ahead in a thread; 0 makes each when it is asked for.
    """

    sources: tuple[SourceConfig, ...]
    row_length: int = 512
    batch_rows: int = 8
    packing: str = "concat"
    epochs: int | None = None
    shuffle: bool = True
    seed: int = 0
    prefetch: int = 2


class BatchStream(Iterator[Batch]):
    """Batches one by one, with a position that can be saved.

    Attributes:
      sources: What each source brings.
    """

    def __init__(
        self,
        iterator: "grain.DatasetIterator",
        sources: tuple[SourceSummary, ...],
        label: Mapping[str, Any],
    ):
        """Wraps an iterator over dicts of arrays; `open_data` makes one."""
        self.sources, self._label, self._held = sources, dict(label), [iterator]
        # At exit too, while the modules that the thread needs are still there.
        self._finish = weakref.finalize(self, _let_go, self._held)

    def __next__(self) -> Batch:
        """Returns the next batch, leaves numpy arrays `[B, T]`."""
        return Batch(**next(self._iterator))

    @property
    def _iterator(self) -> "grain.DatasetIterator":
        if not self._held:
            raise ValueError("cannot read data: the stream was closed")
        return self._held[0]

    def get_state(self) -> dict[str, Any]:
        """Returns the position behind the last batch that was taken.

        Returns:
          JSON data of some hundred bytes. Each process has its own.
        """
        state = json.loads(json.dumps(self._iterator.get_state()))
        return {**self._label, "position": state}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; the next batch is the one that followed it.

        Args:
          state: What `get_state` returned, of a stream of the same data and shape.

        Raises:
          ConfigError: It is of other data, of another process or number of them, or
            no such state.
        """
        for name, own in self._label.items():
            found = state.get(name)
            if found != own:
                raise ConfigError(
                    f"cannot resume data: {name}: the saved position has {found!r}, "
                    f"expected {own!r} as this run. Run with the data, the batch and "
                    "the processes of the saved run, or start the data afresh."
                )
        # The packer tells spans by comparing tuples, which JSON has not.
        self._iterator.set_state(_with_tuples(state["position"]))

    def close(self) -> None:
        """Stops the thread that reads ahead; there are no more batches."""
        self._finish()


def _let_go(held: list["grain.DatasetIterator"]) -> None:
    held.pop().close()


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    process_index: int = 0,
    process_count: int = 1,
    memory: Mapping[str, Documents] | None = None,
    progress: Progress | None = None,
) -> BatchStream:
    """Opens the sources, tokenises those that were not yet, and starts a stream.

    Args:
      config: The sources and the shape of batches.
      tokenizer: Of the model.
      cache_dir: Where token files are kept.
      process_index: Of this process.
      process_count: Processes that share every batch.
      memory: Sources of format `"memory"` by name.
      progress: Told of the bytes read while a source is tokenised.

    Returns:
      The stream; B is `batch_rows / process_count`.

    Raises:
      ConfigError: A field has no sense, a corpus is absent, or the batch cannot be
        shared by the processes.
      UserError: A corpus cannot be read, or there is too little for one batch.
      CheckpointError: A corpus has conversations and the tokenizer no chat template.
    """
    _check(config, process_index, process_count)
    sources = tuple(
        open_source(
            source,
            tokenizer,
            cache_dir,
            longest=config.row_length if config.packing == "first_fit" else None,
            memory=memory or {},
            progress=progress,
        )
        for source in config.sources
    )
    if config.epochs is None:
        _check_fills_a_batch(config, sources)
    summaries = _with_shares(config, sources)
    shown = dataclasses.asdict(config)
    del shown["sources"], shown["prefetch"]
    identity = json.dumps([shown, *(s.identity for s in sources)])
    label = {
        "version": _STATE_VERSION,
        "data": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "process": process_index,
        "processes": process_count,
    }
    dataset = _batches(config, sources, process_index, process_count)
    return BatchStream(iter(dataset), summaries, label)


# --- Checks ----------------------------------------------------------------------


def _check(config: DataConfig, process_index: int, process_count: int) -> None:
    def refuse(field: str, found: object, expected: str, action: str) -> ConfigError:
        return ConfigError(f"{_OPEN}: {field}: {found}, expected {expected}. {action}")

    if config.packing not in PACKINGS:
        raise unknown_name("packing", config.packing, PACKINGS)
    for field, least in (("row_length", 2), ("batch_rows", 1), ("prefetch", 0)):
        value = getattr(config, field)
        if value < least:
            raise refuse(field, value, f"{least} or more", "Raise it.")
    if config.epochs is not None and config.epochs < 1:
        raise refuse("epochs", config.epochs, "1 or more, or None", "Raise it.")
    if not 0 <= config.seed < 2**32:
        raise refuse("seed", config.seed, "0 to 4294967295", "Choose another.")
    if not config.sources:
        raise refuse("sources", "none", "one at least", "Add one.")
    if not 0 <= process_index < process_count:
        raise refuse(
            "process_index", process_index, f"below {process_count}", "Correct it."
        )
    if config.batch_rows % process_count:
        raise refuse(
            "batch_rows",
            f"{config.batch_rows} rows for {process_count} processes",
            "a multiple of the processes",
            f"Use {math.ceil(config.batch_rows / process_count) * process_count}.",
        )
    for source in config.sources:
        if not 0 < source.weight < math.inf:
            raise refuse(
                f"weight of {source.path}", source.weight, "above 0", "Raise it."
            )
    if config.epochs is not None and len({s.weight for s in config.sources}) > 1:
        raise refuse(
            "weight",
            "differs between sources that are read a given number of times",
            "weights for an endless stream only",
            "Leave out the weights or epochs.",
        )


def _check_fills_a_batch(config: DataConfig, sources: Sequence[OpenSource]) -> None:
    documents = sum(source.summary.documents for source in sources)
    tokens = round(sum(source.kept_tokens for source in sources))
    wanted = config.batch_rows * config.row_length
    is_enough = documents >= config.batch_rows
    if config.packing == "concat":
        is_enough = tokens >= wanted
    if not is_enough:
        names = ", ".join(source.path for source in config.sources)
        raise UserError(
            f"{_OPEN}: {names[:200]}: {documents} documents of {tokens} tokens in all, "
            f"expected enough for a batch of {config.batch_rows} rows of "
            f"{config.row_length}. Add documents, or make rows fewer or shorter."
        )


def _with_shares(
    config: DataConfig, sources: Sequence[OpenSource]
) -> tuple[SourceSummary, ...]:
    parts = [s.weight if config.epochs is None else s.kept_tokens for s in sources]
    return tuple(
        dataclasses.replace(source.summary, share=part / sum(parts))
        for source, part in zip(sources, parts, strict=True)
    )


# --- Order, rows and batches -----------------------------------------------------


def _batches(
    config: DataConfig,
    sources: Sequence[OpenSource],
    process_index: int,
    process_count: int,
) -> "grain.IterDataset":
    import grain

    joined = [
        grain.MapDataset.concatenate(
            [grain.MapDataset.source(part) for part in source.documents]
        )
        for source in sources
    ]
    seeds = np.random.SeedSequence(config.seed).generate_state(len(joined) + 1)
    if config.epochs is None:
        # Shared out before they are mixed: else processes whose number divides the
        # rhythm of the mixture would each see one source only.
        share = slice(process_index, None, process_count)
        parts = [
            _ordered(part, config, int(seed)).repeat()[share]
            for part, seed in zip(joined, seeds, strict=False)
        ]
        # The mixture counts documents, the weights tokens.
        weights = [s.weight * s.summary.documents / s.kept_tokens for s in sources]
        documents = grain.MapDataset.mix(parts, weights) if parts[1:] else parts[0]
        rows, own_rows = config.batch_rows // process_count, slice(None)
    else:
        whole = _ordered(grain.MapDataset.concatenate(joined), config, int(seeds[0]))
        documents = whole.repeat(config.epochs)
        rows = config.batch_rows
        size = rows // process_count
        own_rows = slice(process_index * size, (process_index + 1) * size)
    # The thread that reads ahead is enough: the files are mapped, not read.
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0))
    packed = PACKINGS[config.packing](stream, config, int(seeds[-1]))
    batched = packed.batch(
        rows,
        drop_remainder=False,
        batch_fn=functools.partial(_stack, rows=rows, own_rows=own_rows),
    )
    if not config.prefetch:
        return batched
    return grain.experimental.ThreadPrefetchIterDataset(
        batched, prefetch_buffer_size=config.prefetch
    )


def _ordered(
    documents: "grain.MapDataset", config: DataConfig, seed: int
) -> "grain.MapDataset":
    import grain

    if not config.shuffle:
        return documents
    if len(documents) <= _FEW:
        orders = _Orders(len(documents), seed)
        return grain.MapDataset.select_from_datasets([documents], orders)
    return documents.shuffle(seed=seed)


class _Orders:
    """An order for every epoch of few documents.

    The shuffle of grain looks for its next number among 2**16, whatever their count:
    milliseconds a document where there are ten of them.
    """

    def __init__(self, count: int, seed: int):
        self._count, self._seed = count, seed
        self._last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self._count)
        last = self._last
        if last is None or last[0] != epoch:
            # These numbers are the same in every version of numpy.
            numbers = np.random.SeedSequence((self._seed, epoch)).generate_state(
                self._count, np.uint64
            )
            last = self._last = epoch, np.argsort(numbers, kind="stable")
        return 0, int(last[1][place])


def _concat(
    stream: "grain.IterDataset", config: DataConfig, seed: int
) -> "grain.IterDataset":
    import grain

    lengths = {"tokens": config.row_length, "learn": config.row_length}
    return grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=lengths)


def _first_fit(
    stream: "grain.IterDataset", config: DataConfig, seed: int
) -> "grain.IterDataset":
    import grain

    lengths = {"tokens": config.row_length, "learn": config.row_length}
    return grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct=lengths,
        num_packing_bins=_OPEN_ROWS,
        seed=seed,
        # The first rows are the fullest.
        shuffle_bins=config.shuffle,
    )


PACKINGS: dict[str, Callable[..., "grain.IterDataset"]] = {
    "concat": _concat,
    "first_fit": _first_fit,
}


def _stack(
    elements: Sequence[Mapping[str, np.ndarray]], *, rows: int, own_rows: slice
) -> dict[str, np.ndarray]:
    """Makes packed rows one batch, with empty rows where there are too few."""

    def stacked(name: str) -> np.ndarray:
        whole = np.stack([element[name] for element in elements])
        missing = rows - len(elements)
        return np.pad(whole, ((0, missing), (0, 0)))[own_rows]

    segment_BT = stacked("tokens_segment_ids")
    position_BT = stacked("tokens_positions")
    # Nothing stands before the first token of a document, or of its piece.
    is_learned = (stacked("learn") > 0) & (position_BT > 0) & (segment_BT > 0)
    return {
        "tokens_BT": stacked("tokens"),
        "segment_BT": segment_BT,
        "position_BT": position_BT,
        "weight_BT": is_learned.astype(np.float32),
    }


def _with_tuples(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {name: _with_tuples(value) for name, value in state.items()}
    return tuple(map(_with_tuples, state)) if isinstance(state, list) else state

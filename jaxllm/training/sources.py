"""Sources: files or things in memory, opened as documents that fit the rows."""

import dataclasses
import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoints import Tokenizer
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.core.registry import unknown_name
from jaxllm.training.corpus import Progress
from jaxllm.training.documents import Documents
from jaxllm.training.token_files import TokenFile, open_token_file

__all__ = ["OpenSource", "SourceConfig", "SourceSummary", "open_source"]

_OPEN = "cannot open data"
_MEASURED = 256
# The shuffle counts in 32 bits.
_MAX_DOCUMENTS = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where documents come from.

    Attributes:
      path: A file, or a pattern such as `part-*.jsonl.gz` for several that are one
        source; the name of the source where the format is `"memory"`.
      weight: Its share of the tokens of an endless stream, relative to the others.
      format: `"text"`, `"jsonl"`, `"auto"` by the name of the file, or `"memory"`.
      separator: The line between documents of a text; without one a file is one
        document.
    """

    path: str
    weight: float = 1.0
    format: str = "auto"
    separator: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What a source brings.

    Attributes:
      name: As the configuration has it.
      documents: How many.
      tokens: Of all documents.
      is_estimate: Whether the tokens are estimated from the first documents.
      cut_documents: Documents that are longer than a row and lose their end.
      cut_tokens: Tokens that are lost so.
      share: Of the tokens of the stream.
    """

    name: str
    documents: int
    tokens: int
    is_estimate: bool = False
    cut_documents: int = 0
    cut_tokens: int = 0
    share: float = 0.0


@dataclasses.dataclass(frozen=True)
class OpenSource:
    """A source whose documents can be read.

    Attributes:
      documents: Dicts `tokens` (int32) and `learn` (uint8) by number, file by file.
      summary: What it brings; its share is not known yet.
      weight: As the configuration has it.
      kept_tokens: Tokens of its documents, without what is cut off.
      identity: JSON data; differs where the documents do, as far as one can know.
    """

    documents: tuple["_Fitting", ...]
    summary: SourceSummary
    weight: float
    kept_tokens: float
    identity: tuple[Any, ...]


def open_source(
    source: SourceConfig,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    *,
    longest: int | None = None,
    memory: Mapping[str, Documents],
    progress: Progress | None = None,
) -> OpenSource:
    """Opens a source, and tokenises it where that was not done yet.

    Args:
      source: Which.
      tokenizer: Of the model.
      cache_dir: Where token files are kept.
      longest: Tokens that a document may have: the rest of a file's document is cut
        off, a longer one in memory is refused when it is read. None for any length.
      memory: Sources of format `"memory"` by name.
      progress: Told of the bytes read while a file is tokenised.

    Returns:
      The source.

    Raises:
      ConfigError: A corpus is absent, or a name or the format unknown.
      UserError: A corpus or a document cannot be read.
      CheckpointError: A corpus has conversations and the tokenizer no chat template.
    """
    if source.format == "memory":
        if source.path not in memory:
            raise unknown_name("source in memory", source.path, memory)
        return _from_memory(source, memory[source.path], longest)
    files = tuple(
        open_token_file(
            path,
            tokenizer,
            cache_dir,
            format=source.format,
            separator=source.separator,
            progress=progress,
        )
        for path in _paths(source.path)
    )
    return _from_files(source, files, longest)


def _paths(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise ConfigError(
            f"cannot open corpus: {pattern}: no file has such a name, expected one at "
            f"least (looked for {path.absolute()}). Check the pattern."
        )
    return found


def _from_files(
    source: SourceConfig, files: tuple[TokenFile, ...], longest: int | None
) -> OpenSource:
    tokens = sum(file.header.tokens for file in files)
    cut_documents = cut_tokens = 0
    if longest is not None:
        for file in files:
            over = np.maximum(file.lengths - longest, 0)
            cut_documents += int(np.count_nonzero(over))
            cut_tokens += int(over.sum())
    summary = SourceSummary(
        name=source.path,
        documents=sum(map(len, files)),
        tokens=tokens,
        cut_documents=cut_documents,
        cut_tokens=cut_tokens,
    )
    return OpenSource(
        documents=tuple(_Fitting(source.path, file, longest, True) for file in files),
        summary=summary,
        weight=source.weight,
        kept_tokens=tokens - cut_tokens,
        identity=(source.weight, *(file.header.sha256 for file in files)),
    )


def _from_memory(
    source: SourceConfig, documents: Documents, longest: int | None
) -> OpenSource:
    count = len(documents)
    if not 0 < count <= _MAX_DOCUMENTS:
        raise ConfigError(
            f"{_OPEN}: {source.path}: {count} documents in memory, expected 1 to "
            f"{_MAX_DOCUMENTS}. Make as many."
        )
    fitting = _Fitting(source.path, documents, longest, False)
    # All of them may take hours to make.
    sample = min(count, _MEASURED)
    mean = sum(len(fitting[index]["tokens"]) for index in range(sample)) / sample
    summary = SourceSummary(
        name=source.path,
        documents=count,
        tokens=round(mean * count),
        is_estimate=sample < count,
    )
    return OpenSource(
        documents=(fitting,),
        summary=summary,
        weight=source.weight,
        kept_tokens=mean * count,
        identity=(source.weight, source.path, count),
    )


class _Fitting:
    """Documents as the packers want them; refuses what is no document."""

    def __init__(
        self, name: str, documents: Documents, longest: int | None, may_cut: bool
    ):
        # A text may lose its end; the answer of an example may not.
        self._name, self._documents = name, documents
        self._longest, self._may_cut = longest, may_cut

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, learn = (np.asarray(part) for part in self._documents[index])
        where = f"{_OPEN}: {self._name}: document {index}"
        if not tokens.size or tokens.shape != learn.shape or tokens.ndim != 1:
            raise UserError(
                f"{where}: tokens of shape {tokens.shape} and a mask of {learn.shape}, "
                "expected one axis, equally long and not empty. Correct the source."
            )
        if self._longest is not None and len(tokens) > self._longest:
            if not self._may_cut:
                raise UserError(
                    f"{where}: {len(tokens)} tokens, expected at most {self._longest}, "
                    "as a row holds. Raise row_length."
                )
            tokens, learn = tokens[: self._longest], learn[: self._longest]
        return {"tokens": tokens.astype(np.int32), "learn": learn.astype(np.uint8)}

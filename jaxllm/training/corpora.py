"""What the shipped models learn from, as documents of text, and their tokenizer.

    stories   two files of TinyStories; what stands in the validation text is left out
    Python    the standard library and the installed packages of this interpreter
    tasks     `jaxllm.training.synthetic`, made and not read

No text comes with the package: stories are read from a directory, and Python source is
read where it is installed, so another environment has other documents.
"""

import ast
import hashlib
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import unknown_name
from jaxllm.training.corpus import CorpusReader
from jaxllm.training.synthetic import END_OF_TEXT, SPLITS

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "Stories",
    "interleave",
    "python_documents",
    "python_roots",
    "read_stories",
    "split_source",
    "train_tokenizer",
    "without_overlap",
]

# --- Stories ---------------------------------------------------------------------

_STORIES_TRAIN = "tinystories_train.txt.gz"
_STORIES_VALID = "tinystories_valid.txt.gz"


@dataclass(frozen=True)
class Stories:
    """The stories of a directory.

    Attributes:
      train: Stories to learn from; none of them stands in `held_back`.
      held_back: The validation text, stories end to end.
    """

    train: tuple[str, ...]
    held_back: str


def read_stories(directory: str | os.PathLike[str]) -> Stories:
    """Reads TinyStories.

    Args:
      directory: Has `tinystories_train.txt.gz`, stories with a line `<|endoftext|>`
        between them, and `tinystories_valid.txt.gz`, plain text.

    Returns:
      The stories, in the order of the file.

    Raises:
      UserError: A file is missing, damaged or not UTF-8.
    """

    def texts(name: str, separator: str | None) -> list[str]:
        path = Path(directory) / name
        reader = CorpusReader(path, format="text", separator=separator)
        return [str(record.content).strip() for record in reader]

    held_back = "\n".join(texts(_STORIES_VALID, None))
    stories = without_overlap(texts(_STORIES_TRAIN, END_OF_TEXT), held_back)
    return Stories(tuple(stories), held_back)


def without_overlap(documents: Iterable[str], held_back: str) -> list[str]:
    """Returns the documents, without empty ones and those of a held-back text.

    A document is recognised by any of three passages of 80 characters, from characters
    0, 200 and 400 on, whatever its white space. One that is shorter is kept.

    Args:
      documents: Any texts.
      held_back: The text that nothing may be learned from.
    """

    def flat(text: str) -> str:
        return re.sub(r"\s+", " ", text).strip()

    held_back = flat(held_back)

    def is_held_back(document: str) -> bool:
        document = flat(document)
        starts = (i for i in (0, 200, 400) if i + 80 <= len(document))
        return any(document[i : i + 80] in held_back for i in starts)

    return [text for text in documents if text and not is_held_back(text)]


# --- Python ----------------------------------------------------------------------

_LARGEST_FILE = 200_000
_SHORTEST = 100
_LONGEST_LINE = 120
_LEAST_LETTERS = 0.5
_TEST_SHARE = 32
"""One file in so many is held back."""
_KEPT_WITHOUT_DOCSTRING = 4
"""Of the documents that explain nothing, one in so many is taken."""
_FOLDERS_LEFT_OUT = {
    "__pycache__",
    "idle_test",
    "lib2to3",
    "node_modules",
    "site-packages",
    "test",
    "testing",
    "tests",
}
_FILES_LEFT_OUT = re.compile(r"test_.*|.*_tests?\.py|conftest\.py|.*_pb2(_grpc)?\.py")


def python_roots() -> tuple[Path, ...]:
    """Returns the folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    found = (Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))
    return tuple(dict.fromkeys(found))


def python_documents(
    split: str = "train",
    characters: int | None = None,
    roots: Sequence[Path] | None = None,
    longest: int = 2000,
) -> Iterator[str]:
    """Yields Python source: definitions with what belongs to them, no document twice.

    Left out are tests, generated code, files that do not parse or exceed 200 kB,
    documents of long lines or mostly numbers, and three in four of those without a
    docstring. A file belongs to one split as a whole, by a hash of its path. The order
    is that of the hashes too, so that a few characters are a sample of all packages.

    Args:
      split: "train" or "test".
      characters: Ends after about so many; None reads everything.
      roots: Folders to read; those of this interpreter when None.
      longest: Characters of a document at most.

    Yields:
      Documents without white space around them.

    Raises:
      ConfigError: The split is unknown.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    files = {
        path.relative_to(root).as_posix(): path
        for root in reversed(python_roots() if roots is None else tuple(roots))
        for path in _python_files(root)
    }
    hashed = sorted((hashlib.sha256(name.encode()).digest(), name) for name in files)
    seen: set[bytes] = set()
    total = 0
    # The files of the other split are read as well: of two equal documents the first
    # in order is taken, and the other may not appear in either split.
    for digest, name in hashed:
        own = SPLITS[int.from_bytes(digest[-8:], "big") % _TEST_SHARE == 0]
        for document in _documents_of(files[name], longest):
            key = hashlib.sha256(" ".join(document.split()).encode()).digest()
            if key not in seen and own == split:
                total += len(document)
                yield document
            seen.add(key)
            if characters is not None and total >= characters:
                return


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        # Changing the list is how `os.walk` is told where not to go.
        folders[:] = [
            f for f in folders if f not in _FOLDERS_LEFT_OUT and not f.startswith(".")
        ]
        for file in files:
            if file.endswith(".py") and not _FILES_LEFT_OUT.fullmatch(file):
                yield Path(folder, file)


def _documents_of(path: Path, longest: int) -> Iterator[str]:
    try:
        content = path.read_bytes()
        if len(content) > _LARGEST_FILE:
            return
        pieces = split_source(content.decode("utf-8-sig"), longest)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        # Also templates of source, and source of other versions.
        return
    for text, explained in pieces:
        digest = hashlib.sha256(text.encode()).digest()
        kept = explained or digest[0] % _KEPT_WITHOUT_DOCSTRING == 0
        if kept and _is_readable(text):
            yield text


def _is_readable(text: str) -> bool:
    visible = "".join(text.split())
    return (
        len(text) >= _SHORTEST
        and max(map(len, text.splitlines())) <= _LONGEST_LINE
        and sum(map(str.isalpha, visible)) >= _LEAST_LETTERS * len(visible)
    )


def split_source(source: str, longest: int) -> list[tuple[str, bool]]:
    """Cuts Python source between definitions.

    Neighbours share a document while there is room for them. A class that is too long
    is cut between its methods; what is too long then is left out, and so are comments
    at the beginning of a file, which are seldom about the code.

    Args:
      source: A module.
      longest: Characters of a document at most.

    Returns:
      Documents in order, each with whether anything in it has a docstring.

    Raises:
      SyntaxError: The source is no Python of this version.
      ValueError: It holds a null byte.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    lines = source.split("\n")
    if not tree.body:
        return []
    return _pack(tree, _first_line(tree.body[0]), lines, longest)


def _first_line(node: ast.stmt) -> int:
    """Returns the line of a statement, or of its first decorator, from 0."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1


def _pack(
    owner: ast.Module | ast.ClassDef, start: int, lines: list[str], longest: int
) -> list[tuple[str, bool]]:
    """Returns the documents of a body; the first begins at line `start`, from 0."""
    documents: list[tuple[str, bool]] = []
    explained = ast.get_docstring(owner, clean=False) is not None

    def text(stop: int) -> str:
        return textwrap.dedent("\n".join(lines[start:stop])).strip()

    def close(stop: int) -> None:
        if 0 < len(text(stop)) <= longest:
            documents.append((text(stop), explained))

    end = start
    for node in owner.body:
        stop = node.end_lineno or end
        if end > start and len(text(stop)) > longest:
            close(end)
            start, explained = end, False
        if isinstance(node, ast.ClassDef) and len(text(stop)) > longest:
            documents += _pack(node, start, lines, longest)
            start, explained = stop, False
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            explained |= ast.get_docstring(node, clean=False) is not None
        end = stop
    close(end)
    return documents


# --- The mixture -----------------------------------------------------------------


def interleave(
    sources: Mapping[str, Iterable[str]], shares: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    """Yields documents of several sources so that each has its share of the characters.

    Args:
      sources: Documents by the name of their source.
      shares: Of every source, positive; relative to each other.

    Yields:
      A source's name and its next document, always of the source that is furthest
      behind its share. Ends when that source does.

    Raises:
      ConfigError: The names differ, or a share is not positive.
    """
    if set(sources) != set(shares) or not all(share > 0 for share in shares.values()):
        raise ConfigError(
            f"cannot mix documents: shares: {dict(shares)}, expected a positive number "
            f"for each of {', '.join(sorted(sources))}. Correct the shares."
        )
    iterators = {name: iter(source) for name, source in sources.items()}
    done = dict.fromkeys(sources, 0.0)
    while done:
        name = min(done, key=done.__getitem__)
        document = next(iterators[name], None)
        if document is None:
            return
        done[name] += len(document) / shares[name]
        yield name, document


# --- The tokenizer ---------------------------------------------------------------


def train_tokenizer(
    documents: Iterable[str], vocabulary: int
) -> "tokenizers.Tokenizer":
    """Trains a byte-level BPE tokenizer, `<|endoftext|>` (id 0) before every text.

    Every digit is a token of its own, so that a model can learn to calculate. Every
    byte is a token, so that any text can be written.

    Args:
      documents: What to learn the merges from.
      vocabulary: Entries, at least 257; fewer where the documents give no more.

    Returns:
      A tokenizer of the `tokenizers` package.

    Raises:
      ConfigError: The vocabulary has no room for the bytes and the end marker.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet):
        raise ConfigError(
            f"cannot train a tokenizer: vocabulary: {vocabulary}, expected at least "
            f"{len(alphabet) + 1}, the bytes and the end marker. Use 2048 or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer

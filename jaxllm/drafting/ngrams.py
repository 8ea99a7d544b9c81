"""Tables of n-gram counts: looked up on the device, kept in files.

A trigram table is a direct map: a context of two tokens has one slot, which holds that
context and its likeliest next tokens, or another context of the same slot. What the
map lacks falls back to bigrams, then to unigrams. An entry that is not there is token
-1 with probability 0.

Letters: B rows, S slots of a row, F contexts looked up, H slots of the table, R
candidates of a context, V vocabulary.
"""

import difflib
import importlib.resources
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.checkpoints import read_metadata, read_safetensors, write_safetensors
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.core.pytree import pytree_dataclass

__all__ = [
    "TrigramTable",
    "empty_table",
    "load_table",
    "lookup",
    "lookup_reference",
    "resolve_table",
    "save_table",
    "shipped_tables",
    "slot_of",
]

FORMAT = "ngrams-1"

_FIND = "cannot find n-gram table"
_READ = "cannot read n-gram table"
_NONE_16 = np.iinfo(np.uint16).max


@pytree_dataclass
class TrigramTable:
    """What tends to follow two tokens, one token, and nothing at all.

    Attributes:
      key_H2: int32 context (u, v) of each slot; (-1, -1) in an empty one.
      next_HR: int32 candidates, in no order.
      prob_HR: float32 probability of each candidate after the context.
      bigram_next_VR: int32 candidates after one token; their number is R's own.
      bigram_prob_VR: float32.
      unigram_next_R: int32 the likeliest tokens of all, as many as trigrams have.
      unigram_prob_R: float32.
    """

    key_H2: Array
    next_HR: Array
    prob_HR: Array
    bigram_next_VR: Array
    bigram_prob_VR: Array
    unigram_next_R: Array
    unigram_prob_R: Array

    @property
    def slots(self) -> int:
        """H."""
        return self.next_HR.shape[0]

    @property
    def rank(self) -> int:
        """R of the trigrams."""
        return self.next_HR.shape[1]

    @property
    def bigram_rank(self) -> int:
        """R of the bigrams."""
        return self.bigram_next_VR.shape[1]

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.bigram_next_VR.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in memory: `H (8 + 8 R)` and 8 for each bigram and unigram."""
        backoff = self.vocabulary * self.bigram_rank + self.unigram_next_R.shape[0]
        return self.slots * (8 + 8 * self.rank) + 8 * backoff


def slot_of(u: Any, v: Any, slots: int) -> Any:
    """Returns the slot of contexts, for numpy and JAX arrays alike.

    Args:
      u: int32 tokens.
      v: int32 tokens behind them.
      slots: H.

    Returns:
      int32 of the common shape.
    """
    x = u.astype("uint32") * np.uint32(0x9E3779B1) + v.astype("uint32")
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x85EBCA77)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE3D)
    x = x ^ (x >> np.uint32(16))
    return (x % np.uint32(slots)).astype("int32")


def empty_table(
    vocabulary: int, slots: int, rank: int = 4, bigram_rank: int | None = None
) -> TrigramTable:
    """Returns a table that knows nothing.

    Args:
      vocabulary: V.
      slots: H.
      rank: R of trigrams and unigrams.
      bigram_rank: R of bigrams; the same when None.
    """
    bigram_rank = rank if bigram_rank is None else bigram_rank
    for name, value in (("slots", slots), ("rank", rank), ("bigram_rank", bigram_rank)):
        if value < 1:
            raise ConfigError(
                f"cannot make an n-gram table: {name} is {value}, expected 1 or more. "
                f"Correct it."
            )
    return TrigramTable(
        key_H2=jnp.full((slots, 2), -1, jnp.int32),
        next_HR=jnp.full((slots, rank), -1, jnp.int32),
        prob_HR=jnp.zeros((slots, rank), jnp.float32),
        bigram_next_VR=jnp.full((vocabulary, bigram_rank), -1, jnp.int32),
        bigram_prob_VR=jnp.zeros((vocabulary, bigram_rank), jnp.float32),
        unigram_next_R=jnp.full((rank,), -1, jnp.int32),
        unigram_prob_R=jnp.zeros((rank,), jnp.float32),
    )


def lookup(table: TrigramTable, u_BF: Array, v_BF: Array) -> tuple[Array, Array]:
    """Looks contexts up, with backoff where the table lacks them.

    Args:
      table: The table.
      u_BF: int32 tokens, -1 where there is none.
      v_BF: int32 tokens behind them.

    Returns:
      int32 candidates `[B, F, R]`, -1 for none, and their float32 probabilities; R is
      the larger of the table's two. Of whatever the table holds, only ids of the
      vocabulary come out, and only probabilities from 0 to 1.
    """
    width = max(table.rank, table.bigram_rank)
    slot_BF = slot_of(u_BF, v_BF, table.slots)
    key_BF2 = table.key_H2[slot_BF]
    hit_BF1 = ((key_BF2[..., 0] == u_BF) & (key_BF2[..., 1] == v_BF))[..., None]

    def wide(x: Array, empty: Any) -> Array:
        short = ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),)
        return jnp.pad(x, short, constant_values=empty)

    two_BFR = table.bigram_next_VR[v_BF]
    none_BF1 = two_BFR[..., :1] < 0

    def choose(three: Array, two: Array, one: Array, empty: Any) -> Array:
        backoff = jnp.where(none_BF1, wide(one, empty), wide(two, empty))
        return jnp.where(hit_BF1, wide(three, empty), backoff)

    next_BFR = choose(table.next_HR[slot_BF], two_BFR, table.unigram_next_R, -1)
    prob_BFR = choose(
        table.prob_HR[slot_BF], table.bigram_prob_VR[v_BF], table.unigram_prob_R, 0.0
    )
    known = (next_BFR >= 0) & (next_BFR < table.vocabulary)
    # A comparison with something that is not a number fails.
    prob_BFR = jnp.where(known & (prob_BFR > 0), jnp.minimum(prob_BFR, 1.0), 0.0)
    return jnp.where(known, next_BFR, -1), prob_BFR


def lookup_reference(table: TrigramTable, u: int, v: int) -> list[tuple[int, float]]:
    """Looks one context up in plain Python; the oracle of `lookup`.

    Returns:
      Candidates and probabilities, in the table's order, without empty places.
    """
    slot = int(slot_of(np.asarray([u]), np.asarray([v]), table.slots)[0])
    if np.asarray(table.key_H2)[slot].tolist() == [u, v]:
        found = table.next_HR[slot], table.prob_HR[slot]
    elif int(table.bigram_next_VR[v, 0]) >= 0:
        found = table.bigram_next_VR[v], table.bigram_prob_VR[v]
    else:
        found = table.unigram_next_R, table.unigram_prob_R
    pairs = zip(np.asarray(found[0]).tolist(), np.asarray(found[1]), strict=True)
    return [(token, float(p)) for token, p in pairs if token >= 0]


def save_table(path: str | os.PathLike[str], table: TrigramTable) -> None:
    """Writes a table to a safetensors file, in narrow types.

    Ids take 16 bits where the vocabulary allows it, probabilities 16 bits as floats.

    Args:
      path: The file.
      table: The table.

    Raises:
      CheckpointError: It cannot be written.
    """
    narrow = table.vocabulary <= _NONE_16

    def pack(x: Array) -> np.ndarray:
        host = np.asarray(x)
        if host.dtype == np.float32:
            return host.astype(np.float16)
        return np.where(host < 0, _NONE_16, host).astype(np.uint16) if narrow else host

    fields = {n: pack(getattr(table, n)) for n in _fields()}
    write_safetensors(path, fields, {"format": FORMAT})


def load_table(name: str, vocabulary: int) -> TrigramTable:
    """Reads a table.

    Args:
      name: A file, or the name of a shipped table.
      vocabulary: V of the model that it is for.

    Raises:
      CheckpointError: There is no such table, the file holds something else, or it
        was counted with another vocabulary.
    """
    path = resolve_table(name)
    tensors = read_safetensors(path)
    missing = sorted(set(_fields()) - set(tensors))
    if read_metadata(path).get("format") != FORMAT or missing:
        raise CheckpointError(
            f"{_READ}: {path}: has tensors {', '.join(tensors)[:80] or '(none)'}, "
            f"expected a table of format {FORMAT}. Build one with "
            f"experiments/build_ngrams.py."
        )
    given = tensors["bigram_next_VR"].shape[:1]
    if given != (vocabulary,):
        raise CheckpointError(
            f"{_READ}: {path}: counts {given[0] if given else 0} tokens, expected the "
            f"model's {vocabulary}. Build one with the model's own tokenizer."
        )

    def unpack(field: str) -> Array:
        x = np.array(tensors[field].read())
        if x.dtype == np.uint16:
            return jnp.asarray(np.where(x == _NONE_16, -1, x.astype(np.int32)))
        wanted = np.int32 if np.issubdtype(x.dtype, np.integer) else np.float32
        return jnp.asarray(x.astype(wanted))

    table = TrigramTable(**{n: unpack(n) for n in _fields()})
    _check(path, table)
    return table


def _fields() -> list[str]:
    return list(TrigramTable.__dataclass_fields__)


def _check(path: Path, table: TrigramTable) -> None:
    """Raises `CheckpointError` unless the arrays belong together."""
    H, R = table.next_HR.shape[:1], table.unigram_next_R.shape
    V, two = table.bigram_next_VR.shape[:1], table.bigram_next_VR.shape[1:]
    wanted = ((*H, 2), H + R, H + R, V + two, V + two, R, R)
    found = tuple(getattr(table, n).shape for n in _fields())
    if found != wanted or min(H + R + two, default=0) < 1 or len(two) != 1:
        raise CheckpointError(
            f"{_READ}: {path}: has tensors of shapes {found}, expected {wanted}. "
            f"Build it again with experiments/build_ngrams.py."
        )


def shipped_tables() -> dict[str, Path]:
    """Lists the tables inside the package.

    Returns:
      Their files by name, in alphabetical order.
    """
    root = Path(str(importlib.resources.files("jaxllm").joinpath("_data", "ngrams")))
    return {path.stem: path for path in sorted(root.glob("*.safetensors"))}


def resolve_table(name: str | os.PathLike[str]) -> Path:
    """Finds the file of a table.

    Args:
      name: A local file (which wins over a name), or the name of a shipped table.

    Raises:
      CheckpointError: There is neither.
    """
    name = os.fspath(name)
    local, shipped = Path(name).expanduser(), shipped_tables()
    if local.is_file():
        return local
    if name in shipped:
        return shipped[name]
    close = difflib.get_close_matches(name, shipped, n=1)
    action = f"Did you mean {close[0]!r}?" if close else "Check the path."
    raise CheckpointError(
        f"{_FIND}: {name!r}: no such file or shipped table, expected a file or one of "
        f"{', '.join(shipped) or '(none shipped)'}. {action}"
    )

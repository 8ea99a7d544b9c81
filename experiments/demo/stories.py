"""The text that `demo` learns from: stories, their tokenizer, an endless stream."""

import gzip
import re
from pathlib import Path

import numpy as np
import tokenizers

__all__ = [
    "END_OF_TEXT",
    "StoryStream",
    "read_stories",
    "read_text",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"


def read_text(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def read_stories(train: str, valid: str) -> list[str]:
    """Returns the training stories that do not stand in the validation text.

    The training file was gathered from several places, one of them a copy of the
    official validation set.
    """

    def flat(text: str) -> str:
        return re.sub(r"\s+", " ", text).strip()

    def is_held_out(story: str) -> bool:
        story = flat(story)
        starts = (i for i in (0, 200, 400) if i + 80 <= len(story))
        return any(story[i : i + 80] in held_out for i in starts)

    held_out = flat(valid)
    stories = [story.strip() for story in train.split(END_OF_TEXT)]
    return [story for story in stories if story and not is_held_out(story)]


def train_tokenizer(stories: list[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer, `<|endoftext|>` (id 0) before every text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        stories,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


class StoryStream:
    """The stories of epoch after epoch as one endless row of tokens.

    Each epoch has an order of its own that depends only on the seed and its number, so
    a position in the stream is all that a resumed run has to know.
    """

    def __init__(self, encoded: list[list[int]], seed: int):
        self._stories = [np.asarray(ids, np.int32) for ids in encoded]
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}
        self.epoch_tokens = sum(len(ids) for ids in self._stories)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.random.default_rng((self._seed, epoch)).permutation(
                len(self._stories)
            )
            tokens = np.concatenate([self._stories[i] for i in order])
            self._orders = {epoch: tokens, **dict(list(self._orders.items())[:1])}
        return self._orders[epoch]

    def rows(self, position: int, rows: int, length: int) -> np.ndarray:
        """Returns `[rows, length + 1]` tokens; neighbours share the token between."""
        epoch, start = divmod(position, self.epoch_tokens)
        tokens, count = self._epoch(epoch)[start:], rows * length + 1
        while len(tokens) < count:
            epoch += 1
            tokens = np.concatenate([tokens, self._epoch(epoch)])
        index = np.arange(rows)[:, None] * length + np.arange(length + 1)
        return tokens[index]

"""An endless stream of the stories that the first `demo` learned from."""

import numpy as np

__all__ = ["StoryStream"]


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

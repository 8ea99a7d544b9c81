"""Documents of tokens by number, and examples that are made instead of read."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from jaxllm.checkpoints import Tokenizer
from jaxllm.core.errors import ConfigError
from jaxllm.training.instructions import encode_completion

__all__ = ["Documents", "Examples", "Part"]

Part: TypeAlias = str | Sequence[int]
"""A prompt or a completion: text, or token ids that are taken as they are."""


class Documents(Protocol):
    """Documents by number, the same ones whenever they are asked for."""

    def __len__(self) -> int:
        """Returns how many there are."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 token ids and, as long, uint8 1 where a token is learned."""


class Examples:
    """Documents that a function makes: a prompt, and a completion that is learned."""

    def __init__(
        self,
        example: Callable[[int], Any],
        count: int,
        tokenizer: Tokenizer | None = None,
    ):
        """Wraps a function of a number.

        Args:
          example: From a number below `count` to a pair of prompt and completion, or
            an object with these two fields; always the same for one number. Text is
            followed by the end token, ids are not.
          count: How many there are; the stream repeats them after that.
          tokenizer: For text; may be None where the parts are token ids.

        Raises:
          ConfigError: The count is not positive.
        """
        if count < 1:
            raise ConfigError(
                f"cannot make examples: count: {count}, expected 1 or more. Ask for "
                "some."
            )
        self._example, self._count, self._tokenizer = example, count, tokenizer

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        made = self._example(index)
        if not isinstance(made, tuple):
            made = made.prompt, made.completion
        prompt, completion = made
        if isinstance(prompt, str) and isinstance(completion, str):
            if self._tokenizer is None:
                raise ConfigError(
                    f"cannot make examples: example {index}: is text and there is no "
                    "tokenizer, expected token ids. Give a tokenizer."
                )
            tokens, learn = encode_completion(
                prompt, completion, self._tokenizer, f"example {index}"
            )
        else:
            tokens = [*map(int, prompt), *map(int, completion)]
            learn = [0] * len(prompt) + [1] * len(completion)
        return np.asarray(tokens, np.int32), np.asarray(learn, np.uint8)

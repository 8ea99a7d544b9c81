"""Text from token ids that arrive a few at a time."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TextStream"]

# How vocabularies write a single byte that byte fallback will put together.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class TextStream:
    """An incremental decoder: what it returns adds up to the text of all the ids.

    Text that later ids could still change is held back: an incomplete UTF-8 character,
    and a run of byte tokens, because one invalid byte turns the whole run into
    replacement characters.

    Differs from `tokenizers.decoders.DecodeStream`, which raises when a run of byte
    tokens changes its earlier text, and cannot give out what it holds back at the end.
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer", skip_special_tokens: bool = True
    ):
        self._backend = backend
        self._skipped: frozenset[int] = frozenset()
        if skip_special_tokens:
            added = backend.get_added_tokens_decoder()
            self._skipped = frozenset(i for i, token in added.items() if token.special)
        # A window of ids: the first `_given_ids` of them, whose text is `_given`, have
        # been returned and are there because decoders treat the first token apart.
        self._window: list[int] = []
        self._last = ""
        self._given_ids = 0
        self._given = ""

    def step(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that is certain by now.

        Args:
            ids: any number of token ids, such as an accepted block.

        Returns:
            The new text; may be empty.
        """
        for token_id in map(int, ids):
            token = self._backend.id_to_token(token_id)
            # Ids outside the vocabulary have no text and end no run of bytes.
            if token is not None and token_id not in self._skipped:
                self._window.append(token_id)
                self._last = token
        if len(self._window) == self._given_ids or _BYTE_TOKEN.fullmatch(self._last):
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) or not text.startswith(self._given):
            return ""
        new = text[len(self._given) :]
        # The ids given out just now become the next context, if they have text: then
        # whatever the decoder does to the first token happens inside the context.
        context = self._window[self._given_ids :]
        context_text = self._decode(context)
        if context_text:
            self._window, text = context, context_text
        self._given_ids, self._given = len(self._window), text
        return new

    def finish(self) -> str:
        """Returns the text still held back and starts afresh.

        Returns:
            The rest of the text; may be empty.
        """
        text = self._decode(self._window)
        rest = text[len(self._given) :]
        self._window, self._given_ids, self._given = [], 0, ""
        return rest

    def _decode(self, ids: list[int]) -> str:
        # Special tokens to skip are not in the window.
        return self._backend.decode(ids, skip_special_tokens=False)

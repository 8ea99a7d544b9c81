"""The bytes that each token of a vocabulary writes."""

import functools
from collections.abc import Collection

from jaxllm.checkpoints.tokenizer import Tokenizer
from jaxllm.core.errors import ConfigError

__all__ = ["token_bytes"]

_SPACE = "\u2581"  # how SentencePiece writes a space


def token_bytes(
    tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int] = ()
) -> tuple[bytes, ...]:
    """Returns what every token writes, found out from the tokens' names.

    A token may write part of a character. What is found is compared with what the
    tokenizer decodes.

    Args:
      tokenizer: Of byte-level BPE, or of SentencePiece with byte fallback.
      vocabulary: V, ids of the model; more than the tokenizer has is fine.
      end_ids: Tokens that end a text.

    Returns:
      V strings of bytes; empty for special tokens, end tokens and unused ids, which
      are no text. A token that begins with a space has it, at the start of a text too.

    Raises:
      ConfigError: The tokens are put together in another way, such as WordPiece's.
    """
    names: dict[int, str] = {}
    for token in range(vocabulary):
        name = tokenizer.token_string(token)
        if name and token not in end_ids and not _is_special(tokenizer, token):
            names[token] = name
    for read in (_read_pieces, _read_byte_level, str.encode):
        found = {token: read(name) for token, name in names.items()}
        if _agrees(tokenizer, found):
            return tuple(found.get(token, b"") for token in range(vocabulary))
    raise ConfigError(
        "cannot constrain: tokenizer: its tokens are not simply put one behind the "
        "other, expected byte-level BPE or SentencePiece. Use a model with such a "
        "tokenizer."
    )


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    shown = tokenizer.decode([token], skip_special_tokens=False)
    return bool(shown) and not tokenizer.decode([token], skip_special_tokens=True)


def _read_pieces(name: str) -> bytes:
    """Reads a name of SentencePiece, `▁the` or `<0xE2>`."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            pass
    return name.replace(_SPACE, " ").encode()


@functools.cache
def _byte_signs() -> dict[str, int]:
    """Returns the visible signs that byte-level vocabularies write bytes with.

    Source: GPT-2's tokenizer. Bytes that are visible in Latin-1 stand for themselves,
    the others follow from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    signs = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in visible]
    return signs | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _read_byte_level(name: str) -> bytes:
    """Reads a name of byte-level BPE, `Ġthe`; added tokens may stand as they are."""
    found = [_byte_signs().get(sign) for sign in name]
    return name.encode() if None in found else bytes(b for b in found if b is not None)


def _agrees(tokenizer: Tokenizer, found: dict[int, bytes]) -> bool:
    """Says whether all tokens that are whole characters decode to what was found."""
    ids, texts = [], []
    for token, content in found.items():
        try:
            texts.append(content.decode())
            ids.append(token)
        except UnicodeDecodeError:
            continue
    text = "".join(texts)
    # Some decoders take one space off the beginning.
    return tokenizer.decode(ids) in (text, text.removeprefix(" "))

"""Tokenizers of checkpoint directories: text to token ids and back.

`tokenizer.json` is read by the `tokenizers` package alone, exactly as it is written.
Older formats are converted, which needs packages that take seconds to import.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.checkpoints import conversion
from jaxllm.checkpoints.chat import (
    SETTINGS_NAME,
    TEMPLATE_NAME,
    read_chat_template,
    render_chat,
)
from jaxllm.checkpoints.files import first_line, quote, read_json_object, replacing
from jaxllm.checkpoints.text_stream import TextStream
from jaxllm.core.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "load_tokenizer"]

TOKENIZER_NAME = "tokenizer.json"

_LOAD = "cannot load tokenizer"
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """A vocabulary with the rules that turn text into its ids and back.

    Attributes:
        bos_id: the id that begins a text; None where the checkpoint names none.
        eos_id: the id that ends a text; None where the checkpoint names none.
        special_tokens: the special tokens by role, such as `{"bos_token": "<s>"}`.
        chat_template: the Jinja text of the chat template, or None.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
        where: str = "tokenizer",
    ):
        """Wraps a tokenizer of the `tokenizers` package.

        Args:
            backend: the tokenizer; its truncation and padding are switched off.
            special_tokens: the special tokens by role.
            chat_template: the Jinja text of a chat template.
            settings: the content of `tokenizer_config.json`, which `save` writes again.
            where: the directory that it came from, for messages.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._settings = dict(settings or {})
        self._where = where
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.bos_id = self._id_of_role("bos_token")
        self.eos_id = self._id_of_role("eos_token")

    def _id_of_role(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.id_of(token)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, which padding of the embedding can exceed."""
        return 1 + max(self._vocabulary.values(), default=-1)

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turns text into token ids.

        Args:
            text: any Unicode text. Special tokens written out in it become their ids.
            add_special_tokens: whether to add what the tokenizer puts around a text,
                such as a bos token. Text of a chat template has them already.

        Returns:
            The ids; empty only for empty text without special tokens.

        Raises:
            UserError: the text holds half a surrogate pair.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise UserError(
                f"cannot encode text: {quote(text)}: is not Unicode text, expected a "
                "string without lone surrogates. Correct the text."
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turns token ids into text.

        Args:
            ids: token ids; ids outside the vocabulary have no text.
            skip_special_tokens: whether to leave out bos, eos and the like.

        Returns:
            The text. Bytes that are no UTF-8 become replacement characters.
        """
        return self._backend.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """Returns an incremental decoder that adds up to `decode`.

        Args:
            skip_special_tokens: whether to leave out bos, eos and the like.

        Returns:
            A decoder with `step(ids)` and `finish()`.
        """
        return TextStream(self._backend, skip_special_tokens)

    def token_string(self, token_id: int) -> str | None:
        """Returns the token of an id as the vocabulary writes it, or None."""
        return self._backend.id_to_token(token_id)

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token as the vocabulary writes it, or None."""
        return self._backend.token_to_id(token)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation as the model was trained to see it.

        Args:
            messages: dicts with `role` and `content`.
            add_generation_prompt: whether to end with the opening of an answer.

        Returns:
            The text. Encode it with `add_special_tokens=False`, because the template
            writes them itself.

        Raises:
            CheckpointError: the checkpoint has no chat template, or a broken one.
            UserError: the template refuses the messages.
        """
        if self.chat_template is None:
            raise CheckpointError(
                f"cannot apply chat template: {Path(self._where) / SETTINGS_NAME}: has "
                f"no 'chat_template' and there is no {TEMPLATE_NAME} beside it, "
                "expected one of them. Use a chat checkpoint or a plain prompt."
            )
        variables = {
            **self.special_tokens,
            "add_generation_prompt": add_generation_prompt,
        }
        return render_chat(self.chat_template, messages, variables, self._where)

    def fingerprint(self) -> str:
        """Returns a digest of the vocabulary: equal if every id has the same token.

        A drafter and its target need equal fingerprints to exchange token ids.

        Returns:
            64 hexadecimal digits.
        """
        ordered = json.dumps(sorted(self._vocabulary.items()))
        return hashlib.sha256(ordered.encode()).hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer so that it, and transformers, can read it back.

        Args:
            directory: an existing directory; `tokenizer.json`, `tokenizer_config.json`
                and `chat_template.jinja` in it are replaced.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        directory = Path(directory)
        settings = {
            key: value
            for key, value in self._settings.items()
            if key not in ("auto_map", "chat_template")
        }
        # This class takes tokenizer.json as it is; others rebuild parts of it.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {
            TOKENIZER_NAME: self._backend.to_str(pretty=True),
            SETTINGS_NAME: json.dumps(settings | self.special_tokens, indent=2),
        }
        if self.chat_template is not None:
            files[TEMPLATE_NAME] = self.chat_template
        for name, text in files.items():
            with replacing(directory / name, "cannot save tokenizer") as file:
                file.write(text.encode())


def load_tokenizer(
    directory: str | os.PathLike[str], vocab_size: int | None = None
) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint directory.

    `tokenizer.json` is taken where there is one; otherwise `tokenizer.model`
    (SentencePiece) or `vocab.json` with `merges.txt` is converted. No code of the
    checkpoint is run.

    Differs from transformers 5 where its class for a model rebuilds a tokenizer: there
    a Llama prompt that starts with a space loses a token that the model was trained
    with, and a `tokenizer.model` without settings loses its bos token.

    Args:
        directory: a directory in Hugging Face layout.
        vocab_size: V of the model; None checks nothing. A smaller vocabulary is fine,
            since embeddings are often padded.

    Returns:
        The tokenizer; None where the directory has none.

    Raises:
        CheckpointError: a malformed file, or a vocabulary or a special token that
            reaches V; the message names the file.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    source = directory / TOKENIZER_NAME
    if source.is_file():
        backend = _read_backend(source)
        special_tokens: dict[str, str] = {}
    else:
        found = conversion.find_older_format(directory)
        if found is None:
            return None
        source = found
        backend, special_tokens = conversion.convert(source, settings)
    special_tokens |= _declare_added_tokens(backend, settings, directory)
    _add_roles_of_config(special_tokens, backend, directory)
    tokenizer = Tokenizer(
        backend,
        special_tokens=special_tokens,
        chat_template=read_chat_template(directory, settings),
        settings=settings,
        where=str(directory),
    )
    if vocab_size is not None:
        _check_fits(tokenizer, vocab_size, source)
    return tokenizer


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / SETTINGS_NAME
    settings = read_json_object(path, _LOAD, CheckpointError) if path.is_file() else {}
    older = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and older.is_file():
        settings |= read_json_object(older, _LOAD, CheckpointError)
    return settings


def _read_backend(path: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as cause:
        # The package raises plain Exception for whatever it does not like.
        raise CheckpointError(
            f"{_LOAD}: {path}: {first_line(cause)}, expected a file of the "
            "tokenizers package. Download or save it again."
        ) from None


def _declare_added_tokens(
    backend: "tokenizers.Tokenizer", settings: Mapping[str, Any], directory: Path
) -> dict[str, str]:
    """Adds the tokens that only the settings declare; returns the special ones."""
    from tokenizers import AddedToken

    roles: dict[str, str] = {}
    try:
        declared = settings.get("added_tokens_decoder") or {}
        for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
            # An unknown field would be reported on standard output.
            flags = {key: token[key] for key in _TOKEN_FLAGS if key in token}
            backend.add_tokens([AddedToken(token["content"], **flags)])
        extra = settings.get("additional_special_tokens") or []
        extra = settings.get("extra_special_tokens") or extra
        named = {role: settings[role] for role in _SPECIAL_NAMES if settings.get(role)}
        unnamed = list(extra.values() if isinstance(extra, dict) else extra)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        for role, value in [*named.items(), *((None, token) for token in unnamed)]:
            content = value if isinstance(value, str) else value["content"]
            if content not in known:
                backend.add_special_tokens([content])
            if role is not None:
                roles[role] = content
    except (TypeError, ValueError, KeyError, AttributeError) as cause:
        raise CheckpointError(
            f"{_LOAD}: {directory / SETTINGS_NAME}: {first_line(cause)}, "
            "expected special tokens as strings or objects with 'content'. "
            "Correct the file or download it again."
        ) from None
    return roles


def _add_roles_of_config(
    roles: dict[str, str], backend: "tokenizers.Tokenizer", directory: Path
) -> None:
    # GPT-2 and others name bos and eos only by id, in config.json.
    path = directory / "config.json"
    if not path.is_file():
        return
    config = read_json_object(path, _LOAD, CheckpointError)
    for role in ("bos_token", "eos_token"):
        ids = config.get(f"{role}_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if role not in roles and type(first) is int and first >= 0:
            token = backend.id_to_token(first)
            if token is not None:
                roles[role] = token


def _check_fits(tokenizer: Tokenizer, vocab_size: int, source: Path) -> None:
    # A post-processor states its own ids, so look at what it adds too.
    largest = max([tokenizer.vocab_size - 1, *tokenizer.encode("")])
    if largest >= vocab_size:
        raise CheckpointError(
            f"{_LOAD}: {source}: {quote(tokenizer.token_string(largest))} has id "
            f"{largest}, expected ids below {vocab_size} (vocab_size in config.json). "
            "Use the tokenizer that the model was trained with."
        )

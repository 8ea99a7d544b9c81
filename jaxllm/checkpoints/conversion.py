"""Tokenizer files older than `tokenizer.json`, turned into the same object."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.checkpoints.files import first_line, quote, read_json_object
from jaxllm.core.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["convert", "find_older_format"]

SENTENCEPIECE_NAME = "tokenizer.model"
VOCABULARY_NAME = "vocab.json"
MERGES_NAME = "merges.txt"
ADDED_NAME = "added_tokens.json"

_LOAD = "cannot load tokenizer"
_SPACE = "\u2581"  # how SentencePiece writes a space
# Where a conversion can go wrong: spaces at the ends, runs of them, digits, line ends,
# letters that could be normalized, bytes outside the vocabulary.
_PROBES = (
    "Once upon a time",
    " leading",
    "two  spaces and five     at the end     ",
    "12345",
    "a\n\nb\tc",
    "\u65e5\u672c\u8a9e",
    "na\u00efve \ufb01 \U0001f642",
)
# Of sentencepiece_model.proto.
_BPE = 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def find_older_format(directory: Path) -> Path | None:
    """Finds a tokenizer in a format that needs converting.

    Args:
        directory: a checkpoint directory without `tokenizer.json`.

    Returns:
        The path of `tokenizer.model` or `vocab.json`; None where there is neither.

    Raises:
        CheckpointError: `vocab.json` without its `merges.txt`.
    """
    if (directory / SENTENCEPIECE_NAME).is_file():
        return directory / SENTENCEPIECE_NAME
    if not (directory / VOCABULARY_NAME).is_file():
        return None
    if not (directory / MERGES_NAME).is_file():
        raise CheckpointError(
            f"{_LOAD}: {directory / VOCABULARY_NAME}: has no {MERGES_NAME} beside it, "
            "expected both. Download it."
        )
    return directory / VOCABULARY_NAME


def convert(
    source: Path, settings: Mapping[str, Any]
) -> tuple["tokenizers.Tokenizer", dict[str, str]]:
    """Converts an older tokenizer format; runs no code of the checkpoint.

    Args:
        source: what `find_older_format` found.
        settings: the content of `tokenizer_config.json`.

    Returns:
        The tokenizer, and the special tokens by role.

    Raises:
        CheckpointError: the files are malformed, nothing says which class reads them,
            or the conversion gives other ids than the original.
    """
    if source.name == SENTENCEPIECE_NAME:
        return _convert_sentencepiece(source, settings)
    return _convert_vocabulary(source)


def _convert_vocabulary(
    source: Path,
) -> tuple["tokenizers.Tokenizer", dict[str, str]]:
    # vocab.json does not say how text is split before it; transformers knows by class.
    try:
        with _quiet():
            from transformers import AutoTokenizer

            converted = AutoTokenizer.from_pretrained(
                str(source.parent), trust_remote_code=False, local_files_only=True
            )
            backend = converted.backend_tokenizer
    except Exception as cause:
        # What transformers raises for a damaged file depends on the class.
        raise CheckpointError(
            f"{_LOAD}: {source}: transformers cannot convert it "
            f"({first_line(cause)}), expected a readable file and a tokenizer_class in "
            "tokenizer_config.json or a model_type in config.json. Save it as "
            "tokenizer.json."
        ) from None
    return backend, dict(converted.special_tokens_map)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # transformers says at import that torch is absent, which nobody here needs.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _convert_sentencepiece(
    source: Path, settings: Mapping[str, Any]
) -> tuple["tokenizers.Tokenizer", dict[str, str]]:
    """Converts a SentencePiece BPE model; the ids are those of sentencepiece.

    transformers 5 converts these files too, but orders merges by id instead of by
    score, which gives other ids for runs of spaces, and adds no bos token unless told.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    content = source.read_bytes()
    try:
        # The module's classes are made when it is imported: mypy sees none.
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore
        processor = SentencePieceProcessor(model_proto=content)
    except Exception as cause:
        # Errors of protobuf and of sentencepiece, which have no class of their own.
        raise _damaged(source, cause) from None
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if (
        trainer.model_type != _BPE
        or trainer.treat_whitespace_as_suffix
        or rules.precompiled_charsmap
        or rules.remove_extra_whitespaces
    ):
        raise CheckpointError(
            f"{_LOAD}: {source}: is of model type {trainer.model_type} and normalizes "
            f"by {rules.name!r}, expected BPE ({_BPE}) that changes no text. "
            "Save it as tokenizer.json."
        )
    try:
        backend = _build_pipeline(proto)
    except Exception as cause:
        # Pieces that parse but are no vocabulary; tokenizers has no class for that.
        raise _damaged(source, cause) from None
    roles = {
        role: proto.pieces[piece_id].piece
        for role, piece_id in (
            ("bos_token", trainer.bos_id),
            ("eos_token", trainer.eos_id),
            ("unk_token", trainer.unk_id),
        )
        if 0 <= piece_id < len(proto.pieces)
    }
    symbols = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
    for text in (*_PROBES, *(f"a{symbol}b {symbol}" for symbol in symbols[:8])):
        ours = backend.encode(text, add_special_tokens=False).ids
        theirs = processor.encode(text)
        if ours != theirs:
            raise CheckpointError(
                f"{_LOAD}: {source}: {text!r} converts to ids {ours}, expected {theirs}"
                " as sentencepiece gives. Save it as tokenizer.json."
            )
    _frame(backend, roles, settings)
    _add_listed_tokens(backend, source.with_name(ADDED_NAME))
    return backend, roles


def _damaged(source: Path, cause: Exception) -> CheckpointError:
    return CheckpointError(
        f"{_LOAD}: {source}: {first_line(cause)}, expected a SentencePiece model. "
        "Download it again, or save it as tokenizer.json."
    )


def _build_pipeline(proto: Any) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    has_prefix = proto.normalizer_spec.add_dummy_prefix
    backend = Tokenizer(
        BPE(
            vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges=_rank_merges(proto.pieces),
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    prepend = [normalizers.Prepend(_SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence(
        [*prepend, normalizers.Replace(" ", _SPACE)]
    )
    parts: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if has_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    backend.add_tokens(
        [
            AddedToken(
                piece.piece, normalized=False, special=piece.type != _USER_DEFINED
            )
            for piece in proto.pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return backend


def _rank_merges(pieces: Any) -> list[tuple[str, str]]:
    """Orders the pairs of pieces that join to a piece as sentencepiece joins them."""
    scores = {piece.piece: piece.score for piece in pieces}
    pairs = [
        (whole[:cut], whole[cut:])
        for whole in scores
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    # Best score first. Of equal scores sentencepiece joins the leftmost pair, which
    # for runs of one character is the one whose left part has grown already.
    pairs.sort(key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))
    return pairs


def _frame(
    backend: "tokenizers.Tokenizer", roles: Mapping[str, str], settings: Mapping
) -> None:
    # Without settings a text begins with bos, as in the classes these files are from.
    from tokenizers import processors

    bos = roles.get("bos_token") if settings.get("add_bos_token", True) else None
    eos = roles.get("eos_token") if settings.get("add_eos_token", False) else None
    backend.post_processor = processors.TemplateProcessing(
        single=[*filter(None, [bos]), "$A", *filter(None, [eos])],
        special_tokens=[
            (token, backend.token_to_id(token)) for token in (bos, eos) if token
        ],
    )


def _add_listed_tokens(backend: "tokenizers.Tokenizer", path: Path) -> None:
    from tokenizers import AddedToken

    if not path.is_file():
        return
    listed = read_json_object(path, _LOAD, CheckpointError)
    if not all(type(token_id) is int for token_id in listed.values()):
        raise CheckpointError(
            f"{_LOAD}: {path}: has an id that is not a whole number, expected "
            "{token: id}. Correct the file."
        )
    for token, token_id in sorted(listed.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != token_id:
            raise CheckpointError(
                f"{_LOAD}: {path}: {quote(token)} has id {token_id}, expected "
                f"{backend.token_to_id(token)}, the next one. Save the tokenizer as "
                "tokenizer.json."
            )

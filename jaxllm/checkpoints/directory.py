"""What a checkpoint directory says about itself: configuration and generation."""

import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.checkpoints.files import quote, read_json_object
from jaxllm.core.errors import CheckpointError, ConfigError

__all__ = [
    "GenerationDefaults",
    "read_config",
    "read_generation",
    "refuse_remote_code",
]

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"

_READ = "cannot read config"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint says about ending a text. Sampling settings are not taken.

    Attributes:
        eos_ids: the token ids that end a text; may be empty.
        pad_id: the id for padding; None where the checkpoint names none.
        stop_strings: strings that end a text.
    """

    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    stop_strings: tuple[str, ...] = ()


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `config.json` as it is; nothing is interpreted or executed.

    Args:
        directory: a directory in Hugging Face layout.

    Returns:
        The configuration as a plain dict.

    Raises:
        ConfigError: the file is absent, is not JSON (the message gives the position) or
            holds something else than an object.
    """
    return read_json_object(Path(directory) / CONFIG_NAME, _READ)


def refuse_remote_code(
    config: Mapping[str, Any], known_model_types: Container[str]
) -> None:
    """Refuses a checkpoint whose architecture exists only as code in its directory.

    Checkpoints of known architectures often carry an `auto_map` for older versions of
    transformers; theirs is ignored.

    Args:
        config: the content of `config.json`.
        known_model_types: the values of `model_type` implemented here.

    Raises:
        CheckpointError: `auto_map` is there and the architecture is not known.
    """
    if "auto_map" not in config or config.get("model_type") in known_model_types:
        return
    raise CheckpointError(
        f"refusing to load '{CONFIG_NAME}': 'auto_map' asks to run code from the "
        f"checkpoint for model_type {quote(config.get('model_type'))}. Convert it to "
        "a known architecture: save its weights as safetensors with a config.json "
        "that has no 'auto_map'."
    )


def read_generation(
    directory: str | os.PathLike[str], config: Mapping[str, Any]
) -> GenerationDefaults:
    """Reads what ends a text from `generation_config.json`, else from `config.json`.

    Each field is looked up in `generation_config.json` first. Temperature and the like
    are left alone: sampling stays greedy unless asked.

    Args:
        directory: a directory in Hugging Face layout.
        config: the content of its `config.json`.

    Returns:
        The ids and strings.

    Raises:
        ConfigError: a malformed file, an id that is not a token of the model, or a stop
            string that is empty or not a string.
    """
    path = Path(directory) / GENERATION_NAME
    own = read_json_object(path, _READ) if path.is_file() else {}

    def look_up(key: str) -> tuple[str, Any]:
        name = GENERATION_NAME if own.get(key) is not None else CONFIG_NAME
        content = own if own.get(key) is not None else config
        return f"{Path(directory) / name}: '{key}'", content.get(key)

    where, eos = look_up("eos_token_id")
    vocab_size = config.get("vocab_size")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for token_id in ids:
        _check_id(where, eos, token_id, vocab_size)
    where, pad = look_up("pad_token_id")
    # Early Llama configurations write -1 for "no padding token".
    pad = None if pad == -1 else pad
    if pad is not None:
        _check_id(where, pad, pad, vocab_size)
    return GenerationDefaults(
        eos_ids=tuple(dict.fromkeys(ids)),
        pad_id=pad,
        stop_strings=_check_stop_strings(*look_up("stop_strings")),
    )


def _check_id(where: str, value: Any, token_id: Any, vocab_size: Any) -> None:
    limit = vocab_size if type(vocab_size) is int else 2**31
    if type(token_id) is not int or not 0 <= token_id < limit:
        raise ConfigError(
            f"{_READ}: {where} is {quote(value)}, expected token ids from 0 to "
            f"{limit - 1}. Correct the file."
        )


def _check_stop_strings(where: str, value: Any) -> tuple[str, ...]:
    strings = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(string, str) and string for string in strings):
        raise ConfigError(
            f"{_READ}: {where} is {quote(value)}, expected a list of strings that are "
            "not empty. Correct the file."
        )
    return tuple(strings)

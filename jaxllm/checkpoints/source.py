"""From what a user calls a model to the directory that holds it."""

import difflib
import importlib.resources
import os
from pathlib import Path

from jaxllm.checkpoints.files import first_line
from jaxllm.core.errors import CheckpointError

__all__ = ["resolve", "shipped_models"]

HUB_PREFIX = "hf:"

_FIND = "cannot find model"
# Only what is read here: never pickles, and not the weights a second time, which some
# repositories keep in subfolders or as consolidated.safetensors.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
_UNWANTED = ["*/*", "consolidated*"]


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """Finds the directory of a model, downloading it if asked.

    Args:
        path_or_name: a local directory (which wins over a name), `hf:org/name` for a
            repository of the Hugging Face hub, or the name of a shipped model.

    Returns:
        The directory.

    Raises:
        CheckpointError: nothing is found, or the download is impossible.
    """
    name = os.fspath(path_or_name)
    local = os.path.expanduser(name)
    if os.path.isdir(local):
        return Path(local)
    if name.startswith(HUB_PREFIX):
        return _download(name.removeprefix(HUB_PREFIX))
    shipped = shipped_models()
    if name in shipped:
        return shipped[name]
    if os.path.isfile(local):
        raise CheckpointError(
            f"{_FIND}: {name!r}: is a file, expected the directory that holds it. "
            f"Give {os.path.dirname(local) or '.'!r}."
        )
    raise CheckpointError(
        f"{_FIND}: {name!r}: no such directory or shipped model, expected a "
        f"directory, 'hf:org/name' or one of {', '.join(shipped) or '(none shipped)'}. "
        f"{_nearest(name, shipped)}"
    )


def shipped_models() -> dict[str, Path]:
    """Lists the models inside the package.

    Returns:
        Their directories by name, in alphabetical order.
    """
    root = Path(str(importlib.resources.files("jaxllm").joinpath("_data")))
    if not root.is_dir():
        return {}
    return {
        path.name: path
        for path in sorted(root.iterdir())
        if (path / "config.json").is_file()
    }


def _nearest(name: str, shipped: dict[str, Path]) -> str:
    close = difflib.get_close_matches(name, shipped, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return f"To download it write {HUB_PREFIX + name!r}."
    return "Check the path."


def _download(repository: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    what = f"{_FIND}: {HUB_PREFIX + repository!r}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except errors.HFValidationError:
        reason = (
            "not a repository name, expected 'hf:org/name'. Copy the name from the "
            "model's page"
        )
    except errors.GatedRepoError:
        reason = (
            "the repository is gated, expected access to it. Accept its terms on its "
            "page and log in with 'hf auth login'"
        )
    except errors.RepositoryNotFoundError:
        reason = (
            "no such repository, or it is private, expected a public name. Check the "
            "spelling, or log in with 'hf auth login'"
        )
    except errors.LocalEntryNotFoundError:
        # Raised with HF_HUB_OFFLINE set, and when the hub cannot be reached.
        reason = (
            "the hub cannot be reached and the model is not in the local cache, "
            "expected one of them. Connect, or give the path of a directory"
        )
    except Exception as cause:
        # Below the hub's own errors lie those of its network library.
        reason = (
            f"the download failed ({first_line(cause)}), expected a repository. Try "
            "again, or give the path of a directory"
        )
    raise CheckpointError(f"{what}: {reason}.")

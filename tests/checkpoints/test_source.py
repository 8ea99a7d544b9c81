import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxllm.checkpoints import resolve, shipped_models, source
from jaxllm.core.errors import CheckpointError


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package that ships two models and a folder that is none."""
    package = tmp_path / "package"
    for name in ("demo", "demo-draft", "plain"):
        (package / "_data" / name).mkdir(parents=True)
    for name in ("demo", "demo-draft"):
        (package / "_data" / name / "config.json").write_text("{}")
    monkeypatch.setattr(source.importlib.resources, "files", lambda name: package)
    return package / "_data"


def refused(name):
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    return str(caught.value)


def test_a_local_directory_comes_first(shipped, tmp_path, monkeypatch):
    work = tmp_path / "work"
    (work / "demo").mkdir(parents=True)
    monkeypatch.chdir(work)
    assert resolve("demo") == Path("demo")
    assert resolve(work / "demo") == work / "demo"
    monkeypatch.setenv("HOME", str(work))
    assert resolve("~/demo") == work / "demo"


def test_a_shipped_model_has_a_name(shipped):
    assert shipped_models() == {
        "demo": shipped / "demo",
        "demo-draft": shipped / "demo-draft",
    }
    assert resolve("demo-draft") == shipped / "demo-draft"


def test_an_unknown_name_gets_the_nearest(shipped):
    assert refused("demmo") == (
        "cannot find model: 'demmo': no such directory or shipped model, expected a "
        "directory, 'hf:org/name' or one of demo, demo-draft. Did you mean 'demo'?"
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("org/name", "To download it write 'hf:org/name'."),
        ("./org/name", "Check the path."),
        ("/nowhere/model", "Check the path."),
        ("../demo", "Did you mean 'demo'?"),
        ("plain", "Check the path."),
        ("", "Check the path."),
        ("a\0b", "Check the path."),
    ],
)
def test_an_absent_path_says_what_was_looked_for(shipped, name, advice):
    assert refused(name) == (
        f"cannot find model: {name!r}: no such directory or shipped model, expected a "
        f"directory, 'hf:org/name' or one of demo, demo-draft. {advice}"
    )


def test_a_file_is_not_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert refused(str(path)) == (
        f"cannot find model: {str(path)!r}: is a file, expected the directory that "
        f"holds it. Give {str(tmp_path)!r}."
    )


def test_a_package_without_models_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(source.importlib.resources, "files", lambda name: tmp_path)
    assert shipped_models() == {}
    assert "or one of (none shipped). Check the path." in refused("demo")


def test_the_hub_is_asked_for_what_is_read_here_only(tmp_path, monkeypatch):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("hf:org/name") == tmp_path
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/params.json",
        "onnx/model.safetensors",
        "modeling_x.py",
        "README.md",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        names,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == names[:7]
    assert asked["repository"] == "org/name"


class Response:
    """As much of a reply of the hub as its errors look at."""

    headers: dict = {}  # noqa: RUF012
    status_code = 404
    request = None

    def json(self):
        return {}


OFFLINE = (
    "the hub cannot be reached and the model is not in the local cache, expected one "
    "of them. Connect, or give the path of a directory."
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            errors.HFValidationError("no"),
            "not a repository name, expected 'hf:org/name'. Copy the name from the "
            "model's page.",
        ),
        (
            errors.GatedRepoError("no", response=Response()),
            "the repository is gated, expected access to it. Accept its terms on its "
            "page and log in with 'hf auth login'.",
        ),
        (
            errors.RepositoryNotFoundError("no", response=Response()),
            "no such repository, or it is private, expected a public name. Check the "
            "spelling, or log in with 'hf auth login'.",
        ),
        (errors.LocalEntryNotFoundError("no"), OFFLINE),
        (
            errors.HfHubHTTPError("Bad gateway.\nDetails", response=Response()),
            "the download failed (Bad gateway), expected a repository. Try again, or "
            "give the path of a directory.",
        ),
        (
            OSError(28, "No space left on device"),
            "the download failed ([Errno 28] No space left on device), expected a "
            "repository. Try again, or give the path of a directory.",
        ),
        (
            RuntimeError(),
            "the download failed (RuntimeError), expected a repository. Try again, or "
            "give the path of a directory.",
        ),
    ],
)
def test_a_failed_download_says_why(monkeypatch, error, reason):
    def download(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert refused("hf:org/name") == f"cannot find model: 'hf:org/name': {reason}"


def test_the_real_hub_library_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert refused("hf:org/name") == f"cannot find model: 'hf:org/name': {OFFLINE}"
    for name in ("hf:", "hf:a b", "hf:a/b/c"):
        assert "not a repository name" in refused(name)


def test_nothing_is_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("absent")
    assert os.listdir(tmp_path) == []

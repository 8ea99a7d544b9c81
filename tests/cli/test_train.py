"""`jaxllm train`: exit codes, messages, what is left behind."""

import json

import pytest

import jaxllm
from jaxllm.cli.main import main
from tests.training.small_run import write_config, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    write_files(path)
    return path


def train(*arguments):
    return main(["train", *arguments])


def test_a_run_with_overrides_and_an_export(folder, tmp_path, capsys) -> None:
    config = f"--config={write_config(folder)}"
    workdir = tmp_path / "run"
    code = train(
        config,
        f"--workdir={workdir}",
        "--set=steps=2",
        "--set=optimizer.rate=3e-3",
        "--set=objective=(next_token:z_loss=1e-4)",
        "--export",
    )
    assert code == 0
    assert capsys.readouterr().out == ""
    kept = json.loads((workdir / "train_config.json").read_text())
    assert kept["steps"] == 2 and kept["optimizer"]["rate"] == 3e-3
    assert kept["objective"]["z_loss"] == 1e-4
    exported = jaxllm.load(str(workdir / "model"))
    assert exported.tokenizer is not None
    assert exported.generation.eos_ids


def test_a_run_that_diverges_exits_with_3(folder, tmp_path, capsys) -> None:
    text = (
        "import dataclasses, jax.numpy as jnp\n"
        "from jaxllm.training.objectives import NextToken\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Bad(NextToken):\n"
        "    def loss(self, *args):\n"
        "        value, metrics = super().loss(*args)\n"
        "        return value * jnp.inf, metrics\n"
        "def small_config(*args, made=small_config, **kwargs):\n"
        "    return made(*args, objective=Bad(), **kwargs)\n"
    )
    config = f"--config={write_config(folder, text)}"
    assert train(config, f"--workdir={tmp_path / 'run'}") == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "jaxllm train: loss is not finite for 4 consecutive steps (last good step 0); "
        "lower the learning rate"
    )


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["--set=stepz=3"], "stepz"),
        ({}, ["--set=data.row_length=1"], "row_length: 1, expected 2 or more"),
        ({}, ["--set=steps=0"], "steps is 0, expected 1 or more"),
        ({}, ["--set=data.batch_rows=100000"], "expected enough for a batch of 100000"),
        ({"tokenizer": "/nowhere"}, [], "/nowhere"),
        ({"init_from": "demo"}, [], "has both of init_from and decoder"),
        ({"mesh": "data=64"}, [], "needs 64 devices"),
    ],
)
def test_mistakes_are_one_line(
    folder, tmp_path, capsys, changes, arguments, message
) -> None:
    config = f"--config={write_config(folder, **changes)}"
    code = train(config, f"--workdir={tmp_path / 'run'}", *arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1 and said[0].startswith("jaxllm train: ")
    assert message in said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=/no/file.py", "--workdir=w"], "is no file"),
        (["--config={bad}", "--workdir=w"], "line 1"),
        (["--config={none}", "--workdir=w"], "has no get_config()"),
        (["--config={other}", "--workdir=w"], "returned int"),
    ],
)
def test_configurations_that_are_none(tmp_path, capsys, arguments, message) -> None:
    texts = {
        "bad": "def (",
        "none": "x = 1",
        "other": "def get_config():\n    return 3\n",
    }
    paths = {name: tmp_path / f"{name}.py" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    code = train(*(x.format(**paths) for x in arguments))
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_missing_corpus_is_named(folder, tmp_path, capsys) -> None:
    text = (
        "import dataclasses\n"
        "def small_config(*args, made=small_config, **kwargs):\n"
        "    config = made(*args, **kwargs)\n"
        "    [source] = config.data.sources\n"
        "    source = dataclasses.replace(source, path='/no/corpus.txt')\n"
        "    data = dataclasses.replace(config.data, sources=(source,))\n"
        "    return dataclasses.replace(config, data=data)\n"
    )
    config = f"--config={write_config(folder, text)}"
    assert train(config, f"--workdir={tmp_path / 'run'}") == 2
    assert "/no/corpus.txt" in capsys.readouterr().err

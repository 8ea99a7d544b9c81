import json

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxllm.checkpoints import (
    GenerationDefaults,
    read_config,
    read_generation,
    refuse_remote_code,
)
from jaxllm.core.errors import CheckpointError, ConfigError


def test_config_is_read_as_it_is(tmp_path):
    config = {"model_type": "llama", "rope_theta": 1e4, "eos_token_id": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            b'{"a": 1,\n "b" 2}',
            "line 2, column 6: Expecting ':' delimiter, expected valid JSON. Correct "
            "the file or download it again.",
        ),
        (
            b"",
            "line 1, column 1: Expecting value, expected valid JSON. Correct the file "
            "or download it again.",
        ),
        (
            b"[1, 2]",
            "holds a list at top level, expected an object {...}. Correct the file or "
            "download it again.",
        ),
        (
            b'{"a": "\xff"}',
            "byte 7 is not UTF-8, expected a JSON file. Download or save it again.",
        ),
        (
            b'{"a": ' + b"[" * 100_000,
            "is too deeply nested or has a number that is too long, expected valid "
            "JSON. Correct the file or download it again.",
        ),
        (
            b'{"a": ' + b"1" * 5000 + b"}",
            "is too deeply nested or has a number that is too long, expected valid "
            "JSON. Correct the file or download it again.",
        ),
    ],
)
def test_a_malformed_config_names_file_and_position(tmp_path, content, fault):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == f"cannot read config: {path}: {fault}"


def test_an_absent_config_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == (
        f"cannot read config: {tmp_path / 'config.json'}: No such file or directory, "
        "expected a JSON file. Check the path."
    )


@pytest.fixture(scope="module")
def fuzz_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.binary(max_size=60)
    | st.text('{}[]",:0123456789eE+-.ntrufalsInfiy\\ \n', max_size=40).map(str.encode)
)
def test_fuzz_config(fuzz_dir, content):
    (fuzz_dir / "config.json").write_bytes(content)
    try:
        assert isinstance(read_config(fuzz_dir), dict)
    except ConfigError:
        pass


CONFIG = {"vocab_size": 100, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("own", "config", "expected"),
    [
        (None, {}, GenerationDefaults()),
        (None, CONFIG, GenerationDefaults(eos_ids=(2,), pad_id=0)),
        ({}, CONFIG, GenerationDefaults(eos_ids=(2,), pad_id=0)),
        (
            {"eos_token_id": [7, 8, 7], "temperature": 0.6, "do_sample": True},
            CONFIG,
            GenerationDefaults(eos_ids=(7, 8), pad_id=0),
        ),
        ({"eos_token_id": None}, CONFIG, GenerationDefaults(eos_ids=(2,), pad_id=0)),
        (
            {"pad_token_id": 99, "stop_strings": "END"},
            CONFIG,
            GenerationDefaults(eos_ids=(2,), pad_id=99, stop_strings=("END",)),
        ),
        (
            {"stop_strings": ["a", "b"], "eos_token_id": []},
            {"pad_token_id": -1},
            GenerationDefaults(stop_strings=("a", "b")),
        ),
        (None, {"eos_token_id": 200_000}, GenerationDefaults(eos_ids=(200_000,))),
    ],
)
def test_generation_defaults(tmp_path, own, config, expected):
    if own is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(own))
    assert read_generation(tmp_path, config) == expected


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        *(
            ("eos_token_id", value, f"{value!r}, expected token ids from 0 to 99")
            for value in (-1, 100, [2, 100], "2", True, 1.0, [None], {"a": 1})
        ),
        *(
            ("pad_token_id", value, f"{value!r}, expected token ids from 0 to 99")
            for value in (-2, 100, "0", False, [0])
        ),
        *(
            (
                "stop_strings",
                value,
                f"{value!r}, expected a list of strings that are not empty",
            )
            for value in ("", ["a", ""], [1], {"a": 1}, 3)
        ),
    ],
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_bad_generation_value_names_file_and_key(tmp_path, file, key, value, fault):
    config = dict(CONFIG)
    if file == "config.json":
        config[key] = value
    else:
        (tmp_path / file).write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError) as caught:
        read_generation(tmp_path, config)
    assert str(caught.value) == (
        f"cannot read config: {tmp_path / file}: '{key}' is {fault}. Correct the file."
    )


def test_a_malformed_generation_file_is_not_passed_over(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json: line 1, column 2"):
        read_generation(tmp_path, CONFIG)


def test_remote_code_is_refused_unless_the_architecture_is_ours(monkeypatch):
    auto_map = {"AutoConfig": "configuration_x.XConfig"}

    def no_input(*args):
        raise AssertionError("standard input was used")

    monkeypatch.setattr("builtins.input", no_input)
    refuse_remote_code({"model_type": "x"}, {"llama"})
    refuse_remote_code({"model_type": "phi3", "auto_map": auto_map}, {"phi3", "llama"})
    for config in ({"model_type": "x", "auto_map": auto_map}, {"auto_map": auto_map}):
        with pytest.raises(CheckpointError) as caught:
            refuse_remote_code(config, {"llama"})
        assert str(caught.value) == (
            "refusing to load 'config.json': 'auto_map' asks to run code from the "
            f"checkpoint for model_type {config.get('model_type')!r}. Convert it to a "
            "known architecture: save its weights as safetensors with a config.json "
            "that has no 'auto_map'."
        )


def test_the_real_checkpoints_say_how_they_end(data_dir):
    for name in ("stories260K", "babyllama105"):
        directory = data_dir / "models" / name
        config = read_config(directory)
        assert config["model_type"] == "llama"
        assert read_generation(directory, config) == GenerationDefaults(eos_ids=(2,))

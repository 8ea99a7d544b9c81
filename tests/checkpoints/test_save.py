"""Saving: what is written is what was read, and nothing is half written."""

import dataclasses
import errno
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.checkpoints import (
    LanguageModel,
    load_language_model,
    read_safetensors,
    save_language_model,
)
from jaxllm.core import CheckpointError, ConfigError, DTypePolicy
from jaxllm.models import make_model
from jaxllm.models.families import decoder_config, family_of
from tests.checkpoints.small_checkpoint import (
    CONFIGS,
    assert_equal_trees,
    make_tensors,
    write_checkpoint,
)

LLAMA = CONFIGS["llama"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_what_was_loaded(tmp_path, name, dtype):
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    tensors = make_tensors(CONFIGS[name], kind)
    write_checkpoint(tmp_path / "first", CONFIGS[name], tensors)
    lm = load_language_model(tmp_path / "first", dtype=dtype, stacks=(1, 2))
    save_language_model(lm, tmp_path / "second")
    written = read_safetensors(tmp_path / "second" / "model.safetensors")
    # Tensor by tensor the same file, fused ones included.
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype and written[key].shape == tensor.shape
        assert (written[key].read() == tensor).all(), key
    again = load_language_model(tmp_path / "second", dtype=dtype, stacks=(1, 2))
    assert again.config == lm.config and again.generation == lm.generation
    assert_equal_trees(again.params, lm.params)


def test_the_configuration_is_kept_as_it_was_but_for_the_dtype(tmp_path):
    extra = {"initializer_range": 0.02, "auto_map": {"AutoModel": "x.Y"}}
    hf_config = LLAMA | extra | {"architectures": ["LlamaModel"]}
    write_checkpoint(tmp_path / "first", hf_config)
    lm = load_language_model(tmp_path / "first", dtype="bfloat16")
    save_language_model(lm, tmp_path / "second")
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    changed = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    assert written == {k: v for k, v in hf_config.items() if k != "auto_map"} | changed


def test_a_changed_architecture_is_written_anew(tmp_path):
    write_checkpoint(tmp_path / "first", LLAMA)
    lm = load_language_model(tmp_path / "first", dtype="float32", stacks=(3,))
    config = dataclasses.replace(
        lm.config, num_layers=2, layer_rope=(0,) * 2, layer_window=()
    )
    model, _ = make_model(config, policy=DTypePolicy.of("float32"))
    params = lm.params | {
        "stacks": tuple(jax.tree.map(lambda x: x[:2], s) for s in lm.params["stacks"])
    }
    lm = dataclasses.replace(lm, model=model, params=params)
    save_language_model(lm, tmp_path / "second")
    again = load_language_model(tmp_path / "second", dtype="float32", stacks=(2,))
    assert again.config == config
    assert again.generation.eos_ids == (2, 3) and again.hf_config["bos_token_id"] == 1
    assert_equal_trees(again.params, params)


def test_a_model_that_was_made_here_finds_a_family(tmp_path):
    config = decoder_config(LLAMA)
    policy = DTypePolicy.of("float32")
    model, params = make_model(config, jax.random.key(0), policy=policy, stacks=(3,))
    save_language_model(LanguageModel(model=model, params=params), tmp_path / "made")
    again = load_language_model(tmp_path / "made", dtype="float32", stacks=(3,))
    assert again.config == config and family_of(again.hf_config).name == "llama"
    assert_equal_trees(again.params, params)


def test_a_model_that_no_family_expresses_is_refused(tmp_path):
    config = decoder_config(LLAMA)
    odd = dataclasses.replace(config, learned_positions=True)
    model, params = make_model(odd, stacks=(3,))
    message = (
        r"^cannot save model: config\.json: no family has this combination of "
        r"features, expected one of gpt2, .*\. Save it as an Orbax workdir\.$"
    )
    with pytest.raises(ConfigError, match=message):
        save_language_model(LanguageModel(model=model, params=params), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_large_models_are_written_as_shards(tmp_path):
    tensors = write_checkpoint(tmp_path / "first", LLAMA)
    lm = load_language_model(tmp_path / "first", dtype="float32")
    save_language_model(lm, tmp_path / "second", max_shard_bytes=20_000)
    index = json.loads(
        (tmp_path / "second" / "model.safetensors.index.json").read_text()
    )
    assert index["weight_map"].keys() == tensors.keys()
    assert len(set(index["weight_map"].values())) > 3
    again = load_language_model(tmp_path / "second", dtype="float32")
    assert_equal_trees(again.params, lm.params)


def test_quantized_weights_are_refused_or_written_plain(tmp_path):
    write_checkpoint(tmp_path / "first", LLAMA)
    lm = load_language_model(tmp_path / "first", dtype="float32", quantize="int8")
    count = 3 * 7 + 2 if len(lm.params["stacks"]) == 3 else 7 + 2
    message = (
        f"cannot save model: {count} weights are IntTensor, expected plain arrays. "
        "Pass dequantize=True to write them as float32, or save an Orbax workdir."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        save_language_model(lm, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    save_language_model(lm, tmp_path / "second", dequantize=True)
    again = load_language_model(tmp_path / "second", dtype="float32")
    for stack, plain in zip(lm.params["stacks"], again.params["stacks"], strict=True):
        for name in ("up", "down"):
            wanted = np.asarray(stack["mlp"][name]["kernel"].dequantize(jnp.float32))
            assert (np.asarray(plain["mlp"][name]["kernel"]) == wanted).all()


def test_nothing_is_overwritten(tmp_path):
    write_checkpoint(tmp_path / "first", LLAMA)
    lm = load_language_model(tmp_path / "first")
    (tmp_path / "file").write_text("mine")
    for name in ("first", "file"):
        message = (
            f"cannot save model: {tmp_path / name}: is not empty, expected a new or an "
            "empty directory. Choose another or delete it."
        )
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            save_language_model(lm, tmp_path / name)
    (tmp_path / "empty").mkdir()
    save_language_model(lm, tmp_path / "empty")
    save_language_model(lm, tmp_path / "new" / "inner")
    assert (tmp_path / "file").read_text() == "mine"
    for name in ("empty", "new/inner"):
        assert_equal_trees(load_language_model(tmp_path / name).params, lm.params)
    assert not list(tmp_path.rglob(".*"))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "first", LLAMA)
    lm = load_language_model(tmp_path / "first")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    message = re.escape("No space left on device, expected a writable directory")
    with pytest.raises(CheckpointError, match=message):
        save_language_model(lm, tmp_path / "second")
    assert [p.name for p in tmp_path.iterdir()] == ["first"]


def test_too_little_room_is_noticed_before_writing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "first", LLAMA)
    lm = load_language_model(tmp_path / "first", dtype="float32")
    needed = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    message = (
        f"cannot save model: {tmp_path}: has {needed - 1} bytes free, expected at "
        f"least {needed}. Free some space or choose another directory."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        save_language_model(lm, tmp_path / "second")
    assert [p.name for p in tmp_path.iterdir()] == ["first"]


def test_a_kill_leaves_no_directory_of_that_name(tmp_path):
    write_checkpoint(tmp_path / "first", LLAMA)
    code = f"""
import os, signal
from jaxllm.checkpoints import load_language_model, save, save_language_model
def killed(*_): os.kill(os.getpid(), signal.SIGKILL)
save._write_companions = killed  # the weights are written, the rest is not
directory = {str(tmp_path)!r}
save_language_model(load_language_model(directory + "/first"), directory + "/second")
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert child.returncode == -9, child.stderr[-2000:]
    assert not (tmp_path / "second").exists()
    # What is left does not stand in the way.
    lm = load_language_model(tmp_path / "first")
    save_language_model(lm, tmp_path / "second")
    assert_equal_trees(load_language_model(tmp_path / "second").params, lm.params)


def test_sharded_parameters_are_saved(tmp_path, run_with_devices):
    for name in ("llama", "phi3"):
        write_checkpoint(tmp_path / name, CONFIGS[name])
    code = f"""
from jaxllm.checkpoints import load_language_model, save_language_model
for name, stacks in (("llama", (3,)), ("phi3", (1, 2))):
    directory = {str(tmp_path)!r} + "/" + name
    lm = load_language_model(
        directory, dtype="float32", mesh="fsdp=4,tensor=2", stacks=stacks
    )
    save_language_model(lm, directory + "-saved")
"""
    run_with_devices(8, code)
    for name in ("llama", "phi3"):
        old = read_safetensors(tmp_path / name / "model.safetensors")
        new = read_safetensors(tmp_path / f"{name}-saved" / "model.safetensors")
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            assert (tensor.read() == new[key].read()).all()


@pytest.mark.data
def test_a_real_checkpoint_comes_back_with_its_tokenizer(data_dir, tmp_path):
    source = data_dir / "models" / "stories260K"
    lm = load_language_model(source, dtype="float32")
    save_language_model(lm, tmp_path / "again")
    again = load_language_model(tmp_path / "again", dtype="float32")
    assert_equal_trees(again.params, lm.params)
    assert again.config == lm.config and again.generation == lm.generation
    text = "Once upon a time, Lily said \U0001f600"
    assert again.tokenizer.encode(text) == lm.tokenizer.encode(text)
    assert again.tokenizer.bos_id == lm.tokenizer.bos_id == 1

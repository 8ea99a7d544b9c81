"""Orbax workdirs: any tree, any mesh, complete steps only, no silent casts."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from jaxllm.checkpoints import LanguageModel, load_language_model, save_workdir
from jaxllm.checkpoints.workdir import (
    LEAVES,
    find_steps,
    open_workdir,
    write_step,
)
from jaxllm.core import CheckpointError, DTypePolicy, pytree_dataclass
from jaxllm.models import make_model
from jaxllm.models.families import decoder_config
from jaxllm.quantization import IntTensor
from tests.checkpoints.small_checkpoint import (
    CONFIGS,
    assert_equal_trees,
    write_checkpoint,
)

LLAMA = CONFIGS["llama"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory, LLAMA)
    return directory


def refused(message, **options):
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_language_model(**options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "int8:activations=8"])
def test_a_model_comes_back_bit_for_bit(source, tmp_path, dtype, quantize):
    options = {"dtype": dtype, "stacks": (1, 2)}
    lm = load_language_model(source, quantize=quantize, **options)
    save_workdir(lm, tmp_path / "w", step=3)
    again = load_language_model(tmp_path / "w", **options)
    assert_equal_trees(again.params, lm.params)
    assert again.config == lm.config and again.hf_config == lm.hf_config
    assert again.generation == lm.generation and again.generation.eos_ids == (2, 3)
    leaf = again.params["stacks"][1]["mlp"]["up"]["kernel"]
    assert isinstance(leaf, IntTensor) == (quantize is not None)


def test_other_stacks_are_made_at_load(source, tmp_path):
    lm = load_language_model(source, dtype="float32", stacks=(3,))
    save_workdir(lm, tmp_path)
    for stacks in ((1, 1, 1), (2, 1)):
        again = load_language_model(tmp_path, dtype="float32", stacks=stacks)
        wanted = load_language_model(source, dtype="float32", stacks=stacks)
        assert_equal_trees(again.params, wanted.params)


def test_the_last_complete_step_is_taken(source, tmp_path):
    lm = load_language_model(source, dtype="float32")
    for step in (2, 10):
        params = jax.tree.map(lambda x, s=step: x * s, lm.params)
        save_workdir(dataclasses.replace(lm, params=params), tmp_path, step)
    assert find_steps(tmp_path) == (2, 10)
    last = load_language_model(tmp_path, dtype="float32")
    assert_equal_trees(last.params, jax.tree.map(lambda x: x * 10, lm.params))
    # Without its commit file a step is none; nor is any other directory.
    (tmp_path / "10" / "commit_success.txt").unlink()
    (tmp_path / "99").mkdir()
    last = load_language_model(tmp_path, dtype="float32")
    assert_equal_trees(last.params, jax.tree.map(lambda x: x * 2, lm.params))


def test_a_step_is_not_overwritten(source, tmp_path):
    lm = load_language_model(source, dtype="float32")
    save_workdir(lm, tmp_path)
    message = (
        f"cannot save checkpoint: {tmp_path / '0'}: exists, expected a new step. "
        "Choose another step or directory, or delete it."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        save_workdir(lm, tmp_path)


def test_another_dtype_is_refused_rather_than_cast(source, tmp_path):
    lm = load_language_model(source, dtype="float32")
    save_workdir(lm, tmp_path)
    refused(
        f"cannot load checkpoint: {tmp_path / '0'}: 'embedder.table' has dtype "
        "float32, expected bfloat16. Load it with dtype='float32'; save that as a "
        "Hugging Face directory to convert it.",
        path_or_name=tmp_path,
    )


def test_quantizing_afterwards_and_twice(source, tmp_path):
    options = {"dtype": "float32", "quantize": "int8"}
    wanted = load_language_model(source, **options)
    save_workdir(load_language_model(source, dtype="float32"), tmp_path / "plain")
    save_workdir(wanted, tmp_path / "int8")
    again = load_language_model(tmp_path / "plain", **options)
    assert_equal_trees(again.params, wanted.params)
    refused(
        f"cannot load checkpoint: {tmp_path / 'int8'}: is quantized already, expected "
        "weights in full precision. Leave out the option to quantize.",
        path_or_name=tmp_path / "int8",
        **options,
    )


def test_values_that_are_not_finite_are_refused_when_asked(source, tmp_path):
    lm = load_language_model(source, dtype="float32")
    params = lm.params | {"final_norm": {"scale": jnp.full((32,), jnp.nan)}}
    save_workdir(dataclasses.replace(lm, params=params), tmp_path)
    load_language_model(tmp_path, dtype="float32")
    refused(
        f"cannot load checkpoint: {tmp_path}: 'final_norm.scale' has values that are "
        "not finite, expected numbers. Use another step.",
        path_or_name=tmp_path,
        dtype="float32",
        check_finite=True,
    )


def test_a_model_that_no_family_expresses_has_a_workdir(tmp_path):
    config = dataclasses.replace(decoder_config(LLAMA), learned_positions=True)
    policy = DTypePolicy.of("float32")
    model, params = make_model(config, jax.random.key(0), policy=policy, stacks=(3,))
    save_workdir(LanguageModel(model=model, params=params), tmp_path)
    again = load_language_model(tmp_path, dtype="float32", stacks=(3,))
    assert again.config == config and again.hf_config == {}
    assert_equal_trees(again.params, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_architecture_of_every_family_survives(tmp_path, name):
    model, params = make_model(decoder_config(CONFIGS[name]), jax.random.key(0))
    params = {"final_norm": params["final_norm"], "stacks": params["stacks"][:1]}
    write_step(tmp_path, 0, model, params, {})
    assert open_workdir(tmp_path).config == model.config


def test_damage_is_a_sentence(source, tmp_path):
    save_workdir(load_language_model(source, dtype="float32"), tmp_path / "good")
    damages = {
        "data": lambda d: [
            p.write_bytes(p.read_bytes()[:10]) for p in d.glob("0/state/**/d/*")
        ],
        "gone": lambda d: shutil.rmtree(d / "0" / "state"),
        "meta": lambda d: (d / "0" / "meta" / "metadata").write_text("{"),
        "keys": lambda d: (d / "0" / "meta" / "metadata").write_text(
            '{"format_version": 1}'
        ),
        "later": lambda d: (d / "0" / "meta" / "metadata").write_text(
            '{"format_version": 2}'
        ),
    }
    for name, damage in damages.items():
        shutil.copytree(tmp_path / "good", tmp_path / name)
        damage(tmp_path / name)
        where = re.escape(f"cannot load checkpoint: {tmp_path / name / '0'}: ")
        with pytest.raises(CheckpointError, match=f"^{where}") as caught:
            load_language_model(tmp_path / name, dtype="float32")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    message = (
        f"cannot load checkpoint: {tmp_path / 'later' / '0'}: has format_version 2, "
        "expected 1. Load it with the version of jaxllm that wrote it."
    )
    assert str(caught.value) == message


def test_a_step_that_is_not_there_is_refused(source, tmp_path):
    save_workdir(load_language_model(source, dtype="float32"), tmp_path, 4)
    message = (
        f"cannot load checkpoint: {tmp_path}: has no complete step 5, expected one "
        "(complete: 4). Check the path."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        open_workdir(tmp_path, 5)


def test_an_unknown_leaf_is_refused(source, tmp_path):
    @pytree_dataclass
    class Strange:
        array: jax.Array

        shape = property(lambda self: self.array.shape)
        nbytes = property(lambda self: self.array.nbytes)

        def einsum(self, eq, x, out_dtype): ...

        def dequantize(self, dtype): ...

    lm = load_language_model(source, dtype="float32")
    params = lm.params | {"head": {"kernel": Strange(lm.params["head"]["kernel"])}}
    message = (
        "cannot save checkpoint: a weight is Strange, expected an array or one of "
        f"{', '.join(LEAVES)}. Turn it into one of these first."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        save_workdir(dataclasses.replace(lm, params=params), tmp_path / "w")
    assert not (tmp_path / "w").exists()


MOVE = """
import pathlib
import jax, numpy as np
from jaxllm.checkpoints import load_language_model, save_workdir
from jaxllm.checkpoints.workdir import open_workdir
from jaxllm.models.sharding import param_shardings

assert len(jax.devices()) == 8
options = {"dtype": "float32", "stacks": (1, 2)}

def load_and_check(workdir, wanted, stacks, **placed):
    moved = load_language_model(workdir, dtype="float32", stacks=stacks, **placed)
    if stacks == options["stacks"]:
        pairs = zip(jax.tree.leaves(wanted.params), jax.tree.leaves(moved.params))
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)
    if moved.mesh is None:
        assert {len(x.devices()) for x in jax.tree.leaves(moved.params)} == {1}
        return
    shardings = param_shardings(moved.model, moved.params, moved.mesh)
    pairs = zip(jax.tree.leaves(moved.params), jax.tree.leaves(shardings))
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in pairs)

one = {m: load_language_model(SOURCE, quantize=m, **options) for m in (None, "int8")}
for method in one:
    many = load_language_model(
        SOURCE, quantize=method, mesh="fsdp=2,tensor=4", **options
    )
    workdir = f"{TARGET}/{method}"
    save_workdir(many, workdir)
    load_and_check(workdir, one[method], (1, 2))
    # Read straight to its place, not moved there.
    stored = open_workdir(pathlib.Path(workdir))
    shardings = param_shardings(many.model, stored.shapes, many.mesh)
    params = stored.read("float32", shardings)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(many.params))
    assert all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)
    load_and_check(workdir, one[method], (1, 2), mesh="tensor=2")
    load_and_check(workdir, one[method], (3,), mesh="data=4,fsdp=2")
# Quantized after it was read, in other stacks than it was written in.
load_and_check(f"{TARGET}/None", one["int8"], (3,), mesh="tensor=4", quantize="int8")
print("moved")
"""


@pytest.mark.slow
def test_a_workdir_moves_from_mesh_to_mesh(source, tmp_path, run_with_devices):
    code = f"SOURCE, TARGET = {str(source)!r}, {str(tmp_path)!r}\n{MOVE}"
    assert run_with_devices(8, code).strip() == "moved"
    # And to a process that has one device only.
    again = load_language_model(tmp_path / "None", dtype="float32", stacks=(1, 2))
    wanted = load_language_model(source, dtype="float32", stacks=(1, 2))
    assert_equal_trees(again.params, wanted.params)


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_step_before(source, tmp_path):
    lm = load_language_model(source, dtype="float32")
    save_workdir(lm, tmp_path, 0)
    code = f"""
from jaxllm.checkpoints import load_language_model, save_workdir
lm = load_language_model({str(source)!r}, dtype="float32")
print("saving", flush=True)
step = 1
while True:
    save_workdir(lm, {str(tmp_path)!r}, step)
    step += 1
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline().strip() == b"saving"
    time.sleep(1.234)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for step in find_steps(tmp_path):
        assert json.loads((tmp_path / str(step) / "meta" / "metadata").read_text())
    again = load_language_model(tmp_path, dtype="float32")
    assert_equal_trees(again.params, lm.params)
    save_workdir(lm, tmp_path, max(find_steps(tmp_path)) + 1)


@pytest.mark.data
def test_a_real_model_keeps_its_tokenizer(data_dir, tmp_path):
    lm = load_language_model(data_dir / "models" / "stories260K", dtype="float32")
    save_workdir(lm, tmp_path)
    again = load_language_model(tmp_path, dtype="float32")
    assert_equal_trees(again.params, lm.params)
    assert again.tokenizer.encode("Once upon") == lm.tokenizer.encode("Once upon")
    assert again.generation.eos_ids == (2,)

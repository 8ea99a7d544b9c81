"""The step: parts add up, meshes agree, memory falls with recomputation."""

import dataclasses
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.partition import split
from jaxllm.models import make_model
from jaxllm.training import Batch, gradients, init_state, train_step
from jaxllm.training.objectives import NextToken
from jaxllm.training.step import Frozen
from tests.training.small_run import decoder, write_config, write_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCABULARY = 61


def model_of(stacks=(1, 1), **changes):
    model, params = make_model(decoder(VOCABULARY), jax.random.key(0), stacks=stacks)
    return dataclasses.replace(model, **changes), params


def batch_of(rows=8, length=16, seed=0):
    """Rows with ever fewer tokens that are learned."""
    rng = np.random.default_rng(seed)
    segment_BT = np.ones((rows, length), np.int32)
    for row in range(rows):
        segment_BT[row, length - row :] = 0
    weight_BT = (segment_BT > 0).astype(np.float32)
    weight_BT[:, 0] = 0
    position_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    tokens_BT = rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    return jax.tree.map(
        jnp.asarray, Batch(tokens_BT, segment_BT, position_BT, weight_BT)
    )


def nothing(params):
    return Frozen(jax.tree.map(lambda _: None, params), {})


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_give_the_gradients_of_the_whole(parts) -> None:
    model, params = model_of()
    options = {"model": model, "objective": NextToken()}
    key, frozen = jax.random.key(0), nothing(params)
    whole, metrics = gradients(params, batch_of(), key, frozen, **options)
    cut, summed = gradients(params, batch_of(), key, frozen, parts=parts, **options)
    assert distance(cut, whole) < 1e-6
    np.testing.assert_allclose(summed["loss"], metrics["loss"], rtol=1e-6)


def test_stacks_and_recomputation_change_no_gradient() -> None:
    expected, key = None, jax.random.key(0)
    for stacks in ((1, 1), (2,)):
        for remat in ("none", "dots", "full"):
            model, params = model_of(stacks, remat=remat)
            grads, _ = gradients(
                params,
                batch_of(),
                key,
                nothing(params),
                model=model,
                objective=NextToken(),
            )
            leaves = [grads["embedder"], grads["final_norm"]]
            expected = leaves if expected is None else expected
            assert distance(leaves, expected) < 1e-6


def test_recomputation_saves_memory() -> None:
    sizes = []
    config = decoder(VOCABULARY, num_layers=12, max_positions=256)
    for remat in ("none", "dots", "full"):
        model, shapes = make_model(config, None, stacks=(12,))
        model = dataclasses.replace(model, remat=remat)
        batch = jax.eval_shape(lambda: batch_of(rows=2, length=256))

        def run(params, batch, model=model):
            return gradients(
                params,
                batch,
                jax.random.key(0),
                nothing(params),
                model=model,
                objective=NextToken(),
            )

        compiled = jax.jit(run).lower(shapes, batch).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] > sizes[1] > sizes[2], sizes


def test_what_is_frozen_gets_no_gradient_and_no_moments() -> None:
    model, params = model_of()
    trained, fixed = split(params, lambda path, x: "mlp" in path)
    optimizer = optax.adam(1e-2)
    state = init_state(trained, optimizer)
    own = sum(x.size for x in jax.tree.leaves(trained))
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer))
    assert moments == 2 * own + 1
    new, _ = train_step(
        state,
        batch_of(),
        jax.random.key(0),
        Frozen(fixed, {}),
        model=model,
        objective=NextToken(),
        optimizer=optimizer,
    )
    assert jax.tree.structure(new.params) == jax.tree.structure(trained)
    moved = [np.abs(x).max() for x in jax.tree.leaves(new.params)]
    assert min(moved) > 0


def test_the_state_is_given_away() -> None:
    model, params = model_of()
    optimizer = optax.sgd(1e-2)
    state = init_state(params, optimizer)
    options = {"model": model, "objective": NextToken(), "optimizer": optimizer}
    frozen, key = nothing(params), jax.random.key(0)
    train_step(state, batch_of(), key, frozen, **options)
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        train_step(state, batch_of(), key, frozen, **options)


MESHES = """
import json, sys
import jax, numpy as np, optax
from jaxllm.core.sharding import ShardingRules, make_mesh
from jaxllm.models import make_model
from jaxllm.models.sharding import param_shardings
from jaxllm.training import init_state, train_step
from jaxllm.training.objectives import NextToken
from jaxllm.training.start import lay_out
from tests.training.small_run import decoder
from tests.training.test_step import VOCABULARY, batch_of, nothing
from jax.sharding import NamedSharding, PartitionSpec

def run(sizes, parts, optimizer):
    mesh, rules = make_mesh(sizes), ShardingRules()
    model, params = make_model(
        decoder(VOCABULARY), jax.random.key(0), stacks=(2,), rules=rules
    )
    params = jax.device_put(params, param_shardings(model, params, mesh, rules))
    make = lambda p: init_state(p, optimizer)
    places = lay_out(jax.eval_shape(make, params), params, mesh)
    state = jax.jit(make, out_shardings=places)(params)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    losses = []
    with jax.set_mesh(mesh):
        for step in range(20):
            batch = jax.device_put(batch_of(rows=16, seed=step % 4), rows)
            state, found = train_step(
                state, batch, jax.random.key(0), nothing(params), model=model,
                objective=NextToken(), optimizer=optimizer, parts=parts,
            )
            losses.append(float(found["loss"]))
    def split(tree):
        return sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(tree))

    return losses, split(state.params), split(state.optimizer)

found = {}
for name, optimizer in (
    ("sgd", optax.sgd(0.1)), ("adam", optax.adam(1e-2, eps=1e-6))
):
    for sizes, parts in (
        ({}, 1), ({"data": 4}, 1), ({"data": 8}, 2), ({"fsdp": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"tensor": 2}, 1),
        ({"fsdp": 2, "sequence": 4}, 2),
    ):
        found[f"{name} {sizes} {parts}"] = run(sizes, parts, optimizer)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_meshes_agree(run_with_devices) -> None:
    found = json.loads(run_with_devices(8, MESHES).splitlines()[-1])
    for name in ("sgd", "adam"):
        runs = {k: v for k, v in found.items() if k.startswith(name)}
        expected, *_ = runs[f"{name} {{}} 1"]
        assert expected[-1] < expected[0]
        for setting, (losses, params, moments) in runs.items():
            np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=setting)
            if "fsdp" in setting or "tensor" in setting:
                assert params > 0, setting
                assert (moments > 0) == (name == "adam"), setting


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path) -> None:
    write_files(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for count in (1, 2):
        path = write_config(tmp_path, mesh="data=-1", steps=10, epochs=40)
        children = []
        for process in range(count):
            command = [
                *(sys.executable, "-m", "jaxllm.cli.main", "train"),
                f"--config={path}",
                f"--workdir={tmp_path / f'run{count}'}",
            ]
            if count > 1:
                command += [
                    f"--coordinator=localhost:{port}",
                    f"--num_processes={count}",
                    f"--process_id={process}",
                ]
            children.append(
                subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            )
        said = [child.communicate(timeout=300)[1] for child in children]
        assert [child.returncode for child in children] == [0] * count, said
        lines = (tmp_path / f"run{count}" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        names = ("train/loss", "eval/loss")
        found.append([x[n] for n in names for x in rows if n in x])
        assert len(found[-1]) == 10 + 2
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)

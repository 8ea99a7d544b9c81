"""Runs: stopped anywhere they end in the same bits; mistakes are one clear line."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.compression import LoraConfig
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.training import (
    CheckpointConfig,
    DivergedError,
    SampleConfig,
    export,
    fit,
)
from jaxllm.training.metrics import read_lines
from jaxllm.training.objectives import NextToken
from tests.training.small_run import small_config, write_config, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_files(path)
    return path


@pytest.fixture(scope="module")
def unbroken(folder):
    """The workdir of a run that nobody disturbed, and its model."""
    workdir = folder / "unbroken"
    return workdir, fit(small_config(folder), workdir)


def assert_same_tree(found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def losses(workdir):
    lines = read_lines(workdir / "metrics.jsonl")
    return [(x["step"], x["train/loss"]) for x in lines if "train/loss" in x]


# 20 were seen to pass; each costs the start of a process.
KILLS = 6


class Crash(Exception):
    pass


def crash_at(step):
    def hook(now, lm):
        if now == step:
            raise Crash

        return {}

    return hook


def test_a_run_learns_and_leaves_a_model_behind(unbroken) -> None:
    workdir, lm = unbroken
    found = losses(workdir)
    assert [step for step, _ in found] == list(range(1, 13))
    assert found[-1][1] < 0.8 * found[0][1]
    lines = read_lines(workdir / "metrics.jsonl")
    assert {"eval/loss", "eval/accuracy"} <= {name for line in lines for name in line}
    assert (workdir / "curve.png").read_bytes().startswith(b"\x89PNG")
    loaded = jaxllm.load(str(workdir), dtype="float32")
    assert_same_tree(loaded.params, lm.params)
    [result] = jaxllm.generate(loaded, ["the cat"], max_new_tokens=4)
    assert len(result.token_ids) == 4


@pytest.mark.parametrize(
    "stops", [(4,), pytest.param((1, 8, 11), marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    folder, unbroken, tmp_path, stops
) -> None:
    whole, lm = unbroken
    config = small_config(folder)
    evaluation = dataclasses.replace(config.evaluation, every=1)
    config = dataclasses.replace(config, evaluation=evaluation)
    for stop in stops:
        with pytest.raises(Crash):
            fit(config, tmp_path / "run", hooks=[crash_at(stop)])
    resumed = fit(config, tmp_path / "run")
    assert_same_tree(resumed.params, lm.params)
    # Every step once, with the very loss.
    assert losses(tmp_path / "run") == losses(whole)


def damage_truncate(step):
    file = max(
        (step / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(step):
    file = max(
        (step / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def damage_manifest(step):
    step.with_name(f"{step.name}.manifest.json").unlink()


def damage_delete(step):
    shutil.rmtree(step / "train")


def damage_metadata(step):
    (step / "_CHECKPOINT_METADATA").write_text("{")


DAMAGES = [
    damage_flip,
    damage_manifest,
    *(
        pytest.param(damage, marks=pytest.mark.slow)
        for damage in (damage_truncate, damage_delete, damage_metadata)
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(
    folder, unbroken, tmp_path, damage, capsys
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    damage(workdir / "12")
    resumed = fit(small_config(folder), workdir)
    assert_same_tree(resumed.params, unbroken[1].params)
    said = capsys.readouterr().err
    assert "checkpoint step 12 is damaged (" in said
    assert "resumed at step 9" in said
    assert (workdir / "12.corrupt").is_dir()
    assert losses(workdir) == losses(unbroken[0])


def test_where_all_are_damaged_nothing_starts_afresh_by_itself(
    folder, unbroken, tmp_path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    for manifest in workdir.glob("*.manifest.json"):
        manifest.unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole \(tried 12, 9, 6"):
        fit(small_config(folder), workdir)


def test_gradients_that_are_not_finite_change_nothing_and_end_the_run(
    folder, tmp_path, monkeypatch
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Burst(NextToken):
        """Is not a number for a batch whose first token is even."""

        def loss(self, model, params, batch, weights, key, frozen):
            value, metrics = super().loss(model, params, batch, weights, key, frozen)
            bad = (batch.tokens_BT.sum() % 3) == 0
            return value + jnp.where(bad, jnp.nan, 0.0), metrics

    config = small_config(folder, objective=Burst(), evaluation=None)
    lm = fit(config, tmp_path / "some")
    lines = read_lines(tmp_path / "some" / "metrics.jsonl")
    skipped = [x["train/skipped"] for x in lines if "train/skipped" in x]
    assert 0 < sum(s > 0 for s in skipped) < len(skipped)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(lm.params))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Always(NextToken):
        def loss(self, model, params, batch, weights, key, frozen):
            value, metrics = super().loss(model, params, batch, weights, key, frozen)
            return jnp.inf * value, metrics

    config = small_config(folder, objective=Always(), evaluation=None)
    with pytest.raises(DivergedError, match=r"for 4 consecutive .*last good step 0\)"):
        fit(config, tmp_path / "all")


def test_an_adapter_learns_and_the_model_below_stays(
    folder, unbroken, tmp_path
) -> None:
    base = unbroken[1]
    config = small_config(
        folder,
        decoder=None,
        tokenizer="",
        init_from=str(unbroken[0]),
        lora=LoraConfig(rank=2, targets=("query", "up")),
        steps=6,
    )
    lm = fit(config, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1][1] < found[0][1]
    for stack, before in zip(lm.params["stacks"], base.params["stacks"], strict=True):
        kernel = stack["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(kernel.base, before["mlp"]["up"]["kernel"])
    # A checkpoint holds the adapter and its moments, three numbers for each of its
    # own, and no model.
    trained = sum(
        x.size
        for stack in lm.params["stacks"]
        for kernel in (
            stack["mlp"]["up"]["kernel"],
            stack["attention"]["query"]["kernel"],
        )
        for name, x in vars(kernel).items()
        if name != "base" and getattr(x, "ndim", 0) > 1
    )
    stored = json.loads((tmp_path / "run" / "6.manifest.json").read_text())["files"]
    assert not any(name.startswith("state/") for name in stored)
    assert trained > 0
    again = fit(config, tmp_path / "run")
    assert_same_tree(again.params, lm.params)
    export(lm, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_text_to_look_at_is_written(folder, tmp_path, capsys) -> None:
    sample = SampleConfig(
        prompts=("the", "a red"),
        every=2,
        max_new_tokens=3,
        decode="jacobi:window=4",
    )
    fit(small_config(folder, sample=sample, steps=2), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    texts = [x for x in lines if "sample/1" in x]
    assert len(texts) == 1 and texts[0]["sample/1"].startswith("a red")
    figures = [
        x["sample/tokens_per_pass"]
        for x in lines
        if "sample/1" not in x and "sample/tokens_per_pass" in x
    ]
    assert len(figures) == 1 and 1 <= figures[0] <= 3
    assert "step 2: 'the" in capsys.readouterr().err


MISTAKES = [
    ({"seed": 9}, r"another configuration \(seed: 0 -> 9\)"),
    ({"accumulate": 3}, r"accumulate is 3 for 8 rows, expected a divisor"),
    ({"mesh": "data=2"}, r"needs 2 devices"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_one_clear_line(
    folder, unbroken, tmp_path, changes, message
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    with pytest.raises(UserError, match=message):
        fit(small_config(folder, **changes), workdir)


def test_what_may_change_may_change(folder, unbroken, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    checkpoint = CheckpointConfig(every=5, min_seconds=0)
    config = small_config(folder, log_every=2, checkpoint=checkpoint)
    fit(config, workdir)
    fit(dataclasses.replace(config, steps=13), workdir, allow=["steps"])
    assert losses(workdir)[-1][0] == 13


def test_data_that_ends_early_says_so(folder, tmp_path) -> None:
    config = small_config(folder)
    data = dataclasses.replace(config.data, epochs=1, batch_rows=64)
    with pytest.raises(ConfigError, match=r"the data ended after step \d+, expected"):
        fit(small_config(folder, data=data, steps=50), tmp_path / "run")


def test_a_workdir_has_one_job_at_a_time(folder, tmp_path) -> None:
    from jaxllm.checkpoints.locks import locked

    with (
        locked(tmp_path / "run", "cannot train", "--workdir"),
        pytest.raises(UserError, match=r"is in use by pid \d+"),
    ):
        fit(small_config(folder), tmp_path / "run")


# --- Processes of their own -------------------------------------------------------


def start(folder, workdir, **changes):
    command = [
        sys.executable,
        "-m",
        "jaxllm.cli.main",
        "train",
        f"--config={write_config(folder, **changes)}",
        f"--workdir={workdir}",
    ]
    root = pathlib.Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)


def wait_for(workdir, child, count) -> None:
    """Waits until so many lines of losses are there, or the process has ended."""
    while child.poll() is None:
        if len(losses(workdir)) >= count:
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143(folder, tmp_path) -> None:
    workdir = tmp_path / "run"
    child = start(folder, workdir, steps=100_000)
    wait_for(workdir, child, 5)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143, said
    step = int(said.split("preempted: saved step ")[1].split()[0])
    assert (workdir / str(step) / "commit_success.txt").exists()
    assert (workdir / f"{step}.manifest.json").exists()


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_bits(folder, tmp_path) -> None:
    steps = 60
    checkpoint = CheckpointConfig(every=1, min_seconds=0, keep=3)
    config = small_config(folder, steps=steps, checkpoint=checkpoint, evaluation=None)
    expected = fit(config, tmp_path / "whole")
    text = "from jaxllm.training import CheckpointConfig"
    path = write_config(
        folder, text, steps=steps, checkpoint=checkpoint, evaluation=None
    )
    draw, kills, workdir = random.Random(0), 0, tmp_path / "run"
    command = [sys.executable, "-m", "jaxllm.cli.main", "train"]
    command += [f"--config={path}", f"--workdir={workdir}"]
    root = pathlib.Path(__file__).resolve().parents[2]
    while kills < KILLS:
        child = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        done = len(losses(workdir))
        wait_for(workdir, child, min(done + draw.randint(0, 2), steps - 1))
        time.sleep(draw.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
    assert subprocess.run(command, cwd=root).returncode == 0
    found = jaxllm.load(str(workdir), dtype="float32")
    assert_same_tree(found.params, expected.params)
    assert losses(workdir) == losses(tmp_path / "whole")
    assert os.listdir(workdir)


def test_rows_that_a_mesh_cannot_share_are_refused(folder, run_with_devices) -> None:
    code = f"""
import dataclasses, pathlib
from jaxllm.core.errors import ConfigError
from jaxllm.training import fit
from tests.training.small_run import small_config
folder = pathlib.Path({str(folder)!r})
base = small_config(folder, mesh="data=4")
few = dataclasses.replace(base.evaluation.data, batch_rows=6)
wrong = (
    dataclasses.replace(base, accumulate=4),
    dataclasses.replace(
        base, evaluation=dataclasses.replace(base.evaluation, data=few)
    ),
)
for config in wrong:
    try:
        fit(config, folder / "refused")
    except ConfigError as error:
        print(error)
"""
    said = run_with_devices(4, code).splitlines()
    assert "data.batch_rows is 8, in 4 parts, expected a multiple of 16" in said[0]
    assert "evaluation.data.batch_rows is 6, in 1 parts" in said[1]

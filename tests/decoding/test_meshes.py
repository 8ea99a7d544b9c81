"""Tokens on any mesh are those of one device, of one process or of two."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.checkpoints.small_checkpoint import CONFIGS, write_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]

GENERATE = """
import json, sys
import jax, numpy as np
import jaxllm

rng = np.random.default_rng(0)
lengths = (3, 14, 9, 7, 5, 12, 8, 16)
DIRECTORY, MESHES, METHODS = CASES

def run(mesh, method, temperature):
    lm = jaxllm.load(DIRECTORY, dtype="float32", mesh=mesh)
    prompts = [np.random.default_rng(i).integers(3, lm.config.vocabulary, n).tolist()
               for i, n in enumerate(lengths)]
    found = jaxllm.generate(lm, prompts, decode=method, max_new_tokens=8,
                            temperature=temperature)
    return [x.token_ids for x in found]

for method, temperature in METHODS:
    tokens = {mesh: run(mesh, method, temperature) for mesh in MESHES}
    if jax.process_index() == 0:
        print(json.dumps(tokens))
"""
MESHES = ["data=8", "tensor=4", "data=2,tensor=4", "sequence=8", "fsdp=2,sequence=4"]
METHODS = [("autoregressive", 0.0), ("prompt_lookup:length=3,lean=false", 1.0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "llama"
    write_checkpoint(directory, CONFIGS["llama"])
    return str(directory)


def assert_equal_on_all(lines):
    for line in lines:
        found = json.loads(line)
        expected = found.pop("data=1")
        assert len({str(tokens) for tokens in expected}) > 4
        for mesh, tokens in found.items():
            assert tokens == expected, mesh


@pytest.mark.slow
def test_tokens_on_every_mesh_are_those_of_one_device(checkpoint, run_with_devices):
    cases = (checkpoint, ["data=1", *MESHES], METHODS)
    lines = run_with_devices(8, f"CASES = {cases!r}\n{GENERATE}").splitlines()
    assert len(lines) == len(METHODS)
    assert_equal_on_all(lines)


def run_together(arguments, **environment):
    """Runs Python twice at a time, with four devices each; returns what each printed.

    Every INDEX in an argument or a variable is the number of the process.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
    }
    children = []
    for index in range(2):
        own = {k: v.replace("INDEX", str(index)) for k, v in environment.items()}
        children.append(
            subprocess.Popen(
                [sys.executable, *(x.replace("INDEX", str(index)) for x in arguments)],
                env=os.environ | own,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [child.communicate(timeout=500) for child in children]
    for child, (_, errors) in zip(children, said, strict=True):
        assert child.returncode == 0, errors[-4000:]
    return said


JOIN = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
assert jax.process_count() == 2 and len(jax.devices()) == 8
"""


@pytest.mark.slow
def test_tokens_of_two_processes_are_those_of_one(checkpoint, run_with_devices):
    alone = (checkpoint, ["data=1"], METHODS[:1])
    expected = run_with_devices(1, f"CASES = {alone!r}\n{GENERATE}").splitlines()
    # The others leave a process without devices.
    whole = [mesh for mesh in MESHES if mesh != "tensor=4"]
    together = (checkpoint, whole, METHODS[:1])
    code = f"{JOIN}\nCASES = {together!r}\n{GENERATE}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = run_together(["-c", code, address, "INDEX"])
    # The library that connects the processes prints to the same stream.
    lines = [line for line in said[0][0].splitlines() if line.startswith("{")]
    assert len(lines) == len(expected) == 1
    for line, one in zip(lines, expected, strict=True):
        assert_equal_on_all([json.dumps(json.loads(line) | json.loads(one))])


@pytest.mark.slow
def test_a_job_of_two_processes_writes_one_file(checkpoint, tmp_path):
    rows = tmp_path / "rows.jsonl"
    prompts = [{"token_ids": [5 + i, 9, 3 * i + 4]} for i in range(8)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    command = ["-m", "jaxllm.cli.main", "generate", f"--model={checkpoint}"]
    command += [f"--prompts={rows}", "--dtype=float32", "--max_new_tokens=6"]
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    one = subprocess.run(
        [sys.executable, *command, f"--output={alone}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stderr[-4000:]
    # As Slurm tells its processes; the port follows from the number of the job.
    cluster = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "INDEX",
        "SLURM_LOCALID": "INDEX",
    }
    command += ["--mesh=data=2,tensor=4", "--coordinator=auto", f"--output={together}"]

    def tokens(path):
        found = map(json.loads, path.read_text().splitlines())
        return {row["id"]: row["token_ids"] for row in found}

    run_together(command, **cluster)
    assert len(tokens(alone)) == 8 and tokens(together) == tokens(alone)
    # Rows that are missing are made again, by all processes together.
    lines = together.read_text().splitlines(keepends=True)
    together.write_text("".join(lines[:5]))
    run_together(command, **cluster)
    assert tokens(together) == tokens(alone)

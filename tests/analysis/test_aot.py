"""Programs compiled for TPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest

from jaxllm.analysis import (
    Compilation,
    Workload,
    analyze,
    aot,
    compile_ahead,
    compiler_process,
    find_config,
    in_compiler,
    make_target,
    parse_slice,
)
from jaxllm.attention import RopeConfig
from jaxllm.core.errors import CapacityError, ConfigError, ShardingError, UserError
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig

LLAMA = find_config("llama3-8b")


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")


def small(layers=2, **others):
    return DecoderConfig(
        vocabulary=1024,
        width=256,
        num_layers=layers,
        max_positions=1024,
        attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=128),
        mlp=MlpConfig(hidden=512),
        ropes=(RopeConfig(rotary_dim=128),),
        **others,
    )


def one(**fields):
    fields = {"config": small(), "machine": parse_slice("v5e"), "rows": 8} | fields
    (found,) = compile_ahead([Compilation(**fields)])
    return found


def collectives(found, depth):
    return {
        each["kind"]: each["count"]
        for each in found["collectives"]
        if each["loop_depth"] == depth
    }


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu is not installed.*jaxllm\[aot\]"):
        one()


@pytest.mark.parametrize("name", ["h200", "a100:8"])
def test_a_gpu_is_no_tpu(name):
    with pytest.raises(ConfigError, match="is no TPU, expected one of v4, v5e"):
        one(machine=parse_slice(name))


def echo(argument):
    """Called in the compiler's process."""
    print("a library prints this")
    if argument == "mistake":
        raise ConfigError("cannot echo: it is a mistake, expected none. Stop.")
    if argument == "full":
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (32.21G) exceeds available HBM (15.75G)."
        )
    if argument == "bug":
        raise ZeroDivisionError("division by zero")
    return {"argument": argument, "platform": os.environ["JAX_PLATFORMS"]}


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: name)
    return lambda *arguments: in_compiler("tests.analysis.test_aot:echo", arguments)


def test_answers_come_one_by_one_and_prints_do_not_disturb(compiler):
    answers = compiler(1, (2, "three"), "mistake", "never")
    assert next(answers) == {"argument": 1, "platform": "cpu"}
    assert next(answers)["argument"] == [2, "three"]
    with pytest.raises(ConfigError, match="cannot echo"):
        next(answers)


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("mistake", ConfigError, r"^cannot echo: it is a mistake, expected none\."),
        ("full", CapacityError, r"is 32\.21GiB in 15\.75GiB, expected less"),
    ],
)
def test_a_mistake_in_the_process_is_raised_here(argument, error, message):
    answer = json.loads(json.dumps(compiler_process._call(echo, argument)))
    with pytest.raises(error, match=message):
        aot._answer(answer)


def test_a_bug_in_the_process_is_a_bug_here(compiler):
    with pytest.raises(RuntimeError, match="division by zero"):
        list(compiler("bug"))


def test_libtpu_is_never_loaded_by_the_analysis_itself():
    code = (
        "import sys, jaxllm.analysis as a\n"
        "list(a.ARCHITECTURES)\n"
        "a.analyze(a.make_target(a.find_config('llama3-8b')), a.Workload(),"
        " a.parse_slice('v5e'))\n"
        "print('libtpu' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "False"


SLICES = (
    *("v4", "v4:2x2x1", "v5e", "v5e:1x2", "v5e:2x4", "v5p", "v5p:2x2x1", "v6e"),
    *("v6e:4x4", "tpu7x:1x1x1", "tpu7x:2x2x1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_a_decode_loop_compiles_for_every_generation(name, libtpu):
    machine = parse_slice(name)
    heads = min(machine.devices, 8)
    mesh = f"data={machine.devices // heads},tensor={heads}"
    found = one(machine=machine, mesh=mesh, rows=16, context=512)
    assert found["devices"] == machine.devices
    report = analyze(
        make_target(small()), Workload(rows=16, context=512), machine, mesh
    )
    assert found["cache_bytes"] == report.cache_bytes
    # Beside parameters and cache there are tokens, keys and counts.
    assert report.needed_bytes < found["argument_bytes"] < report.needed_bytes + 2**20
    assert found["alias_bytes"] >= found["cache_bytes"]
    assert found["temp_bytes"] < 2**24
    if heads > 1:
        assert collectives(found, 2) == {"all-reduce": 2}
    else:
        assert collectives(found, 2) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("v5e:16x16", "data=32,tensor=8"), ("v5p:4x8x8", "data=32,tensor=8")],
)
def test_256_chips_take_no_longer(name, mesh, libtpu):
    found = one(machine=parse_slice(name), mesh=mesh, rows=64, context=512)
    assert found["devices"] == 256
    assert collectives(found, 2) == {"all-reduce": 2}
    assert found["compile_seconds"] < 120


@pytest.mark.slow
def test_8b_step_on_a_v5e_slice_copies_no_cache(libtpu):
    found = one(config=LLAMA, machine=parse_slice("v5e:2x4"), rows=16, context=8192)
    layer = found["cache_bytes"] // 2 // 32
    assert found["cache_bytes"] == 2**31
    assert found["temp_bytes"] < 0.2e9
    # Keys and values are one array each; the largest copy is of a weight's layout.
    assert found["largest_copy_bytes"] < 8 * layer
    assert found["alias_bytes"] >= found["cache_bytes"]
    assert collectives(found, 2) == {"all-reduce": 2}
    # The cache is read by a kernel, in the loop over layers.
    assert found["kernels"] == {"interval_attention": 1}
    assert found["peak_bytes"] < found["memory_bytes"]


@pytest.mark.slow
def test_a_cache_split_by_sequence_is_never_gathered(libtpu):
    found = one(
        config=LLAMA,
        machine=parse_slice("v5e:2x4"),
        mesh="sequence=8",
        rows=4,
        context=8192,
        quantize="int8",
    )
    assert found["cache_bytes"] == 2**29  # of 4.3 GB
    assert found["alias_bytes"] >= found["cache_bytes"]
    # Outputs and log-sum-exps of the parts are joined; a layer's keys would be 67 MB.
    largest = max(each["largest_bytes"] for each in found["collectives"])
    assert largest < 2**22


@pytest.mark.slow
def test_70b_with_int8_weights_fits_on_sixteen_v6e_chips(libtpu):
    machine, mesh = parse_slice("v6e:4x4"), "data=2,tensor=8"
    llama = find_config("llama3-70b")
    found = one(
        config=llama,
        machine=machine,
        mesh=mesh,
        rows=32,
        context=8192,
        quantize="int8",
    )
    assert found["peak_bytes"] < 0.9 * found["memory_bytes"]
    target = make_target(llama, quantize="int8")
    report = analyze(target, Workload(rows=32, context=8192), machine, mesh)
    assert found["argument_bytes"] == pytest.approx(report.needed_bytes, rel=0.01)
    assert found["temp_bytes"] < 0.2e9
    assert collectives(found, 2) == {"all-reduce": 2}


@pytest.mark.slow
def test_prefill_keeps_the_cache_in_its_place(libtpu):
    found = one(
        config=LLAMA,
        machine=parse_slice("v5e:2x4"),
        phase="prefill",
        rows=16,
        context=8192,
    )
    assert found["alias_bytes"] >= found["cache_bytes"] == 2**31
    assert found["temp_bytes"] < 0.25 * found["cache_bytes"]
    assert collectives(found, 2) == {"all-reduce": 2}


@pytest.mark.slow
def test_a_training_step_updates_its_state_in_place(libtpu):
    machine = parse_slice("v5e:2x2")
    found = one(machine=machine, mesh="data=2,fsdp=2", phase="train", context=128)
    target = make_target(small(), dtype="float32", compute_dtype="bfloat16")
    workload = Workload(phase="train", rows=8, context=128)
    report = analyze(target, workload, machine, "data=2,fsdp=2")
    # Of the state the gradients are no argument: parameters and two moments are.
    held = report.parameter_bytes * 3
    assert found["argument_bytes"] == pytest.approx(held, rel=0.05)
    assert found["alias_bytes"] >= held
    kinds = {each["kind"] for each in found["collectives"]}
    assert kinds & {"all-reduce", "reduce-scatter"}
    assert "all-gather" in kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"config": LLAMA, "rows": 64, "context": 8192}, CapacityError, "does not fit"),
        (
            {"machine": parse_slice("v5e:3x5")},
            ConfigError,
            "no topology v5e:3x5, expected multiples of 2x2",
        ),
        (
            {"machine": parse_slice("v5e:2x4"), "mesh": "tensor=4"},
            ShardingError,
            "fills 4 devices, expected 8",
        ),
        (
            {"machine": parse_slice("v5e:4x4"), "mesh": "tensor=16"},
            ShardingError,
            "'heads' has size 8, expected a multiple of 16",
        ),
        ({"phase": "guess"}, ConfigError, "phase is 'guess', expected one of decode"),
        ({"phase": "train", "quantize": "int8"}, ConfigError, "Leave out --quantize"),
        (
            {
                "phase": "train",
                "machine": parse_slice("v5e:2x2"),
                "mesh": "data=4",
                "rows": 6,
            },
            ConfigError,
            "rows is 6, expected a multiple of 4",
        ),
        ({"method": "nonsense"}, ConfigError, "nonsense"),
    ],
)
def test_a_mistake_is_one_line(fields, error, message, libtpu):
    with pytest.raises(error, match=message) as caught:
        one(**fields)
    assert "\n" not in str(caught.value)

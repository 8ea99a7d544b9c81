"""`jaxllm analyze`, called in this process."""

import json
import re

import pytest
from matplotlib import image

from jaxllm.analysis import ARCHITECTURES, HARDWARE, architectures, pictures
from tests.cli.conftest import CONFIG


@pytest.fixture
def analyze(jaxllm, tmp_path):
    """`jaxllm analyze` of a small model on a TPU that is not here."""

    def run(*arguments, model="qwen3-0.6b", hardware="v5e"):
        flags = ["--model", model, "--hardware", hardware]
        output = tmp_path / "found.json"
        return jaxllm("analyze", *flags, "--output", output, *arguments)

    return run


@pytest.fixture
def found(tmp_path):
    return lambda: json.loads((tmp_path / "found.json").read_text())


def assert_refused(result, message):
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(rf"jaxllm analyze: {message}\n", result.err), result.err


def test_a_table_a_file_and_a_picture(analyze, found, tmp_path):
    result = analyze("--batch=16", "--context=8192", hardware="v5e:2x4")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == (
        "qwen3-0.6b on v5e:2x4 (tensor=8), decode: 16 x 1 tokens at context 8192"
    )
    assert "datasheet" in lines[1]
    names = [line.split()[0] for line in lines[4:16]]
    whole = found()
    assert names == [row["name"] for row in whole["operators"]]
    assert lines[-2:] == [
        f"results: {tmp_path}/found.json",
        f"picture: {tmp_path}/found.png",
    ]
    assert "a model, not a measurement" in result.out
    assert whole["hardware"]["chips"] == 8
    assert whole["mesh"] == {"tensor": 8}
    assert whole["environment"]["config"]["batch"] == 16
    assert "compiled" not in whole
    # 28 layers of two times 8191 keys of eight heads, by sixteen rows over eight.
    read = 28 * 2 * 16 * 8191 * 8 * 128 * 2 / 8
    assert whole["total"]["kv_read_bytes"] == read
    assert f"{whole['total']['seconds'] * 1e3:.4g} ms" in result.out
    assert image.imread(tmp_path / "found.png").shape[1] > 1000


def test_the_shipped_model_on_this_machine(jaxllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = jaxllm("analyze")
    assert result.code == 0, result.err
    assert result.out.startswith("demo on cpu (1 device), decode: 1 x 1 tokens")
    assert "measured on this machine" in result.out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "analysis.json",
        "analysis.png",
    ]


def test_a_config_and_a_directory_are_models(analyze, found, tmp_path, checkpoint):
    config = tmp_path / "some.json"
    config.write_text(json.dumps(CONFIG))
    bytes_ = []
    for model in (config, checkpoint):
        assert analyze("--context=32", model=model).code == 0
        bytes_.append(found()["memory"]["parameter_bytes"])
    assert bytes_[0] == bytes_[1] > 0


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        (["--phase=verify", "--nodes=7"], 7),
        (["--phase=prefill"], 64),
        (["--phase=train", "--mesh=fsdp=4"], 64),
        (["--phase=decode", "--shared_prefix=50", "--kv_dtype=float32"], 1),
    ],
)
def test_every_phase(flags, tokens, analyze, found):
    result = analyze("--batch=8", "--context=64", *flags, hardware="v5e:2x2")
    assert result.code == 0, result.err
    whole = found()
    assert whole["workload"]["tokens"] == tokens
    assert ("optimizer" in result.out) == (whole["workload"]["phase"] == "train")


def test_quantized_weights_halve_and_the_cache_stays(analyze, found):
    flags = ("--batch=2", "--context=4096")
    memory = []
    for quantize in ((), ("--quantize=int8",)):
        assert analyze(*flags, *quantize).code == 0
        memory.append(found()["memory"])
    plain, int8 = memory
    assert 1.9 < plain["parameter_bytes"] / int8["parameter_bytes"] < 2
    assert plain["cache_bytes"] == int8["cache_bytes"]


def test_what_does_not_fit_is_said(analyze, found):
    result = analyze("--batch=512", "--context=4096")
    assert result.code == 0
    assert "DOES NOT FIT" in result.out
    assert found()["memory"]["fits"] is False


def test_a_context_beyond_the_models_positions_is_noted(analyze):
    result = analyze("--context=50000")
    assert result.code == 0
    assert result.err == "jaxllm analyze: the model was made for 40960 positions\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--hardware=v5x"],
            r"unknown hardware: 'v5x', expected one of .+ mean '.+'\?",
        ),
        (["--hardware=v5e:2x2x2"], r"cannot analyze: hardware 'v5e:2x2x2' is no .+"),
        (["--model=lama3-8b"], r"unknown model: .*Did you mean 'llama3-8b'\?"),
        (["--batch=0"], r"cannot read flags: --batch: '0', expected an integer, .+"),
        (["--phase=guess"], r"cannot read flags: --phase: 'guess', expected one of .+"),
        (["--quantize=int3"], r"unknown method: 'int3', expected one of .+"),
        (["--dtype=int8"], r"cannot set dtype: 'int8' is unknown, .+"),
        (["--mesh=tensor=2"], r"cannot make mesh: 'tensor=2' fills 2 devices, .+"),
        (
            ["--phase=verify", "--nodes=99", "--context=9"],
            r"cannot analyze: context .+",
        ),
        (["--shared_prefix=2000"], r"cannot analyze: shared_prefix is 2000, .+"),
        (["--decode=jacobi"], r"cannot analyze: --decode is given without --compile.+"),
        (
            ["--compile", "--phase=verify"],
            r"cannot analyze: .+ Write --phase decode .+",
        ),
        (["--compile", "--shared_prefix=8"], r"cannot analyze: --shared_prefix is .+"),
        (["--output=/no/such/place.json"], r"cannot write the analysis: .+"),
        (["--output=found.txt"], r"cannot write the analysis: found.txt: .+"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, message, jaxllm, tmp_path):
    given = {a.split("=")[0] for a in arguments}
    others = [
        f"--{name}={value}"
        for name, value in (
            ("model", "qwen3-0.6b"),
            ("hardware", "v5e"),
            ("output", tmp_path / "x.json"),
        )
        if f"--{name}" not in given
    ]
    assert_refused(jaxllm("analyze", *others, *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_a_compile_without_libtpu_says_what_to_install(analyze, monkeypatch):
    from jaxllm.analysis import aot

    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    result = analyze("--compile", "--context=64")
    assert result.code == 2
    assert "libtpu is not installed, expected the TPU compiler" in result.err


def test_a_gpu_cannot_be_compiled_for(analyze):
    result = analyze("--compile", "--context=64", hardware="h200")
    assert result.code == 2
    assert "cannot compile: h200:1 is no TPU" in result.err


@pytest.mark.slow
def test_a_compile_adds_what_the_compiler_said(analyze, found):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    flags = ("--batch=8", "--context=512", "--compile", "--decode=jacobi:window=4")
    result = analyze(*flags, hardware="v5e:2x4")
    assert result.code == 0, result.err
    compiled = found()["compiled"]
    assert compiled["argument_bytes"] > compiled["output_bytes"] > 0
    # All that a step of a model so small needs stays on the chip.
    assert 0 <= compiled["temp_bytes"] < 2**27
    assert compiled["method"] == "jacobi:window=4"
    assert {"kind", "count", "bytes", "in_loop"} <= set(compiled["collectives"][0])
    assert re.search(r"^  all-reduce +2 +2 ", result.out, re.MULTILINE)


def test_parameters_of_named_models_are_those_that_were_published():
    import jax

    published = {
        "llama3-8b": 8.03,
        "llama3-70b": 70.55,
        "llama3.1-8b": 8.03,
        "llama3.1-70b": 70.55,
        "llama3.2-1b": 1.24,
        "llama3.2-3b": 3.21,
        "llama2-7b": 6.74,
        "mistral-7b": 7.25,
        "qwen3-0.6b": 0.6,
        "qwen3-8b": 8.19,
        "qwen3-32b": 32.8,
        "gemma-2-2b": 2.61,
        "gemma-2-9b": 9.24,
        "gpt2": 0.124,
    }
    assert set(published) == set(ARCHITECTURES)
    for name, billions in published.items():
        config = architectures.find_config(name)
        # Layers are alike, so two tell the size of one.
        sizes = []
        for layers in (1, 2):
            few = _with_layers(config, layers)
            tree = architectures.make_target(few).params
            sizes.append(sum(x.size for x in jax.tree.leaves(tree)))
        whole = sizes[0] + (config.num_layers - 1) * (sizes[1] - sizes[0])
        assert whole / 1e9 == pytest.approx(billions, rel=0.01), name


def _with_layers(config, layers):
    import dataclasses

    cut = {
        name: getattr(config, name)[:layers] for name in ("layer_rope", "layer_window")
    }
    return dataclasses.replace(config, num_layers=layers, **cut)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_picture_has_its_operators_below_the_roof(name):
    from jaxllm.analysis import Workload, analyze, make_target, parse_slice

    config = _with_layers(architectures.find_config("qwen3-0.6b"), 2)
    report = analyze(make_target(config), Workload(rows=4), parse_slice(name))
    roof, times = pictures.make_figure(report).axes
    points = [tuple(dots.get_offsets()[0]) for dots in roof.collections]
    assert len(points) >= 9
    for intensity, rate in points:
        assert rate <= intensity * report.device.bandwidth * 1.001
        assert rate <= max(report.device.peaks.values()) * 1.001
    assert len(times.get_yticklabels()) == len(report.costs)

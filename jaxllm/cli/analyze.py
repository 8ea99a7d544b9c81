"""`jaxllm analyze`: what a pass costs on hardware that need not be here."""

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxllm.cli.options import Choice, Flag, Number, Switch, UsageError

if TYPE_CHECKING:
    from jaxllm.analysis import Report, Target

__all__ = ["FLAGS", "SUMMARY", "run"]

SUMMARY = """predict speed and memory on hardware that need not be here

  jaxllm analyze
  jaxllm analyze --model llama3-8b --hardware v5e:2x4 --batch 16 --context 8192
  jaxllm analyze --model llama3-70b --quantize int8 --hardware v6e:4x4 \\
      --mesh data=2,tensor=8 --batch 32 --context 8192 --compile

Prints a roofline, operator by operator, for one device, and writes it as JSON and as a
picture beside it. It is a model, not a measurement: the least time that the hardware's
data sheet allows. With --compile the TPU compiler, which needs no TPU, compiles the
whole decode loop (prefill, training step) and says what memory it takes and what it
sends between chips; that takes pip install "jaxllm[aot]" and some ten seconds.

--model is a name such as llama3-8b, llama3-70b, qwen3-8b or gemma-2-9b, a config.json,
a directory, hf:org/name, or a shipped model; no weights are read.
"""

FLAGS = (
    Flag("model", "demo", "a model, or the config.json of one"),
    Flag(
        "hardware",
        "cpu",
        "cpu (this machine, measured); a100, h100, h200, h200:8; v5e, v6e, v5e:2x4; "
        "v4, v5p, tpu7x, v5p:2x2x1",
    ),
    Choice(
        "phase",
        "decode",
        "decode: a token a row; verify: --nodes of a draft a row; prefill: whole "
        "prompts; train: a step",
        ("decode", "verify", "prefill", "train"),
    ),
    Number("batch", 1, "rows, over all devices", low=1, integer=True),
    Number("context", 1024, "tokens of a row, new ones included", low=1, integer=True),
    Number("nodes", 8, "of --phase verify: tokens of a draft", low=1, integer=True),
    Number(
        "shared_prefix",
        0,
        "how many of the tokens all rows share and store once",
        low=0,
        integer=True,
    ),
    Flag("quantize", None, "quantize the weights, such as int8"),
    Flag("dtype", None, "dtype of the rest (default: float32 on a CPU, else bfloat16)"),
    Flag(
        "kv_dtype", None, "dtype of cached keys and values (default: that of the rest)"
    ),
    Flag("mesh", None, "how devices are arranged (default: tensor=all of them)"),
    Switch(
        "compile", False, "compile for the TPUs of --hardware, and add what that says"
    ),
    Flag(
        "decode",
        None,
        "of --compile: the method of the decode loop (default: autoregressive)",
    ),
    Flag(
        "output", "analysis.json", "the file for the results; a picture goes beside it"
    ),
)

_WRITE = "cannot write the analysis"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def run(values: flags.FlagValues) -> int:
    """Runs the command; returns the exit code.

    Args:
      values: The parsed flags.

    Raises:
      UsageError: Flags contradict each other, or the output cannot be written.
      UserError: The model, the hardware or the mesh cannot be used.
    """
    _check(values)
    # jax comes with these.
    from jaxllm.analysis import Workload, analyze, parse_slice

    machine = parse_slice(values.hardware)
    target = _target(values, machine.hardware.name == "cpu")
    workload = Workload(
        phase=values.phase,
        rows=values.batch,
        context=values.context,
        nodes=values.nodes if values.phase == "verify" else 1,
        shared_prefix=values.shared_prefix,
    )
    _warn(target, values)
    report = analyze(target, workload, machine, values.mesh)
    print(table(report))
    content = {"format": 1, **report.to_json(), "environment": _environment(values)}
    if values.compile:
        content["compiled"] = _compile(values, target, machine)
        print("\n" + compiled_table(content["compiled"]))
    _write(report, content, values.output)
    return 0


def _check(values: flags.FlagValues) -> None:
    if values.decode is not None and not (values.compile and values.phase == "decode"):
        raise UsageError(
            "cannot analyze: --decode is given without --compile of --phase decode, "
            "expected both. Leave out --decode."
        )
    if values.phase == "train" and (values.quantize or values.kv_dtype):
        raise UsageError(
            "cannot analyze: --quantize or --kv_dtype is given with --phase train, "
            "expected neither: parameters stay float32, and there is no cache. Leave "
            "them out."
        )
    if values.compile and values.shared_prefix:
        raise UsageError(
            "cannot analyze: --shared_prefix is given with --compile, expected a cache "
            "of whole rows. Leave out one."
        )
    if values.compile and values.phase == "verify":
        raise UsageError(
            "cannot analyze: --compile is given with --phase verify, expected decode "
            "and the method that drafts. Write --phase decode --decode "
            f"prompt_lookup:length={values.nodes - 1 or 1}."
        )
    folder = os.path.dirname(values.output) or "."
    if not values.output.endswith(".json") or not os.path.isdir(folder):
        raise UsageError(
            f"{_WRITE}: {values.output}: is no such file, expected a name that ends in "
            ".json, in a folder that exists. Correct --output."
        )


def _target(values: flags.FlagValues, on_cpu: bool) -> "Target":
    from jaxllm.analysis import find_config, make_target

    dtype = values.dtype or ("float32" if on_cpu else "bfloat16")
    if values.phase == "train":
        # Training keeps its parameters in full precision.
        return make_target(
            find_config(values.model),
            name=values.model,
            dtype="float32",
            compute_dtype=dtype,
        )
    return make_target(
        find_config(values.model),
        name=values.model,
        dtype=dtype,
        quantize=values.quantize,
        cache_dtype=values.kv_dtype,
    )


def _warn(target: "Target", values: flags.FlagValues) -> None:
    from jaxllm.cli.progress import note

    positions = target.config.max_positions
    if values.context > positions:
        note(f"the model was made for {positions} positions", "analyze")


def _compile(
    values: flags.FlagValues, target: "Target", machine: Any
) -> dict[str, Any]:
    from jaxllm.analysis import Compilation, compile_ahead
    from jaxllm.cli.progress import note

    note(f"compiling for {machine.name}, {machine.devices} devices", "analyze")
    compilation = Compilation(
        config=target.config,
        machine=machine,
        phase=values.phase,
        mesh=values.mesh,
        method=values.decode or "autoregressive",
        rows=values.batch,
        context=values.context,
        dtype=values.dtype or "bfloat16",
        cache_dtype=values.kv_dtype,
        quantize=values.quantize,
        name=values.model,
    )
    (found,) = compile_ahead([compilation])
    return found


def table(report: "Report") -> str:
    """Returns the report as text."""
    rows = [
        [
            "operator",
            "op",
            "byte",
            "op/byte",
            "weights",
            "kv",
            "sent",
            "us",
            "",
            "waits for",
        ]
    ]
    for cost in report.costs:
        operator = cost.operator
        intensity = operator.intensity
        kv = operator.kv_read_bytes + operator.kv_written_bytes
        rows.append(
            [
                operator.name,
                _short(operator.flops),
                _short(operator.bytes),
                "-" if intensity is None else f"{intensity:.3g}",
                _short(operator.weight_bytes),
                _short(kv),
                _short(operator.sent_bytes),
                f"{cost.seconds * 1e6:.1f}",
                f"{cost.seconds / report.seconds:.0%}",
                cost.bound,
            ]
        )
    hardware, workload = report.slice.hardware, report.workload
    split = (
        ",".join(f"{axis}={size}" for axis, size in report.mesh.items()) or "1 device"
    )
    device = report.device
    used = report.needed_bytes / device.memory_bytes
    lines = [
        f"{report.model} on {report.slice.name} ({split}), {workload.phase}: "
        f"{workload.rows} x {workload.tokens} tokens at context {workload.context}",
        f"hardware: {hardware.source}, {hardware.date}; a device has "
        f"{device.memory_bytes / 1e9:.4g} GB, {device.bandwidth / 1e9:.4g} GB/s",
        "",
        *_aligned(rows),
        "",
        f"least time of a pass: {report.seconds * 1e3:.4g} ms, "
        f"{report.tokens_per_second:.4g} tokens/s (a model, not a measurement); "
        f"waits for {report.bound}",
        f"memory of a device: parameters {_short(report.parameter_bytes)}B, cache "
        f"{_short(report.cache_bytes)}B, training state {_short(report.state_bytes)}B: "
        f"{used:.0%} of what it has{'' if report.fits else ', DOES NOT FIT'}",
    ]
    return "\n".join(lines)


def compiled_table(found: dict[str, Any]) -> str:
    """Returns what the compiler said as text."""
    lines = [
        f"compiled in {found['compile_seconds']:.1f} s; bytes of one of "
        f"{found['devices']} devices:"
    ]
    names = ("argument", "temp", "output", "alias", "code", "peak", "largest_copy")
    rows = [[f"  {name}", f"{_short(found[f'{name}_bytes'])}B"] for name in names]
    lines += _aligned(rows)
    rows = [["  collective", "loops around it", "count", "bytes"]]
    for each in found["collectives"]:
        counts = [str(each[name]) for name in ("loop_depth", "count")]
        rows.append([f"  {each['kind']}", *counts, _short(each["bytes"])])
    lines += _aligned(rows) if found["collectives"] else ["  no collectives"]
    kernels = (f"{name} x{count}" for name, count in found["kernels"].items())
    return "\n".join([*lines, f"  kernels: {', '.join(kernels) or 'none'}"])


def _short(value: float) -> str:
    """Returns a number with a unit, `1.23G`."""
    for size, unit in _UNITS:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Returns lines: the first and last columns to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _environment(values: flags.FlagValues) -> dict[str, Any]:
    import importlib.metadata

    import jax

    from jaxllm.version import __version__

    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        libtpu = None
    given = {flag.name: values[flag.name].value for flag in FLAGS}
    versions = {"jaxllm": __version__, "jax": jax.__version__, "libtpu": libtpu}
    return {"versions": versions, "config": given}


def _write(report: "Report", content: dict[str, Any], output: str) -> None:
    from jaxllm.checkpoints.files import replacing

    picture = f"{output.removesuffix('.json')}.png"
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with replacing(output, _WRITE) as file:
        file.write(text.encode())
    # Fonts that are missing are nothing to tell a user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from jaxllm.analysis.pictures import draw_report

    with replacing(picture, _WRITE) as file:
        draw_report(report, file)
    print(f"\nresults: {output}\npicture: {picture}")


if __name__ == "__main__":
    from jaxllm.cli.main import main

    sys.exit(main(["analyze", *sys.argv[1:]]))

"""How much memory loading a checkpoint needs beside the parameters themselves.

Claim: peak resident memory of loading <= 1.3 x the bytes of the final parameters,
what the framework needs subtracted. No paper; loaders that read a file whole, cast in
float32 or stack at the end need 2 to 4 times as much.

    python experiments/measure_load.py --output load.json
    python experiments/measure_load.py --gigabytes 0.1 --case bfloat16

Writes a synthetic Llama checkpoint, loads it in a child process for each case, and
prints one row each. A case is STORED[>DTYPE][,stacks][,int8][,devices=8].

Measured on a 2-core CPU, 1 GB: 1.00-1.03, and 1.09-1.14 with int8.
"""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

from absl import app, flags

CASES = (
    "bfloat16",
    "float32",
    "float32>bfloat16",
    "bfloat16,stacks",
    "bfloat16,int8",
    "bfloat16,stacks,int8",
    "bfloat16,stacks,devices=8",
)
BAND = 1.3

FLAGS = flags.FLAGS
flags.DEFINE_float("gigabytes", 1.0, "size of the checkpoint in bfloat16")
flags.DEFINE_multi_string("case", list(CASES), "what to measure")
flags.DEFINE_string("output", None, "where to write the rows as JSON")

CHILD = """
import json, re, sys, time
import jax
from jaxllm.checkpoints import load_language_model

small, large, options = json.loads(sys.argv[1])

def resident(key):
    text = open("/proc/self/status").read()
    return int(re.search(key + r":\\s+(\\d+) kB", text).group(1)) * 1024

if options.pop("stacked"):
    layers = json.load(open(large + "/config.json"))["num_hidden_layers"]
    options["stacks"] = (layers,)
# Everything that loading needs once: imports, compiled programs, thread stacks.
load_language_model(small, **options | {"stacks": None})
baseline = resident("VmRSS")
start = time.perf_counter()
lm = load_language_model(large, **options)
seconds = time.perf_counter() - start
peak = resident("VmHWM")
final = sum(
    shard.data.nbytes
    for x in jax.tree.leaves(lm.params)
    for shard in x.addressable_shards
)
print(json.dumps({"baseline": baseline, "peak": peak, "final": final,
                  "seconds": seconds, "ratio": (peak - baseline) / final}))
"""


def config(layers, width, vocabulary):
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def large_config(gigabytes):
    """About so many bytes in bfloat16, an eighth of them embeddings and head."""
    width = min(2048, max(512, int((gigabytes * 1e9 / 250) ** 0.5) // 512 * 512))
    vocabulary = 32000 * width // 2048
    layer = 4 * width**2 + 3 * width * (width * 11 // 4)
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * width) / layer))
    return config(layers, width, vocabulary)


def write_checkpoint(directory, hf_config, dtype):
    """Writes random numbers, one tensor in memory at a time."""
    import jax
    import numpy as np

    from jaxllm.checkpoints import PendingTensor, write_weights
    from jaxllm.models import make_model
    from jaxllm.models.families import family_of

    family = family_of(hf_config)
    model, shapes = make_model(family.to_config(hf_config))
    flat = {
        tuple(getattr(k, "idx", getattr(k, "key", None)) for k in keys): x
        for keys, x in jax.tree_util.tree_leaves_with_path(shapes)
    }
    stack = next(iter(shapes["stacks"]))
    one_each = next(iter(jax.tree.leaves(stack))).shape[0] == 1
    draw = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.02
    draw = draw.astype(dtype)

    pending = []
    for rule in family.rules(model.config):
        path = rule.path
        if path[0] == "layers":
            path = ("stacks", path[1] if one_each else 0, *path[2:])
            shape = flat[path].shape[1:]
        else:
            shape = flat[path].shape
        shape = shape[::-1] if rule.transpose else shape
        pending.append(
            PendingTensor(rule.source, shape, dtype, lambda s=shape: np.resize(draw, s))
        )
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config))
    write_weights(directory, pending)


def measure(case, folder, gigabytes):
    import ml_dtypes
    import numpy as np

    first, *marks = case.split(",")
    stored, _, dtype = first.partition(">")
    names = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
    # The same number of bytes, whatever the dtype that the parameters end in.
    halved = 0.5 if (dtype or stored) == "float32" else 1.0
    small, large = folder / f"small-{stored}", folder / f"large-{stored}-{halved}"
    for directory, hf_config in (
        (small, config(1, 512, 64)),
        (large, large_config(gigabytes * halved)),
    ):
        if not directory.exists():
            write_checkpoint(directory, hf_config, names[stored])
    options = {"dtype": dtype or stored, "stacked": "stacks" in marks}
    if "int8" in marks:
        options["quantize"] = "int8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    devices = re.search(r"devices=(\d+)", case)
    if devices:
        options["mesh"] = f"tensor={devices.group(1)}"
        environment["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={devices.group(1)}"
        )
    root = pathlib.Path(__file__).resolve().parent.parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([str(small), str(large), options])],
        env=environment
        | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(child.stderr[-2000:])
    return {"case": case, **json.loads(child.stdout.splitlines()[-1])}


def environment():
    import jax

    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "time": time.time(),
    }


def main(_):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in FLAGS.case:
            row = measure(case, pathlib.Path(folder), FLAGS.gigabytes)
            rows.append(row)
            print(
                f"{case:28s} final {row['final'] / 1e9:6.3f} GB, peak over baseline "
                f"{(row['peak'] - row['baseline']) / 1e9:6.3f} GB, ratio "
                f"{row['ratio']:.3f} (at most {BAND}), {row['seconds']:.1f} s",
                flush=True,
            )
    if FLAGS.output:
        content = {
            "format": 1,
            "claim": f"peak memory of loading <= {BAND} x final parameters",
            "paper": None,
            "rows": rows,
            "environment": environment(),
        }
        pathlib.Path(FLAGS.output).write_text(json.dumps(content, indent=2))
    if any(row["ratio"] > BAND for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)

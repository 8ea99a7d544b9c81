"""`jaxllm doctor`: what is installed, what it runs on, and if it computes right."""

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxllm.cli.options import Flag
from jaxllm.version import __version__

if TYPE_CHECKING:
    from jaxllm.api import LanguageModel

__all__ = ["FLAGS", "SUMMARY", "run"]

SUMMARY = """show versions and devices, and test that this machine computes right

  jaxllm doctor
  jaxllm doctor --model DIRECTORY

Ends with 1 when a self-test fails. Its output belongs into a bug report.
"""

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "absl-py",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "transformers",
    "huggingface_hub",
    "jinja2",
    "sentencepiece",
    "protobuf",
    "matplotlib",
    "tqdm",
    "libtpu",
    "jax-cuda13-plugin",
)
_OPTIONAL = ("libtpu", "jax-cuda13-plugin")
_VARIABLES = (
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_FLAGS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)


FLAGS = (
    Flag("model", None, "also load this model and show its configuration and arrays"),
    Flag("dtype", "bfloat16", "dtype that --model is loaded in"),
)


def run(values: flags.FlagValues) -> int:
    """Runs the command.

    Returns:
      0, or 1 when a self-test failed.

    Raises:
      UserError: The model cannot be loaded.
    """
    from jaxllm import api
    from jaxllm.cli.self_tests import SELF_TESTS

    api.cache_compiles()
    for title, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("compile cache", _compile_cache()),
        ("environment", _environment()),
        ("kernels", _kernels()),
    ):
        _print_section(title, lines)
    failed = []
    print("self-tests")
    for name, test in SELF_TESTS.items():
        try:
            test()
        except Exception as error:  # Whatever goes wrong is the finding.
            failed.append(name)
            reason = " ".join(str(error).split())[:300]
            print(f"  FAILED  {name}: {type(error).__name__}: {reason}")
        else:
            print(f"  ok      {name}")
        sys.stdout.flush()
    if values.model is not None:
        lm = api.load(values.model, dtype=values.dtype)
        _print_section("configuration", _configuration(lm))
        _print_section("parameters", _parameters(lm))
    return 1 if failed else 0


def _print_section(title: str, lines: Iterator[str]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")
    sys.stdout.flush()


def _versions() -> Iterator[str]:
    yield f"jaxllm {__version__}"
    yield f"python {platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            if name not in _OPTIONAL:
                yield f"{name} is not installed"


def _devices() -> Iterator[str]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        # That there is none is what this command is run for.
        yield f"none: {' '.join(str(error).split())[:300]}"
        return
    for device in devices:
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        memory = f", {limit / 1e9:.1f} GB" if limit else ""
        yield f"{device.platform}:{device.id} {device.device_kind}{memory}"
    yield f"process {jax.process_index()} of {jax.process_count()}"


def _compile_cache() -> Iterator[str]:
    import jax

    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder is None:
        yield "off: the home folder cannot be written"
        return
    files = [path for path in Path(folder).glob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    yield f"{folder}: {len(files)} files, {size / 1e6:.1f} MB"


def _environment() -> Iterator[str]:
    found = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    yield from found or ["none of the variables that matter is set"]


def _kernels() -> Iterator[str]:
    """Yields what every op runs here, and why where that is not its kernel."""
    from pallas_kernels import dispatch

    for row in dispatch.report():
        reason = f": {row['reason']}" if row["reason"] else ""
        yield f"{row['op']} {row['implementation']}{reason}"


def _configuration(lm: "LanguageModel") -> Iterator[str]:
    import jax.numpy as jnp

    for field in dataclasses.fields(lm.config):
        yield f"{field.name}: {getattr(lm.config, field.name)}"
    policy = lm.model.policy
    for name in ("params", "compute", "cache"):
        yield f"dtype of {name}: {jnp.dtype(getattr(policy, name)).name}"
    yield f"end tokens: {lm.generation.eos_ids}"
    if lm.tokenizer is None:
        yield "tokenizer: none"
    else:
        chat = "with" if lm.tokenizer.chat_template else "without"
        yield f"tokenizer: {lm.tokenizer.vocab_size} ids, {chat} a chat template"


def _parameters(lm: "LanguageModel") -> Iterator[str]:
    """Yields a line for every array, equal stacks in a row shown once."""
    groups: list[tuple[int, int, list[str]]] = []
    total = 0
    for index, stack in enumerate(lm.params["stacks"]):
        lines, size = _arrays(stack)
        total += size
        if groups and groups[-1][2] == lines:
            groups[-1] = (groups[-1][0], index, lines)
        else:
            groups.append((index, index, lines))
    rest = {name: tree for name, tree in lm.params.items() if name != "stacks"}
    lines, size = _arrays(rest)
    total += size
    yield from lines
    for first, last, lines in groups:
        where = f"stacks/{first}" if first == last else f"stacks/{first}..{last}, each"
        yield where
        yield from (f"  {line}" for line in lines)
    yield f"{total} bytes in all"


def _arrays(tree: Any) -> tuple[list[str], int]:
    import jax

    from jaxllm.core import Leaf

    found = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Leaf)
    )
    lines = []
    for path, array in found:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = array.dtype if hasattr(array, "dtype") else type(array).__name__
        lines.append(f"{name}: {kind}{list(array.shape)}, {array.nbytes} bytes")
    return lines, sum(array.nbytes for _, array in found)


if __name__ == "__main__":
    from jaxllm.cli.main import main

    sys.exit(main(["doctor", *sys.argv[1:]]))

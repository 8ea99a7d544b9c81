"""Compiling for TPUs that are not here.

The TPU compiler is part of libtpu and needs no TPU; but it is chosen before jax starts,
so it runs in a child process, which `in_compiler` starts with the environment that it
wants. Nothing has to be set by a user.

Trust the bytes: they are the compiler's own plan for one device. Its counts of
operations are of no use here, since it counts what a loop does once.
"""

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.analysis.hardware import Slice
from jaxllm.core import errors
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.models import DecoderConfig

__all__ = ["Compilation", "compile_ahead", "in_compiler", "topology_devices"]

_ENVIRONMENT = {
    # The compiler asks a machine of the cloud what it is; here nobody answers.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Without a TPU there is nothing that two processes could fight for.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    # A program for absent hardware cannot be read back from the cache.
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}
_HOST_CHIPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """A program of a model for some hardware.

    Attributes:
      config: The model's architecture.
      machine: TPUs.
      phase: `"decode"`, the whole decode loop; `"prefill"`, running prompts chunk by
        chunk; `"train"`, a step of AdamW.
      mesh: As for `analysis.analyze`.
      method: Of the decode loop, as `--decode` takes it.
      rows: B.
      context: Slots of a row, or tokens of a row in training.
      chunk: Tokens of a row that a forward of the prefill runs.
      dtype: Of parameters and activations; training keeps float32 parameters.
      cache_dtype: Of keys and values; `dtype` when None.
      quantize: As for `make_target`.
      remat: As in `Model`, for training.
      name: What the model is called.
    """

    config: DecoderConfig
    machine: Slice
    phase: str = "decode"
    mesh: str | None = None
    method: str = "autoregressive"
    rows: int = 1
    context: int = 1024
    chunk: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    quantize: str | None = None
    remat: str = "full"
    name: str = ""


def compile_ahead(compilations: Sequence[Compilation]) -> Iterator[dict[str, Any]]:
    """Compiles programs for absent hardware, one after another.

    Args:
      compilations: What to compile.

    Yields:
      For each, figures of one device, in bytes: `argument_bytes` (parameters, cache
      and the rest of the state), `temp_bytes`, `output_bytes`, `alias_bytes` (of the
      output, what takes the arguments' place), `code_bytes`, `peak_bytes` (all of it),
      `memory_bytes` (what the device has), `cache_bytes`; `largest_copy_bytes`;
      `collectives`, a list of `kind`, `loop_depth`, `in_loop`, `count`, `bytes` and
      `largest_bytes`; `kernels` by name; `devices`; `compile_seconds`.

    Raises:
      CapacityError: The program does not fit into a device's memory.
      UserError: libtpu is missing, the topology unknown, or the mesh does not divide.
    """
    for compilation in compilations:
        if not compilation.machine.hardware.is_tpu:
            raise ConfigError(
                f"cannot compile: {compilation.machine.name} is no TPU, expected one "
                "of v4, v5e, v5p, v6e, tpu7x with --compile. Leave out --compile."
            )
    yield from in_compiler("jaxllm.analysis.programs:compile_program", compilations)


def in_compiler(function: str, arguments: Sequence[Any]) -> Iterator[Any]:
    """Calls a function for each argument in a process that has the TPU compiler.

    Args:
      function: `"module:name"` of a function from an argument to plain data as JSON
        has it; it may raise a `UserError`.
      arguments: Anything that pickles.

    Yields:
      What the function returned, one after another.

    Raises:
      UserError: libtpu is not installed, or the function raised it.
      CapacityError: A program does not fit into the memory of the device.
      RuntimeError: The process failed otherwise.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "cannot compile: libtpu is not installed, expected the TPU compiler, which "
            "needs no TPU. Install jaxllm[aot]."
        )
    paths = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxllm.analysis.compiler_process"],
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            pickle.dump((function, list(arguments)), child.stdin)
            child.stdin.close()
            done = 0
            for line in child.stdout:
                done += 1
                yield _answer(json.loads(line))
        except BrokenPipeError:
            pass  # It has ended; its log says why.
        except BaseException:
            # A mistake, or nobody wants the other answers.
            child.kill()
            raise
        finally:
            child.stdout.close()
            code = child.wait()
        if code or done < len(arguments):
            log.seek(0)
            tail = log.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"the compiler's process ended with {code}: {tail}")


def _answer(message: dict[str, Any]) -> Any:
    if "result" in message:
        return message["result"]
    if message["kind"] is None:
        raise RuntimeError(f"cannot compile: {message['error']}")
    raise getattr(errors, message["kind"])(message["error"])


def topology_devices(machine: Slice) -> list[Any]:
    """Returns the devices of TPUs that are not here; only in the compiler's process.

    Args:
      machine: The TPUs.

    Raises:
      ConfigError: The compiler knows no such arrangement.
    """
    import jax
    from jax.experimental import topologies

    hardware, shape = machine.hardware, machine.topology
    options: dict[str, Any] = {}
    if hardware.name == "v4":
        # Both cores of a chip as one device, as on the machines of the cloud.
        options["chip_config_name"] = "megacore"
    if any(size % 2 for size in shape[:2]):
        # The compiler's host has 2x2 chips; smaller machines are one host.
        if machine.chips > _HOST_CHIPS:
            raise _unknown_topology(machine.name, "multiples of 2x2 chips")
        options["chips_per_host_bounds"] = [*shape, 1][:3]
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.name, **options
        )
    except jax.errors.JaxRuntimeError as cause:
        reason = str(cause).splitlines()[0][:200]
        raise _unknown_topology(machine.name, f"what it knows ({reason})") from None
    return list(topology.devices)


def _unknown_topology(name: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"cannot compile: the TPU compiler has no topology {name}, expected {wanted}. "
        "Correct --hardware."
    )

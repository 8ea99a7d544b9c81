"""Which implementation of an op runs: by name, or by device and shape.

The device is the one that a program is traced for: that of the current mesh, also
when such devices are only described (`jax.experimental.topologies`), else that of the
default backend.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

__all__ = [
    "GENERATIONS",
    "OPS",
    "Target",
    "blocks",
    "choose",
    "interpret_mode",
    "report",
    "target",
]

OPS: dict[str, tuple[str, ...]] = {
    "merge_lse": ("reference",),
    "decode_attention": ("reference", "tpu"),
    "prefix_attention": ("reference", "tpu"),
    "flash_attention": ("reference", "tpu"),
    "quant_matmul": ("reference", "tpu"),
    "grouped_matmul": ("reference", "tpu"),
    "codebook_matmul": ("reference", "tpu"),
}
"""The implementations that each op has; a TPU kernel can be interpreted anywhere."""

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}

GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
"""The TPU generations that the kernels are compiled for."""

_NAMES = ("reference", "tpu", "gpu", "interpret")
_TUNING = pathlib.Path(__file__).with_name("tuning")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      generation: One of `GENERATIONS` on a TPU; None where it is not known.
      kind: The device's own name, such as "TPU v5 lite" or "NVIDIA H200".
      partitioned: Whether the compiler is to split the program over devices, which
        it cannot do with a kernel: some mesh axis is longer than 1 and not manual.
    """

    platform: str
    generation: str | None = None
    kind: str = ""
    partitioned: bool = False


def target() -> Target:
    """Returns the device that is traced for; asks for devices only without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        platform, kind = device.platform, device.device_kind
    else:
        platform = jax.default_backend()
        kind = "" if platform == "cpu" else jax.local_devices()[0].device_kind
    if platform in ("cuda", "rocm"):
        platform = "gpu"
    manual = jax.sharding.AxisType.Manual
    partitioned = any(
        size > 1 and kind_of_axis != manual
        for size, kind_of_axis in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    return Target(platform, _KINDS.get(kind), kind, partitioned)


def choose(op: str, implementation: str | None, shape: Any) -> str:
    """Returns the implementation that a call runs.

    Args:
      op: A key of `OPS`.
      implementation: "reference", "tpu", "gpu", "interpret" (the TPU kernel on any
        device, slowly), or None: the kernel of the device that is traced for, else
        the reference.
      shape: The call's `Shape`, of the op's `shapes` module.

    Returns:
      One of the four names.

    Raises:
      ValueError: No implementation has that name, or it cannot run this shape.
      NotImplementedError: The op has no such kernel, or the device is another one.
    """
    if implementation == "reference":
        return implementation
    here = target()
    if implementation is None:
        return here.platform if _obstacle(op, shape, here) is None else "reference"
    if implementation not in _NAMES:
        raise ValueError(
            f"{op}: implementation {implementation!r}, expected one of "
            f"{', '.join(_NAMES)} or None."
        )
    platform = "tpu" if implementation == "interpret" else implementation
    if platform not in OPS[op]:
        raise NotImplementedError(
            f"{op}: there is no {platform} kernel. Use implementation=None."
        )
    if implementation == "interpret":
        here = Target("tpu")
    elif platform != here.platform:
        raise NotImplementedError(
            f"{op}: the {platform} kernel cannot run on {here.platform}. Use "
            "implementation=None, or set a mesh of the devices to compile for."
        )
    reason = _obstacle(op, shape, here)
    if reason is not None:
        raise ValueError(f"{op}: {reason}. Use implementation=None.")
    return implementation


def _obstacle(op: str, shape: Any, here: Target) -> str | None:
    """Returns why the kernel for a device cannot run, or None."""
    if here.platform not in OPS[op]:
        return f"there is no {here.platform} kernel"
    if here.partitioned:
        return (
            "a kernel is not split over devices by the compiler; "
            "call it inside jax.shard_map"
        )
    return _shapes(op).obstacle(shape, here)


def _shapes(op: str) -> Any:
    return importlib.import_module(f"pallas_kernels.{op}.shapes")


def report() -> list[dict[str, str]]:
    """Returns what each op takes on this device for the shapes it is tested with.

    Returns:
      A dict per op: `op`, `implementation` ("tpu", "gpu", "reference", or two of them
      where it depends on the shape) and `reason`, empty where the kernel always runs.
    """
    here = target()
    rows = []
    for op in OPS:
        reasons = [_obstacle(op, shape, here) for shape in _shapes(op).SHAPES]
        taken = {here.platform if r is None else "reference" for r in reasons}
        rows.append(
            {
                "op": op,
                "implementation": " or ".join(sorted(taken, reverse=True)),
                "reason": "; ".join(sorted({r for r in reasons if r is not None})),
            }
        )
    return rows


def blocks(op: str, key: str, defaults: Mapping[str, int]) -> dict[str, int]:
    """Returns block sizes: what was measured on this kind of device, else defaults.

    Args:
      op: A key of `OPS`.
      key: What the sizes depend on, as the op writes it, such as "bfloat16:128".
      defaults: Sizes by name where nothing was measured.
    """
    return {**defaults, **_table(target().kind).get(op, {}).get(key, {})}


@functools.cache
def _table(kind: str) -> dict[str, dict[str, dict[str, int]]]:
    """Returns `tuning/<kind>.json`: op, key, block name, size; empty without one."""
    path = _TUNING / (re.sub(r"[^a-z0-9]+", "_", kind.lower()) + ".json")
    return json.loads(path.read_text()) if kind and path.is_file() else {}


def interpret_mode(chosen: str) -> Any:
    """Returns `pallas_call`'s `interpret` for what `choose` returned.

    Interpreted kernels see NaN wherever a TPU's memory would be uninitialised.
    """
    return pltpu.InterpretParams() if chosen == "interpret" else False

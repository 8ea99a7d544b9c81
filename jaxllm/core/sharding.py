"""Logical axis names, the mesh, and the one table that joins them.

Parameters and activations name their axes by meaning (`"embed"`, `"heads"`); only
`ShardingRules` knows which mesh axis each of them is split over. The same program
runs on one device and on a pod.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.core.errors import ConfigError, ShardingError

__all__ = [
    "MESH_AXES",
    "ShardingRules",
    "constrain",
    "fetch",
    "make_mesh",
    "parse_mesh",
]

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes a logical axis is split over.

    Attributes:
      table: Pairs of a logical name and the mesh axes that split it. A name that is
        absent is replicated.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("batch", ("data", "fsdp")),
        ("embed", ("fsdp",)),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("ffn", ("tensor",)),
        ("vocab", ("tensor",)),
        ("experts", ("expert",)),
        ("kv_sequence", ("sequence",)),
        ("tokens", ("sequence",)),
    )

    def spec(
        self, names: Sequence[str | None], shape: Sequence[int], mesh: Any
    ) -> PartitionSpec:
        """Returns how an array is split over a mesh.

        Args:
          names: Logical name of each axis, None for replicated.
          shape: Sizes of the same axes. A mesh axis that does not divide its size is
            left out, so that axis is replicated; `check` is the strict form.
          mesh: Concrete or abstract mesh.

        Returns:
          The partition spec, naming each mesh axis at most once.
        """
        if len(names) != len(shape):
            raise ShardingError(
                f"cannot shard: axes {tuple(names)} have rank {len(names)}, expected "
                f"{len(shape)} for shape {tuple(shape)}. Name every axis."
            )
        table, used = dict(self.table), set[str]()
        entries: list[Any] = []
        for name, size in zip(names, shape, strict=True):
            chosen: list[str] = []
            for axis in table.get(name, ()) if name else ():
                ways = mesh.shape.get(axis, 1)
                total = math.prod(mesh.shape[a] for a in chosen) * ways
                if ways > 1 and axis not in used and size % total == 0:
                    chosen.append(axis)
                    used.add(axis)
            entries.append(
                (tuple(chosen) if chosen[1:] else chosen[0]) if chosen else None
            )
        return PartitionSpec(*entries)

    def sharding(
        self, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh
    ) -> NamedSharding:
        """Returns `spec` bound to a concrete mesh."""
        return NamedSharding(mesh, self.spec(names, shape, mesh))

    def check(self, sizes: Mapping[str, int], mesh: Mesh) -> None:
        """Checks that a mesh divides a model's axes, before anything is compiled.

        Args:
          sizes: Size of each logical axis, such as `{"heads": 32, "ffn": 11008}`.
          mesh: The mesh to be used.

        Raises:
          ShardingError: A mesh axis does not divide the axis that it should split.
        """
        for name, axes in self.table:
            ways = math.prod(mesh.shape.get(axis, 1) for axis in axes)
            if name in sizes and sizes[name] % ways:
                raise ShardingError(
                    f"cannot shard: axis {name!r} has size {sizes[name]}, expected a "
                    f"multiple of {ways} (mesh axes {', '.join(axes)}). Choose mesh "
                    f"sizes that divide it."
                )


def constrain(
    x: Array, names: Sequence[str | None], rules: ShardingRules | None
) -> Array:
    """Constrains an activation's sharding by logical names.

    Without rules, or outside `jax.set_mesh`, the array is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(names, x.shape, mesh))


def fetch(tree: Any) -> Any:
    """Returns arrays as numpy on every process, wherever their parts lie.

    Every process has to call it, for parts are exchanged where one lacks them.
    """

    def is_here(x: Any) -> bool:
        return not isinstance(x, Array) or x.is_fully_addressable

    if all(is_here(x) or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def parse_mesh(text: str) -> dict[str, int]:
    """Parses `"data=2,tensor=4"`; one size may be -1, which fills the devices.

    Raises:
      ConfigError: The text is malformed or names an unknown axis.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in MESH_AXES or name in sizes:
            raise ConfigError(
                f"cannot parse mesh: {part!r} in {text!r}, expected distinct axes of "
                f"{', '.join(MESH_AXES)}. Write for example data=1,tensor=4."
            )
        try:
            sizes[name] = int(value)
        except ValueError:
            sizes[name] = 0
        if sizes[name] == 0 or sizes[name] < -1:
            raise ConfigError(
                f"cannot parse mesh: {part!r} in {text!r}, expected a positive size "
                f"or -1. Write for example data=1,tensor=4."
            )
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(
            f"cannot parse mesh: {text!r} has several sizes of -1, expected at most "
            f"one. Give the others."
        )
    return sizes


def make_mesh(
    sizes: str | Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a mesh with the project's five axes, absent ones of size 1.

    Args:
      sizes: `"data=2,tensor=4"`, a mapping, or None for one device.
      devices: Devices to use; all of the process's when None.

    Returns:
      A mesh whose axes are Auto: sharding is propagated by the compiler.

    Raises:
      ConfigError: The sizes name an unknown axis, or one is not positive or -1.
      ShardingError: The sizes need another number of devices than there are.
    """
    if not isinstance(sizes, str):
        sizes = ",".join(f"{axis}={size}" for axis, size in (sizes or {}).items())
    sizes = parse_mesh(sizes)
    devices = list(devices or jax.devices())
    known = math.prod(n for n in sizes.values() if n != -1)
    full = {a: sizes.get(a, 1) for a in MESH_AXES}
    for axis, size in full.items():
        if size == -1:
            full[axis] = max(1, len(devices) // known)
    needed = math.prod(full.values())
    if -1 in sizes.values() and needed != len(devices):
        raise ShardingError(
            f"cannot make mesh: {sizes} has sizes whose product is {known}, expected a "
            f"divisor of {len(devices)}, the devices to fill. Choose other sizes."
        )
    if needed > len(devices):
        raise ShardingError(
            f"cannot make mesh: {sizes} needs {needed} devices, expected at most "
            f"{len(devices)}, which is what there is. Choose smaller sizes."
        )
    held = {device.process_index for device in devices[:needed]}
    if len(held) < len({device.process_index for device in devices}):
        raise ShardingError(
            f"cannot make mesh: {sizes} takes {needed} of {len(devices)} devices, "
            f"which leaves a process without any, expected some of each. Choose larger "
            f"sizes, or start fewer processes."
        )
    # A mesh axis need not be an axis of the machine: 4x4 chips serve two by eight.
    arranged = mesh_utils.create_device_mesh(
        tuple(full.values()), devices[:needed], allow_split_physical_axes=True
    )
    return Mesh(arranged, tuple(full), axis_types=(AxisType.Auto,) * len(full))

"""How long a pass takes at least, and what it waits for.

A device does an operator in the time of its arithmetic or of its bytes, whichever is
longer, at the peak rates of its datasheet; what it sends to others comes on top. It is
a model, not a measurement: no program is faster.

Letters: B rows, T new tokens of a row, M draft nodes, S keys.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxllm.analysis.architectures import Target
from jaxllm.analysis.hardware import Hardware, Slice
from jaxllm.analysis.operators import (
    Operator,
    Workload,
    abstract_mesh,
    count,
    layout,
    shard_bytes,
)
from jaxllm.core.sharding import ShardingRules
from jaxllm.decoding.payoff import Roofline

__all__ = [
    "Cost",
    "Report",
    "analyze",
    "breakeven_T",
    "payoff_roofline",
    "sweep",
    "verify_costs",
]


@dataclasses.dataclass(frozen=True)
class Cost:
    """An operator and the least time that it takes.

    Attributes:
      operator: What is done.
      compute_seconds: Of its arithmetic.
      memory_seconds: Of its bytes.
      sent_seconds: Of what is sent to other devices.
    """

    operator: Operator
    compute_seconds: float
    memory_seconds: float
    sent_seconds: float

    @property
    def seconds(self) -> float:
        """Least time; nothing is sent while something is computed."""
        return max(self.compute_seconds, self.memory_seconds) + self.sent_seconds

    @property
    def bound(self) -> str:
        """What takes longest: `"compute"`, `"memory"` or `"interconnect"`."""
        times = {
            "memory": self.memory_seconds,
            "compute": self.compute_seconds,
            "interconnect": self.sent_seconds,
        }
        return max(times, key=times.__getitem__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One pass on some hardware; every figure is that of one device.

    Attributes:
      model: The model's name.
      slice: The hardware.
      device: A device of it: a chip, or its share of one.
      mesh: Size of every mesh axis that is not 1.
      workload: The pass.
      costs: One for each operator.
      parameter_bytes: Parameters that the device holds.
      cache_bytes: Keys and values of all its rows.
      state_bytes: What training keeps beside parameters: gradients and two moments.
    """

    model: str
    slice: Slice
    device: Hardware
    mesh: Mapping[str, int]
    workload: Workload
    costs: tuple[Cost, ...]
    parameter_bytes: int
    cache_bytes: int
    state_bytes: int

    @property
    def seconds(self) -> float:
        """Least time of the pass."""
        return math.fsum(cost.seconds for cost in self.costs)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the whole machine runs through the model in a second."""
        return self.workload.rows * self.workload.tokens / self.seconds

    @property
    def needed_bytes(self) -> int:
        """Least memory; activations and whatever else a program needs come on top."""
        return self.parameter_bytes + self.cache_bytes + self.state_bytes

    @property
    def fits(self) -> bool:
        """Whether the device's memory holds that."""
        return self.needed_bytes <= self.device.memory_bytes

    @property
    def bound(self) -> str:
        """What most of the time is spent waiting for."""
        shares = dict.fromkeys(("memory", "compute", "interconnect"), 0.0)
        for cost in self.costs:
            shares["interconnect"] += cost.sent_seconds
            more = cost.compute_seconds > cost.memory_seconds
            shares["compute" if more else "memory"] += cost.seconds - cost.sent_seconds
        return max(shares, key=shares.__getitem__)

    def total(self, field: str) -> float:
        """Returns the sum of a number of `Operator` over all operators."""
        return math.fsum(getattr(cost.operator, field) for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data; bytes, seconds and operations."""
        hardware = self.slice.hardware
        return {
            "model": self.model,
            "hardware": {
                "name": self.slice.name,
                "chips": self.slice.chips,
                "devices_per_chip": hardware.devices_per_chip,
                "source": hardware.source,
                "date": hardware.date,
                "device": {
                    "memory_bytes": self.device.memory_bytes,
                    "bandwidth": self.device.bandwidth,
                    "interconnect": self.device.interconnect,
                    "peaks": dict(self.device.peaks),
                },
            },
            "mesh": dict(self.mesh),
            "workload": dataclasses.asdict(self.workload)
            | {"tokens": self.workload.tokens},
            "operators": [_row(cost) for cost in self.costs],
            "total": {
                **{name: self.total(name) for name in _NUMBERS},
                "seconds": self.seconds,
                "tokens_per_second": self.tokens_per_second,
                "bound": self.bound,
            },
            "memory": {
                "parameter_bytes": self.parameter_bytes,
                "cache_bytes": self.cache_bytes,
                "state_bytes": self.state_bytes,
                "needed_bytes": self.needed_bytes,
                "fits": self.fits,
            },
            "kind": "model, not measurement",
        }


_NUMBERS = (
    "flops",
    "weight_bytes",
    "activation_bytes",
    "kv_read_bytes",
    "kv_written_bytes",
    "sent_bytes",
)


def _row(cost: Cost) -> dict[str, Any]:
    operator = cost.operator
    return {
        **dataclasses.asdict(operator),
        "intensity": operator.intensity,
        "compute_seconds": cost.compute_seconds,
        "memory_seconds": cost.memory_seconds,
        "sent_seconds": cost.sent_seconds,
        "seconds": cost.seconds,
        "bound": cost.bound,
    }


def analyze(
    target: Target,
    workload: Workload,
    machine: Slice,
    mesh: str | AbstractMesh | None = None,
) -> Report:
    """Predicts one pass of a model.

    Args:
      target: The model, with its leaf types; shapes suffice.
      workload: The pass.
      machine: The hardware.
      mesh: How its devices are arranged: `"data=2,tensor=4"`; tensor parallelism over
        all of them when None.

    Returns:
      Least times of every operator, on one device.

    Raises:
      ShardingError: The mesh does not fill the machine, or does not divide the model.

    Source: Roofline (Williams et al. 2009); LLM Inference Unveiled (arXiv 2402.16363).
    """
    if not isinstance(mesh, AbstractMesh):
        mesh = abstract_mesh(mesh, machine.devices)
    device = machine.hardware.device()
    operators = count(target, workload, mesh)
    shardings = layout(target, mesh)
    held = shard_bytes(target.params, shardings)
    train = workload.phase == "train"
    state = 12 * _elements(target.params, shardings) if train else 0
    return Report(
        model=target.name,
        slice=machine,
        device=device,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        workload=workload,
        costs=tuple(_cost(operator, device) for operator in operators),
        parameter_bytes=held,
        cache_bytes=0 if train else _cache_bytes(target, workload, mesh),
        state_bytes=state,
    )


def _cost(operator: Operator, device: Hardware) -> Cost:
    sent = operator.sent_bytes
    return Cost(
        operator,
        operator.flops / device.peak(operator.dtype),
        operator.bytes / device.bandwidth,
        sent / device.interconnect if sent else 0.0,
    )


def _elements(tree: Any, shardings: Any) -> int:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) for x, s in pairs)


def _cache_bytes(target: Target, workload: Workload, mesh: Any) -> int:
    """Returns what keys and values take on a device, a shared prefix once."""
    rules, head_dim = ShardingRules(), target.config.attention.head_dim
    total = 0
    for stack in target.params["stacks"]:
        layers, _, width = stack["attention"]["key"]["kernel"].shape
        shared = workload.shared_prefix
        for rows, slots in ((workload.rows, workload.context - shared), (1, shared)):
            shape = (layers, rows, width // head_dim, slots, head_dim)
            names = (None, "batch", "kv_heads", "kv_sequence", None)
            local = rules.sharding(names, shape, mesh).shard_shape(shape)
            total += 2 * math.prod(local)
    return total * jnp.dtype(target.model.policy.cache).itemsize


def sweep(
    target: Target,
    workloads: Iterable[Workload],
    machine: Slice,
    mesh: str | None = None,
) -> list[Report]:
    """Predicts several passes; arguments as for `analyze`."""
    return [analyze(target, workload, machine, mesh) for workload in workloads]


def verify_costs(
    target: Target,
    workload: Workload,
    machine: Slice,
    widths: Sequence[int],
    mesh: str | None = None,
) -> dict[int, float]:
    """Returns the cost of a verifying pass by its number of nodes.

    Args:
      target: The model.
      workload: A decoding pass; only its phase and nodes are replaced.
      machine: The hardware.
      widths: Numbers of nodes M, up to the context.
      mesh: As for `analyze`.

    Returns:
      M to time relative to one node: what `decoding.payoff.plan` takes as `costs`.
    """
    sized = {
        nodes: dataclasses.replace(workload, phase="verify", nodes=nodes)
        for nodes in {1, *widths}
    }
    seconds = {
        nodes: analyze(target, each, machine, mesh).seconds
        for nodes, each in sized.items()
    }
    return {nodes: seconds[nodes] / seconds[1] for nodes in widths}


def payoff_roofline(
    target: Target, machine: Slice, rows: int = 1, dtype: str = "bfloat16"
) -> Roofline:
    """Returns the weights-only roofline that drafting is planned with.

    Args:
      target: The model; the bytes of a weight are those of its leaves.
      machine: The hardware; its devices share weights and work alike.
      rows: B.
      dtype: Of the products.
    """
    device = machine.hardware.device()
    weights = [
        weight
        for stack in target.params["stacks"]
        for block in ("attention", "mlp")
        for name, weight in _kernels(stack[block])
    ]
    held = sum(_tree_bytes(weight) for weight in weights)
    return Roofline(
        flops=device.peak(dtype),
        bandwidth=device.bandwidth,
        weight_bytes=held / sum(math.prod(weight.shape) for weight in weights),
        rows=rows,
    )


def _kernels(block: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, part["kernel"]) for name, part in block.items() if "kernel" in part]


def _tree_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def breakeven_T(
    hardware: Hardware, weight_bytes: float, rows: int = 1, dtype: str = "bfloat16"
) -> float:
    """Returns the tokens of a row at which a pass stops being free of width.

    Args:
      hardware: The chip.
      weight_bytes: Bytes of a weight: 2, 1 for int8, 0.5 for int4.
      rows: B.
      dtype: Of the products.

    Returns:
      T at which the arithmetic of a weight takes as long as reading it; below 1 where
      the batch alone keeps the device busy.
    """
    line = Roofline(
        flops=hardware.peak(dtype),
        bandwidth=hardware.bandwidth,
        weight_bytes=weight_bytes,
    )
    return line.ridge / rows

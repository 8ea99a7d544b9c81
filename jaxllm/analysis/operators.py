"""What one pass of a model computes and moves, operator by operator, on one device.

Counted are products, and the bytes of weights, activations and cached keys and values
when every operator reads its operands from memory once and writes its result once.
Attention counts as one fused operator whose scores never reach memory. Left out, being
small beside the rest: softmax, rotation, dequantization, sampling.

Letters: B rows, T new tokens of a row, S keys that its last token sees, P shared
prefix, D width, F ffn, V vocabulary, L layers, N query heads, K kv heads, H head dim.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxllm.analysis.architectures import Target
from jaxllm.core.einsum import Leaf, unwrapped
from jaxllm.core.errors import ConfigError, ShardingError
from jaxllm.core.sharding import MESH_AXES, ShardingRules, parse_mesh
from jaxllm.models.sharding import param_shardings

__all__ = [
    "PHASES",
    "Operator",
    "Workload",
    "abstract_mesh",
    "count",
    "layout",
    "shard_bytes",
]

PHASES = ("decode", "prefill", "verify", "train")

_NORM_OPERATIONS = 4  # an element: square, add, scale by the root, scale by the weight
_PASSES = 3  # of a training step: forward, and backward to activations and to weights
_ADAM_BYTES = 32  # a float32 parameter: it, its gradient and two moments, in and out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One pass over a batch.

    Attributes:
      phase: `"decode"`, one token a row; `"verify"`, several nodes of a draft a row;
        `"prefill"`, whole prompts at once; `"train"`, a step on whole rows.
      rows: B, over all devices.
      context: S, the new tokens included.
      nodes: T of `"verify"`.
      shared_prefix: P, how many of the S tokens all rows share and store once.
      masked_too: Whether to count the products that a mask hides, which only a fused
        kernel leaves out.
      all_logits: Whether `"prefill"` computes the logits of every token, not only the
        last of each row.
    """

    phase: str = "decode"
    rows: int = 1
    context: int = 1024
    nodes: int = 1
    shared_prefix: int = 0
    masked_too: bool = False
    all_logits: bool = False

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise _wrong("phase", self.phase, f"one of {', '.join(PHASES)}")
        for name in ("rows", "context", "nodes"):
            if getattr(self, name) < 1:
                raise _wrong(name, getattr(self, name), "1 or more")
        if self.tokens > self.context:
            raise _wrong("context", self.context, f"{self.tokens} or more")
        most = self.context - self.tokens
        if not 0 <= self.shared_prefix <= most:
            raise _wrong("shared_prefix", self.shared_prefix, f"0 to {most}")

    @property
    def tokens(self) -> int:
        """T."""
        if self.phase == "verify":
            return self.nodes
        return 1 if self.phase == "decode" else self.context

    @property
    def cached(self) -> int:
        """Keys of a row that an earlier pass has left in the cache."""
        return self.context - self.tokens

    @property
    def logits(self) -> int:
        """Tokens of a row whose logits are computed."""
        only_last = self.phase == "prefill" and not self.all_logits
        return 1 if only_last else self.tokens


def _wrong(name: str, found: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"cannot analyze: {name} is {found!r}, expected {wanted}. Correct it."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of all layers together, on one device.

    Attributes:
      name: Such as `query` or `attention`.
      dtype: Of the operands of its products.
      flops: Operations; a multiplication and an addition are two.
      weight_bytes: Read of parameters.
      activation_bytes: Read and written of activations.
      kv_read_bytes: Read of the cache.
      kv_written_bytes: Written to it.
      sent_bytes: Sent to other devices.
    """

    name: str
    dtype: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    kv_read_bytes: float = 0.0
    kv_written_bytes: float = 0.0
    sent_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes to and from the device's own memory."""
        moved = self.weight_bytes + self.activation_bytes
        return moved + self.kv_read_bytes + self.kv_written_bytes

    @property
    def intensity(self) -> float | None:
        """Operations a byte; None where no byte is moved."""
        return self.flops / self.bytes if self.bytes else None


def abstract_mesh(text: str | None, devices: int) -> AbstractMesh:
    """Returns a mesh of devices that need not exist.

    Args:
      text: `"data=2,tensor=4"`, as `core.sharding.parse_mesh` takes it; all devices on
        the axis `tensor` when None.
      devices: How many there are; the sizes have to fill them.

    Raises:
      UserError: The text is malformed, or its product is not that number.
    """
    sizes = parse_mesh(f"tensor={devices}" if text is None else text)
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {n: max(1, devices // known) if s == -1 else s for n, s in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ShardingError(
            f"cannot make mesh: {text!r} fills {math.prod(sizes.values())} devices, "
            f"expected {devices}, which is what the hardware has. Correct --mesh or "
            "--hardware."
        )
    full = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(full, MESH_AXES, axis_types=(AxisType.Auto,) * len(full))


def layout(target: Target, mesh: Any) -> Any:
    """Returns the sharding of every parameter over a mesh, which may be abstract."""
    return param_shardings(target.model, target.params, mesh, target.model.rules)


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Returns the bytes that one device holds of a tree of shapes."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def count(target: Target, workload: Workload, mesh: AbstractMesh) -> list[Operator]:
    """Counts the operators of one pass.

    Args:
      target: The model.
      workload: The pass.
      mesh: Devices; the figures are those of one of them.

    Returns:
      The operators, in the order of the forward.

    Raises:
      ShardingError: The mesh does not divide the model.

    Source: LLM Inference Unveiled (arXiv 2402.16363), section 2, for the method.

    Differs from the paper: weights count the bytes of their arrays, scales included;
      keys and values are counted by kv heads and once for a shared prefix; queries see
      no later keys; collectives are counted. The mesh axes `expert` and `sequence`
      split nothing: the models have no experts, and caches are whole rows.
    """
    found = list(_Pass(target, workload, mesh).operators())
    if workload.phase != "train":
        return found
    steps = [_trained(operator) for operator in found]
    return [*steps, _optimizer(target, mesh)]


def _trained(operator: Operator) -> Operator:
    return dataclasses.replace(
        operator,
        flops=_PASSES * operator.flops,
        weight_bytes=_PASSES * operator.weight_bytes,
        activation_bytes=_PASSES * operator.activation_bytes,
        kv_written_bytes=0.0,
        sent_bytes=2 * operator.sent_bytes,
    )


def _optimizer(target: Target, mesh: AbstractMesh) -> Operator:
    """Returns Adam's update, and the sum of gradients over the rows' devices."""
    shardings = layout(target, mesh)
    pairs = zip(jax.tree.leaves(target.params), jax.tree.leaves(shardings), strict=True)
    held = sum(math.prod(s.shard_shape(x.shape)) for x, s in pairs)
    ways = mesh.shape["data"]
    return Operator(
        name="optimizer",
        dtype="float32",
        activation_bytes=_ADAM_BYTES * held,
        sent_bytes=_reduced(4 * held, ways),
    )


def _reduced(size: float, ways: int) -> float:
    """Returns what a device sends in an all-reduce over a ring."""
    return 2 * (ways - 1) / ways * size


class _Pass:
    """One pass, with the sizes that a device sees."""

    def __init__(self, target: Target, workload: Workload, mesh: AbstractMesh):
        self.target, self.workload, self.mesh = target, workload, mesh
        self.config, self.params = target.config, target.params
        self.rules = target.model.rules or ShardingRules()
        self.shardings = layout(target, mesh)
        policy = target.model.policy
        self.compute = jnp.dtype(policy.compute)
        self.cache = jnp.dtype(policy.cache)
        self.rows = self._local("batch", workload.rows)
        self.tokens = self.rows * workload.tokens

    def _local(self, name: str, size: int) -> int:
        """Returns a device's part of a logical axis."""
        (entry,) = self.rules.spec((name,), (size,), self.mesh)
        return size // self._ways(entry)

    def _ways(self, entry: Any) -> int:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def operators(self) -> Iterator[Operator]:
        """Yields everything in the order of the forward."""
        stacks = list(zip(self.params["stacks"], self.shardings["stacks"], strict=True))
        yield self._embedding()
        yield self._norms([pair for pair in stacks])
        for block, names in (
            ("attention", ("query", "key", "value")),
            ("mixing", ()),
            ("attention", ("output",)),
            ("mlp", ("gate", "up")),
            ("activation", ()),
            ("mlp", ("down",)),
        ):
            if block == "mixing":
                yield self._attention()
            elif block == "activation":
                yield self._activation()
            for name in names:
                parts = [
                    (stack[block][name], shardings[block][name])
                    for stack, shardings in stacks
                    if name in stack[block]
                ]
                if parts:
                    yield self._projection(name, parts)
        yield self._head()

    def _embedding(self) -> Operator:
        embedder = self.params["embedder"]
        rows = [
            _nbytes(w) / w.shape[0] for w in jax.tree.leaves(embedder, is_leaf=_whole)
        ]
        written = self.tokens * self.config.width * self.compute.itemsize
        entry = self.shardings["embedder"]["table"]
        ways = self._tensor_ways(entry)
        return Operator(
            name="embedding",
            dtype=self.compute.name,
            weight_bytes=self.tokens * sum(rows),
            activation_bytes=written,
            sent_bytes=_reduced(written, ways),
        )

    def _projection(self, name: str, parts: list[tuple[Any, Any]]) -> Operator:
        """Returns a product with a matrix of every layer."""
        total: dict[str, float] = defaultdict(float)
        dtype = self.compute.name
        for weights, shardings in parts:
            kernel = weights["kernel"]
            layers, inputs, outputs = kernel.shape
            main = _largest(shardings["kernel"], kernel)
            in_ways, out_ways = (
                self.mesh.shape["tensor"] if "tensor" in _axes(entry) else 1
                for entry in (*main.spec, None, None, None)[1:3]
            )
            dtype = _operands(kernel, dtype)
            moved = inputs // in_ways + outputs // out_ways
            total["flops"] += (
                2 * self.tokens * layers * (inputs // in_ways * (outputs // out_ways))
            )
            total["activations"] += self.tokens * layers * moved * self.compute.itemsize
            held = shard_bytes(weights, shardings)
            gathered = self.mesh.shape["fsdp"] if self._over_fsdp(main) else 1
            total["weights"] += held * gathered
            total["sent"] += held * (gathered - 1)
            result = self.tokens * layers * outputs * self.compute.itemsize
            total["sent"] += _reduced(result, in_ways)
        return Operator(
            name=name,
            dtype=dtype,
            flops=total["flops"],
            weight_bytes=total["weights"],
            activation_bytes=total["activations"],
            sent_bytes=total["sent"],
        )

    def _attention(self) -> Operator:
        """Returns the products with keys and values, fused."""
        total: dict[str, float] = defaultdict(float)
        head_dim, workload = self.config.attention.head_dim, self.workload
        first = 0
        for stack in self.params["stacks"]:
            attention = stack["attention"]
            layers, _, heads = attention["query"]["kernel"].shape
            kv_heads = attention["key"]["kernel"].shape[-1] // head_dim
            heads = self._local("heads", heads // head_dim)
            kv_heads = self._local("kv_heads", kv_heads)
            token = 2 * kv_heads * head_dim * self.cache.itemsize
            queries = self.tokens * heads * head_dim
            for window in self.config.layer_window[first : first + layers]:
                seen = _keys_seen(workload, window)
                total["flops"] += 4 * self.rows * seen * heads * head_dim
                read = min(workload.cached, max(window - 1, 0))
                # A window reaches the prefix only where it is longer than the rest.
                own = min(read, workload.cached - workload.shared_prefix)
                total["read"] += (self.rows * own + (read - own)) * token
                total["written"] += self.tokens * token
                # Queries in, results out, the new keys and values in.
                total["activations"] += 2 * queries * self.compute.itemsize
                total["activations"] += self.tokens * token
            first += layers
        return Operator(
            name="attention",
            dtype=self.cache.name,
            flops=total["flops"],
            activation_bytes=total["activations"],
            kv_read_bytes=total["read"],
            kv_written_bytes=total["written"],
        )

    def _activation(self) -> Operator:
        """Returns the element-wise part of the feed-forward block."""
        inputs = 2 if self.config.mlp.gated else 1
        elements = 0
        for stack in self.params["stacks"]:
            layers, _, hidden = stack["mlp"]["up"]["kernel"].shape
            elements += self.tokens * layers * self._local("ffn", hidden)
        return Operator(
            name="activation",
            dtype="float32",
            flops=elements * inputs,
            activation_bytes=elements * (inputs + 1) * self.compute.itemsize,
        )

    def _norms(self, stacks: list[tuple[Any, Any]]) -> Operator:
        """Returns norms of all layers, and the additions to the residual stream."""
        weights = shard_bytes(self.params["final_norm"], self.shardings["final_norm"])
        norms = self.workload.logits * self.rows
        for stack, shardings in stacks:
            own = [name for name in stack if name.endswith("norm")]
            layers = jax.tree.leaves(stack)[0].shape[0]
            norms += self.tokens * layers * len(own)
            weights += sum(shard_bytes(stack[n], shardings[n]) for n in own)
            inner = [n for n in stack["attention"] if n.endswith("norm")]
            weights += sum(
                shard_bytes(stack["attention"][n], shardings["attention"][n])
                for n in inner
            )
        width = self.config.width
        added = 2 * self.tokens * self.config.num_layers
        return Operator(
            name="norms",
            dtype="float32",
            flops=(norms * _NORM_OPERATIONS + added) * width,
            weight_bytes=weights,
            # Of an addition the stream is read and written; a norm reads the sum.
            activation_bytes=2 * (norms + added) * width * self.compute.itemsize,
        )

    def _head(self) -> Operator:
        config, params = self.config, self.params
        part = ("embedder", "table") if config.tied_head else ("head", "kernel")
        weight, sharding = params[part[0]][part[1]], self.shardings[part[0]][part[1]]
        main = _largest(sharding, weight)
        vocabulary = config.vocabulary // self._tensor_ways(sharding)
        tokens = self.rows * self.workload.logits
        held = shard_bytes(weight, sharding)
        gathered = self.mesh.shape["fsdp"] if self._over_fsdp(main) else 1
        moved = config.width * self.compute.itemsize + vocabulary * 4
        return Operator(
            name="head",
            dtype=_operands(weight, self.compute.name),
            flops=2 * tokens * config.width * vocabulary,
            weight_bytes=held * gathered,
            activation_bytes=tokens * moved,
            sent_bytes=held * (gathered - 1),
        )

    def _tensor_ways(self, shardings: Any) -> int:
        spec = jax.tree.leaves(shardings)[0].spec
        split = any("tensor" in _axes(entry) for entry in spec)
        return self.mesh.shape["tensor"] if split else 1

    def _over_fsdp(self, sharding: Any) -> bool:
        return any("fsdp" in _axes(entry) for entry in sharding.spec)


def _keys_seen(workload: Workload, window: int) -> int:
    """Returns the pairs of a query and a key that it sees, of one row."""
    cached, tokens = workload.cached, workload.tokens
    if workload.masked_too:
        return tokens * workload.context
    # Query i sees cached + i + 1 keys, but no more than its window.
    growing = max(0, min(tokens, window - cached))
    whole = growing * cached + growing * (growing + 1) // 2
    return whole + (tokens - growing) * min(window, workload.context)


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _whole(x: Any) -> bool:
    return isinstance(x, Leaf)


def _nbytes(weight: Any) -> int:
    arrays = jax.tree.leaves(weight)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _largest(shardings: Any, weight: Any) -> Any:
    """Returns the sharding of the largest array of a weight."""
    pairs = zip(jax.tree.leaves(weight), jax.tree.leaves(shardings), strict=True)
    return max(pairs, key=lambda pair: _nbytes(pair[0]))[1]


def _operands(weight: Any, compute: str) -> str:
    """Returns the dtype that a weight multiplies in."""
    bits: Mapping[int, str] = {8: "int8"}
    return bits.get(getattr(unwrapped(weight), "activation_bits", 0), compute)

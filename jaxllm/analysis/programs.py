"""Whole programs of a model, lowered for devices that are not here.

Everything here runs in the compiler's process; `aot.compile_ahead` asks for it.

Letters: B rows, S slots, T tokens of a row.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.analysis.aot import Compilation, topology_devices
from jaxllm.analysis.architectures import Target, make_target
from jaxllm.analysis.hlo import read_program
from jaxllm.analysis.operators import abstract_mesh, shard_bytes
from jaxllm.checkpoints import LanguageModel
from jaxllm.core import ShardingRules, make_mesh, row_keys
from jaxllm.core.errors import ConfigError
from jaxllm.decoding import BoundDrafter, Committed, advance, make_sampler, prefill
from jaxllm.drafting import make_drafter
from jaxllm.models.sharding import param_shardings
from jaxllm.training.batch import Batch
from jaxllm.training.objectives import NextToken
from jaxllm.training.optimizers import OptimizerConfig, make_optimizer
from jaxllm.training.start import lay_out
from jaxllm.training.step import Frozen, init_state, train_step

__all__ = ["compile_program"]

_CACHE_AXES = (None, "batch", "kv_heads", "kv_sequence", None)


def compile_program(compilation: Compilation) -> dict[str, Any]:
    """Compiles one program; see `aot.compile_ahead` for what it returns."""
    machine = compilation.machine
    mesh = _mesh(compilation)
    lowerings = {"decode": _decode, "prefill": _prefill, "train": _train}
    if compilation.phase not in lowerings:
        raise ConfigError(
            f"cannot compile: phase is {compilation.phase!r}, expected one of "
            f"{', '.join(lowerings)}. Correct --phase."
        )
    lowered, cache_bytes = lowerings[compilation.phase](compilation, mesh)
    begun = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begun
    memory, program = compiled.memory_analysis(), read_program(compiled.as_text())
    figures = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    signs = {"alias_bytes": -1}
    return {
        **figures,
        "peak_bytes": sum(signs.get(name, 1) * n for name, n in figures.items()),
        "memory_bytes": machine.hardware.device().memory_bytes,
        "cache_bytes": cache_bytes,
        "largest_copy_bytes": program.largest_copy_bytes,
        "collectives": [
            dataclasses.asdict(each) | {"in_loop": each.in_loop}
            for each in program.collectives
        ],
        "kernels": program.kernels,
        "devices": machine.devices,
        "devices_per_chip": machine.hardware.devices_per_chip,
        "phase": compilation.phase,
        "method": compilation.method,
        "compile_seconds": round(seconds, 3),
    }


def _mesh(compilation: Compilation) -> Mesh:
    shape = abstract_mesh(compilation.mesh, compilation.machine.devices)
    return make_mesh(dict(shape.shape), topology_devices(compilation.machine))


def _placed(tree: Any, mesh: Mesh, shardings: Any = None) -> Any:
    """Returns shapes with their places: caches by rows and heads, the rest everywhere.

    Caches have five axes, the target's as those of drafting models.
    """
    rules = ShardingRules()

    def where(x: Any) -> NamedSharding:
        names = _CACHE_AXES if x.ndim == len(_CACHE_AXES) else (None,) * x.ndim
        return rules.sharding(names, x.shape, mesh)

    def place(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if shardings is None:
        shardings = jax.tree.map(where, tree)
    return jax.tree.map(place, tree, shardings)


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """What decoding and its prefill share: parameters, prompts and an empty cache."""

    target: Target
    bound: BoundDrafter
    params: Any
    sampler: Any
    committed: Any
    cache: Any
    cache_bytes: int

    @property
    def options(self) -> dict[str, Any]:
        """Static arguments of the engine."""
        length = 1 if self.target.config.rope_original_length is None else 0
        return {
            "model": self.target.model,
            "drafter": self.bound.drafter,
            "rope_length": length,
        }


def _decoding(compilation: Compilation, mesh: Mesh) -> _Decoding:
    target = make_target(
        compilation.config,
        name=compilation.name,
        dtype=compilation.dtype,
        quantize=compilation.quantize,
        cache_dtype=compilation.cache_dtype,
    )
    model, rows, slots = target.model, compilation.rows, compilation.context
    lm = LanguageModel(model=model, params=target.params, name=target.name)
    bound = BoundDrafter(lm, make_drafter(compilation.method))
    weights = param_shardings(model, target.params, mesh)
    sampler = jax.eval_shape(lambda: make_sampler(rows))

    def start(sampler: Any) -> Committed:
        one_B = jnp.ones((rows,), jnp.int32)
        tokens_BS = jnp.zeros((rows, slots), jnp.int32)
        return Committed(tokens_BS, one_B, row_keys(jnp.arange(rows)), sampler, one_B)

    cache = _placed(
        jax.eval_shape(lambda p: model.init_cache(p, rows, slots), target.params), mesh
    )
    arrays = (*cache.k, *cache.v)
    return _Decoding(
        target,
        bound,
        {
            "target": _placed(target.params, mesh, weights),
            "drafter": _placed(jax.eval_shape(lambda: bound.params), mesh),
        },
        _placed(sampler, mesh),
        _placed(jax.eval_shape(start, sampler), mesh),
        cache,
        shard_bytes(arrays, [x.sharding for x in arrays]),
    )


def _prefill(compilation: Compilation, mesh: Mesh) -> tuple[Any, int]:
    given = _decoding(compilation, mesh)
    options = _prefill_options(compilation, given)
    with jax.set_mesh(mesh):
        lowered = prefill.lower(*_prompts(given, mesh), **options)
    return lowered, given.cache_bytes


def _prompts(given: _Decoding, mesh: Mesh) -> tuple[Any, ...]:
    rows = given.committed.length_B.shape
    limit_B = _placed(jax.ShapeDtypeStruct(rows, jnp.int32), mesh)
    done_B = _placed(jax.ShapeDtypeStruct(rows, bool), mesh)
    return given.params, given.committed, given.cache, limit_B, done_B


def _prefill_options(compilation: Compilation, given: _Decoding) -> dict[str, Any]:
    return {**given.options, "chunk": min(compilation.chunk, compilation.context)}


def _decode(compilation: Compilation, mesh: Mesh) -> tuple[Any, int]:
    given = _decoding(compilation, mesh)
    options = _prefill_options(compilation, given)
    state = jax.eval_shape(
        lambda *arguments: prefill(*arguments, **options), *_prompts(given, mesh)
    )
    shapes = (
        given.params,
        _placed(state, mesh),
        given.sampler,
        _placed(jax.ShapeDtypeStruct((1,), jnp.int32), mesh),
        _placed(jax.ShapeDtypeStruct((), jnp.int32), mesh),
    )
    with jax.set_mesh(mesh):
        lowered = advance.lower(*shapes, **given.options)
    return lowered, given.cache_bytes


def _train(compilation: Compilation, mesh: Mesh) -> tuple[Any, int]:
    if compilation.quantize is not None:
        raise ConfigError(
            f"cannot compile: quantize is {compilation.quantize!r} with phase train, "
            "expected weights in full precision. Leave out --quantize."
        )
    rows, tokens = compilation.rows, compilation.context
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise ConfigError(
            f"cannot compile: rows is {rows}, expected a multiple of {ways} for the "
            f"mesh. Correct --batch or --mesh."
        )
    target = make_target(
        compilation.config, dtype="float32", compute_dtype=compilation.dtype
    )
    model = dataclasses.replace(target.model, remat=compilation.remat)
    shardings = param_shardings(model, target.params, mesh)
    params = _placed(target.params, mesh, shardings)
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    state = _placed(state, mesh, lay_out(state, params, mesh))
    by_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    integers, weights = (
        jax.ShapeDtypeStruct((rows, tokens), dtype, sharding=by_rows)
        for dtype in (jnp.int32, jnp.float32)
    )
    shapes: dict[str, Any] = {
        field.name: weights if field.name == "weight_BT" else integers
        for field in dataclasses.fields(Batch)
    }
    batch = Batch(**shapes)
    frozen = Frozen(jax.tree.map(lambda _: None, target.params), {})
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    with jax.set_mesh(mesh):
        lowered = train_step.lower(
            state,
            batch,
            key,
            frozen,
            model=model,
            objective=NextToken(),
            optimizer=optimizer,
        )
    return lowered, 0

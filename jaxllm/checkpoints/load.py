"""A checkpoint directory to a `LanguageModel`.

There is no conversion step: Hugging Face directories are read as they are, tensor by
tensor, straight into the dtype, the stacks and the sharding that the model runs with.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.checkpoints.assembly import ArraySource
from jaxllm.checkpoints.directory import (
    read_config,
    read_generation,
    refuse_remote_code,
)
from jaxllm.checkpoints.language_model import LanguageModel
from jaxllm.checkpoints.matching import TreePath, match_tensors, tree_paths
from jaxllm.checkpoints.source import resolve
from jaxllm.checkpoints.tokenizer import load_tokenizer
from jaxllm.checkpoints.weights import open_weights
from jaxllm.checkpoints.workdir import find_steps, open_workdir
from jaxllm.core import DTypePolicy, ShardingRules, make_mesh, parse_dtype, registry
from jaxllm.core.errors import CheckpointError
from jaxllm.models import DecoderConfig, Model, make_model, restack
from jaxllm.models.families import FAMILIES, family_of
from jaxllm.models.sharding import check_mesh, param_shardings
from jaxllm.models.stacks import default_stacks, stack_size
from jaxllm.quantization import METHODS, Quantizer, input_axis, quantize_params

__all__ = ["load_language_model"]


def load_language_model(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: Any = "bfloat16",
    mesh: Mesh | Mapping[str, int] | str | None = None,
    rules: ShardingRules | None = None,
    quantize: str | Quantizer | None = None,
    stacks: Sequence[int] | None = None,
    cache_dtype: Any = None,
    check_finite: bool = False,
) -> LanguageModel:
    """Loads a model from a Hugging Face directory or an Orbax workdir.

    Loading needs little more memory than the parameters: about one tensor of a
    Hugging Face directory at a time. With `quantize`, the tree in full precision
    never exists.

    Args:
      path_or_name: A directory, `hf:org/name`, or the name of a shipped model.
      dtype: Dtype of parameters and activations.
      mesh: Where the parameters go: a mesh, its sizes, or `"data=1,tensor=4"`; the
        default device when None. Run the model under `jax.set_mesh(lm.mesh)`.
      rules: Logical to mesh axes; the project's when None.
      quantize: A method of `quantization.METHODS` by its string, or built.
      stacks: Layers of each stack; one stack of all, or on a CPU one for each layer,
        when None.
      cache_dtype: Dtype of cached keys and values. When None that of `dtype`, but
        float32 on a CPU, where XLA widens writes to narrower caches, the whole cache
        with them.
      check_finite: Whether to refuse weights with NaN or infinity.

    Returns:
      The model, its parameters, and its tokenizer where the directory has one.

    Raises:
      CheckpointError: Files are missing, damaged or do not fit config.json.
      ConfigError: config.json, an option or a method string is wrong.
      ShardingError: The mesh does not divide the model.
    """
    directory = resolve(path_or_name)
    if mesh is not None and not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    target = _Target(
        policy=_policy(dtype, cache_dtype, mesh),
        mesh=mesh,
        rules=ShardingRules() if rules is None else rules,
        quantizer=_quantizer(quantize),
        stacks=None if stacks is None else tuple(stacks),
        check_finite=check_finite,
    )
    load = _load_workdir if find_steps(directory) else _load_directory
    model, params, hf_config = load(directory, target)
    return LanguageModel(
        model=model,
        params=params,
        tokenizer=load_tokenizer(directory, model.config.vocabulary),
        hf_config=hf_config,
        generation=read_generation(directory, hf_config),
        name=os.fspath(path_or_name),
        mesh=mesh,
    )


@dataclasses.dataclass(frozen=True)
class _Target:
    """What the parameters shall be, wherever they come from."""

    policy: DTypePolicy
    mesh: Mesh | None
    rules: ShardingRules
    quantizer: Quantizer | None
    stacks: tuple[int, ...] | None
    check_finite: bool

    def make_model(self, config: DecoderConfig) -> tuple[Model, dict[str, Any]]:
        """Returns the model and the shapes of its parameters, not quantized."""
        if self.mesh is not None:
            check_mesh(config, self.mesh, self.rules)
        stacks = self.stacks
        if stacks is None:
            stacks = default_stacks(config.num_layers, _platform(self.mesh))
        rules = None if self.mesh is None else self.rules
        return make_model(config, policy=self.policy, rules=rules, stacks=stacks)

    def shardings(self, model: Model, params: dict[str, Any]) -> Any:
        """Returns a tree of shardings like `params`, or None for one device."""
        if self.mesh is None:
            return None
        return param_shardings(model, params, self.mesh, self.rules)

    def quantized(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters, quantized if they shall be."""
        if self.quantizer is None:
            return params
        return quantize_params(params, self.quantizer)


Loaded = tuple[Model, dict[str, Any], dict[str, Any]]


def _load_directory(directory: Path, target: _Target) -> Loaded:
    hf_config = read_config(directory)
    refuse_remote_code(hf_config, FAMILIES)
    family = family_of(hf_config)
    model, shapes = target.make_model(family.to_config(hf_config))
    stacks = [stack_size(stack) for stack in shapes["stacks"]]
    each = {}
    for keys, x in jax.tree_util.tree_leaves_with_path(shapes):
        path = _names(keys)
        for single in tree_paths(path, stacks):
            each[single] = x.shape[1:] if path[0] == "stacks" else x.shape
    stored = match_tensors(open_weights(directory), family, model, each, hf_config)
    # What a leaf holds, and so where it goes, follows from its shapes.
    shardings = target.shardings(model, jax.eval_shape(target.quantized, shapes))

    def load(keys: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> Any:
        path = _names(keys)
        source = ArraySource(
            [stored[single] for single in tree_paths(path, stacks)],
            x.shape,
            x.dtype,
            stacked=path[0] == "stacks",
            check_finite=target.check_finite,
        )
        sharding = None if shardings is None else _at(shardings, path)
        axis = input_axis(path)
        if target.quantizer is None or axis is None:
            return source.load(sharding)
        return source.load_quantized(target.quantizer, axis, sharding)

    return model, jax.tree_util.tree_map_with_path(load, shapes), hf_config


def _load_workdir(directory: Path, target: _Target) -> Loaded:
    stored = open_workdir(directory)
    if stored.is_quantized and target.quantizer is not None:
        raise CheckpointError(
            f"cannot load checkpoint: {directory}: is quantized already, expected "
            "weights in full precision. Leave out the option to quantize."
        )
    model, shapes = target.make_model(stored.config)
    shardings = target.shardings(model, stored.shapes)
    params = stored.read(target.policy.params, shardings)
    sizes = tuple(stack_size(stack) for stack in shapes["stacks"])
    if sizes != stored.stacks:
        params = restack(params, sizes)
    if target.check_finite:
        _refuse_not_finite(directory, params)
    params = target.quantized(params)
    if target.mesh is not None:
        params = jax.device_put(params, target.shardings(model, params))
    return model, params, stored.hf_config


def _refuse_not_finite(directory: Path, params: dict[str, Any]) -> None:
    for keys, x in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(x.dtype, jnp.floating) and not jnp.isfinite(x).all():
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            raise CheckpointError(
                f"cannot load checkpoint: {directory}: '{name}' has values that are "
                "not finite, expected numbers. Use another step."
            )


def _quantizer(quantize: str | Quantizer | None) -> Quantizer | None:
    if not isinstance(quantize, str):
        return quantize
    return registry.build(quantize, METHODS)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _policy(dtype: Any, cache_dtype: Any, mesh: Mesh | None) -> DTypePolicy:
    policy = DTypePolicy.of(dtype)
    if cache_dtype is None:
        on_cpu = _platform(mesh) == "cpu"
        cache_dtype = jnp.float32 if on_cpu else policy.compute
    return dataclasses.replace(policy, cache=parse_dtype(cache_dtype))


def _names(keys: tuple[Any, ...]) -> TreePath:
    return tuple(key.idx if hasattr(key, "idx") else key.key for key in keys)


def _at(tree: Any, path: TreePath) -> Any:
    for name in path:
        tree = tree[name]
    return tree

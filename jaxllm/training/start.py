"""What a run starts from: a model with float32 parameters, in two parts.

A model that starts from random weights draws them on the host of its mesh, sharded.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoints import (
    GenerationDefaults,
    LanguageModel,
    Tokenizer,
    load_language_model,
    load_tokenizer,
    resolve,
)
from jaxllm.compression import add_lora, trainable
from jaxllm.core.dtypes import DTypePolicy, parse_dtype
from jaxllm.core.errors import ConfigError
from jaxllm.core.partition import split
from jaxllm.core.sharding import ShardingRules, make_mesh
from jaxllm.models import make_model
from jaxllm.models.sharding import check_mesh, param_shardings
from jaxllm.training.config import TrainConfig

__all__ = ["Start", "lay_out", "start"]


@dataclasses.dataclass(frozen=True)
class Start:
    """What is trained, and what stays as it is.

    Attributes:
      lm: The model; its parameters are those that the run begins with.
      trained: float32 parameters to train; None where one is not.
      fixed: The others.
    """

    lm: LanguageModel
    trained: Any
    fixed: Any


def start(config: TrainConfig) -> Start:
    """Loads or makes the model of a run.

    Raises:
      UserError: The model, its tokenizer or the mesh cannot be used.
    """
    mesh = make_mesh(config.mesh) if config.mesh else None
    lm = _load(config, mesh) if config.init_from else _make(config, mesh)
    policy = dataclasses.replace(lm.model.policy, compute=parse_dtype(config.dtype))
    model = dataclasses.replace(lm.model, policy=policy, remat=config.remat)
    lm = dataclasses.replace(lm, model=model)
    if config.lora is None:
        return Start(lm, lm.params, jax.tree.map(lambda _: None, lm.params))
    params = add_lora(lm.params, config.lora, jax.random.key(config.seed))
    lm = dataclasses.replace(lm, params=params)
    return Start(lm, *split(params, trainable))


def _load(config: TrainConfig, mesh: Mesh | None) -> LanguageModel:
    return load_language_model(config.init_from, dtype="float32", mesh=mesh)


def _make(config: TrainConfig, mesh: Mesh | None) -> LanguageModel:
    decoder = config.decoder
    assert decoder is not None
    rules = None
    if mesh is not None:
        rules = ShardingRules()
        check_mesh(decoder, mesh, rules)
    tokenizer = _tokenizer(config.tokenizer, decoder.vocabulary)
    policy = DTypePolicy.of("float32")

    def draw(key: Any) -> Any:
        return make_model(decoder, key, policy=policy, rules=rules)[1]

    model, shapes = make_model(decoder, None, policy=policy, rules=rules)
    shardings = None
    if mesh is not None:
        shardings = param_shardings(model, shapes, mesh, rules)
    params = jax.jit(draw, out_shardings=shardings)(jax.random.key(config.seed))
    return LanguageModel(
        model=model,
        params=params,
        tokenizer=tokenizer,
        generation=_generation(tokenizer),
        mesh=mesh,
    )


def _tokenizer(name: str, vocabulary: int) -> Tokenizer:
    path = Path(name)
    directory = path.parent if path.is_file() else resolve(name)
    tokenizer = load_tokenizer(directory, vocabulary)
    if tokenizer is None:
        raise ConfigError(
            f"cannot train: tokenizer: {directory} has none, expected a "
            f"tokenizer.json. Name a folder or a model that has one."
        )
    return tokenizer


def _generation(tokenizer: Tokenizer) -> GenerationDefaults:
    ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return GenerationDefaults(eos_ids=ends, pad_id=tokenizer.eos_id)


def lay_out(tree: Any, params: Any, mesh: Mesh | None) -> Any:
    """Returns where the arrays of an optimizer's state go: beside their parameters.

    Args:
      tree: The state, or shapes; its subtrees that follow `params` are found by path.
      params: What is trained, on its devices.
      mesh: None for one device.

    Returns:
      A tree of shardings like `tree`, or None without a mesh.
    """
    if mesh is None:
        return None
    known = {_names(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, x: Any) -> Any:
        names = _names(path)
        for cut in range(len(names)):
            param = known.get(names[cut:])
            if param is not None and param.shape == jnp.shape(x):
                return param.sharding
        return everywhere

    return jax.tree_util.tree_map_with_path(place, tree)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", ""))))
        for key in path
    )

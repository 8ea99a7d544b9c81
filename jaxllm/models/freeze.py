"""From NNX modules to pure functions on a plain tree of parameters.

`freeze(module)` gives `(model, params)`: a static, hashable `Model` and nested dicts of
arrays. Nothing at run time is an NNX object.

Layers live in *stacks*: `params["stacks"]` is a tuple; a stack is neighbouring layers
with equal shapes and leaf types, arrays stacked on a leading axis and scanned by index.
On a CPU a stack holds one layer, because XLA:CPU copies every slice of a stacked array.

Letters: B rows, T tokens, D width, V vocabulary, L layers, l layers of a stack.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxllm.attention.cache import Cache, DenseCache, NewKV, init_cache
from jaxllm.attention.masks import CAUSAL, Mask
from jaxllm.attention.paged import PagedCache, init_pages
from jaxllm.attention.rope import rope_tables, rotate_angles
from jaxllm.attention.segments import layer_of
from jaxllm.core.dtypes import DTypePolicy
from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass, static
from jaxllm.core.sharding import ShardingRules, constrain
from jaxllm.layers.attention import LayerContext
from jaxllm.layers.embeddings import tied_logits
from jaxllm.models.decoder import Decoder, DecoderConfig, make_decoder
from jaxllm.models.stacks import default_stacks, join_layers, restack, stack_size

__all__ = [
    "Context",
    "Forward",
    "Model",
    "freeze",
    "join_kv",
    "make_model",
]

Params = dict[str, Any]

_REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@pytree_dataclass
class Context:
    """All that a forward knows beside parameters and tokens.

    Attributes:
      positions_BT: int32 absolute positions of the tokens.
      valid_BT: Which tokens are real; all when None. Padding may stand anywhere.
      mask: Rule among the new tokens; causal by position unless told.
      cache: Keys and values of earlier tokens, only read.
      collect: Names of what `Forward.aux` shall hold: `"hidden:i"` is the residual
        stream after layer i, `[B, T, D]`.
      rope_length: Longest length the sequences may reach, for rotations that depend on
        it; the cache's capacity, or T, when 0.
    """

    positions_BT: Array
    valid_BT: Array | None = None
    mask: Mask = CAUSAL
    cache: Cache | None = None
    collect: tuple[str, ...] = static(default=())
    rope_length: int = static(default=0)

    @classmethod
    def start(cls, tokens_BT: Array, **kwargs: Any) -> "Context":
        """Returns the context of rows that begin at position 0."""
        positions_BT = jnp.broadcast_to(
            jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
        )
        return cls(positions_BT, **kwargs)


@pytree_dataclass
class Forward:
    """What a forward gives.

    Attributes:
      logits_BTV: float32.
      hidden_BTD: The residual stream after the last layer, before the final norm.
      new_kv: For each stack the new keys and values, each `[l, B, K, T, H]`.
      aux: What `Context.collect` asked for.
    """

    logits_BTV: Array
    hidden_BTD: Array
    new_kv: NewKV
    aux: dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder as pure functions; static and hashable, holds no array.

    Attributes:
      config: The architecture.
      policy: Dtypes of activations and cache.
      rules: Logical axes to mesh axes; None leaves activations unconstrained.
      parts: NNX graph definitions of embedder, layers, final norm and head.
      axes: Logical axis names in a tree like the parameters of one layer a stack:
        tuples of names in the place of arrays, without the stack's leading axis.
      remat: What a backward computes again instead of keeping: `"none"`; `"dots"`, all
        but the products with weights; `"full"`, everything inside a layer.
    """

    config: DecoderConfig
    policy: DTypePolicy
    rules: ShardingRules | None
    parts: tuple[tuple[str, Any], ...]
    axes: Params
    remat: str = "none"

    def __post_init__(self) -> None:
        # Hashed once: the graph definitions are large, and jit hashes every call.
        key = (self.config, self.policy, self.rules, self.parts, self.remat)
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Model)
            and hash(self) == hash(other)
            and (self.config, self.policy, self.rules, self.parts, self.remat)
            == (other.config, other.policy, other.rules, other.parts, other.remat)
        )

    def __call__(
        self, params: Params, tokens_BT: Array, context: Context | None = None
    ) -> Forward:
        """Runs the whole model.

        Args:
          params: The tree that `freeze` or a checkpoint gave.
          tokens_BT: int32, every value in `[0, V)`, padding included.
          context: Positions, masks and cache; rows from position 0 when None.
        """
        context = Context.start(tokens_BT) if context is None else context
        x_BTD = self.embed(params, tokens_BT, context.positions_BT)
        x_BTD, new_kv, aux = self.run_layers(params, x_BTD, context)
        return Forward(self.unembed(params, x_BTD), x_BTD, new_kv, aux)

    def embed(self, params: Params, tokens_BT: Array, positions_BT: Array) -> Array:
        """Returns the residual stream `[B, T, D]` before the first layer."""
        embedder = self._part("embedder", params["embedder"])
        x_BTD = embedder(tokens_BT, positions_BT, self.policy.compute)
        return constrain(x_BTD, ("batch", "tokens", None), self.rules)

    def run_layers(
        self,
        params: Params,
        x_BTD: Array,
        context: Context,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Array, NewKV, dict[str, Array]]:
        """Runs the contiguous layers `start <= i < stop`.

        Args:
          params: The whole tree.
          x_BTD: Residual stream before layer `start`.
          context: As for the whole model; its cache holds all layers.
          start: First layer.
          stop: One past the last layer; L when None.

        Returns:
          The residual stream after the last of them; the new keys and values, with
          None for a stack that was not run and only the layers run of the others; and
          what `context.collect` asked for of these layers.
        """
        stop = self.config.num_layers if stop is None else stop
        wanted = {
            int(name.split(":")[1]): name
            for name in context.collect
            if name.startswith("hidden:")
        }
        new_kv: NewKV = (None,) * len(params["stacks"])
        aux: dict[str, Array] = {}
        cuts = sorted({i + 1 for i in wanted if start <= i < stop} | {stop})
        ropes = self._ropes(context, x_BTD.shape[1])
        for cut in cuts:
            x_BTD, more = self._run(params, x_BTD, context, ropes, start, cut)
            new_kv, start = join_kv(new_kv, more), cut
            if cut - 1 in wanted:
                aux[wanted[cut - 1]] = x_BTD
        return x_BTD, new_kv, aux

    def unembed(self, params: Params, x_BTD: Array) -> Array:
        """Returns float32 logits `[B, T, V]` of a residual stream."""
        return self.head(params, self.normalize(params, x_BTD))

    def normalize(self, params: Params, x_BTD: Array) -> Array:
        """Applies the final norm to a residual stream."""
        return self._part("final_norm", params["final_norm"])(x_BTD)

    def head(self, params: Params, x_BTD: Array) -> Array:
        """Returns float32 logits `[B, T, V]` of normalized activations."""
        if self.config.tied_head:
            logits = tied_logits(x_BTD, params["embedder"]["table"])
        else:
            logits = self._part("head", params["head"])(x_BTD)
        if self.config.final_softcap is not None:
            cap = self.config.final_softcap
            logits = cap * jnp.tanh(logits / cap)
        return constrain(logits, ("batch", "tokens", "vocab"), self.rules)

    def init_cache(
        self, params: Params, rows: int, capacity: int, dtype: Any = None
    ) -> DenseCache:
        """Returns an empty cache over the stacks of `params`.

        Args:
          params: The tree whose stacks the cache follows.
          rows: B.
          capacity: Slots of a row, a draft's longest path included.
          dtype: Dtype of keys and values; the policy's when None.
        """
        shape = self._cache_shape(params, dtype)
        cache = init_cache(**shape, rows=rows, capacity=capacity)
        return self._split(cache, (None, "batch", "kv_heads", "kv_sequence", None))

    def init_pages(
        self, params: Params, rows: int, *, dtype: Any = None, **sizes: Any
    ) -> PagedCache:
        """Returns an empty paged cache over the stacks of `params`.

        Args:
          params: The tree whose stacks the cache follows.
          rows: B.
          dtype: Dtype of keys and values; the policy's when None.
          **sizes: `pages`, `page_slots` and `row_pages` of `attention.init_pages`.
        """
        cache = init_pages(**self._cache_shape(params, dtype), rows=rows, **sizes)
        return self._split(cache, (None, None, "kv_heads", None, None))

    def _cache_shape(self, params: Params, dtype: Any) -> dict[str, Any]:
        head_dim = self.config.attention.head_dim
        shapes = [s["attention"]["key"]["kernel"].shape for s in params["stacks"]]
        return {
            "layers": [shape[0] for shape in shapes],
            "kv_heads": [shape[-1] // head_dim for shape in shapes],
            "head_dim": head_dim,
            "dtype": self.policy.cache if dtype is None else dtype,
        }

    def _split(self, cache: Any, names: tuple[str | None, ...]) -> Any:
        """Constrains keys and values by the names of their axes."""

        def split(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(constrain(x, names, self.rules) for x in arrays)

        return dataclasses.replace(cache, k=split(cache.k), v=split(cache.v))

    def _part(self, name: str, params: Params) -> Any:
        return nnx.merge(dict(self.parts)[name], params)

    def _ropes(self, context: Context, tokens: int) -> list[tuple[Array, Array]]:
        capacity = getattr(context.cache, "capacity", 0) if context.cache else tokens
        length = context.rope_length or capacity
        return [
            rotate_angles(context.positions_BT, *rope_tables(config, length))
            for config in self.config.ropes
        ]

    def _run(
        self,
        params: Params,
        x_BTD: Array,
        context: Context,
        ropes: list[tuple[Array, Array]],
        start: int,
        stop: int,
    ) -> tuple[Array, NewKV]:
        first, new_kv = 0, []
        for index, stack in enumerate(params["stacks"]):
            size = stack_size(stack)
            low, high = max(start - first, 0), min(stop - first, size)
            pair = None
            if low < high:
                run = _StackRun(self, stack, index, first, context, ropes)
                x_BTD, pair = run(x_BTD, low, high)
            new_kv.append(pair)
            first += size
        return x_BTD, tuple(new_kv)


@dataclasses.dataclass(frozen=True)
class _StackRun:
    """One pass over a range of one stack's layers."""

    model: Model
    stack: Params
    index: int
    first: int
    context: Context
    ropes: list[tuple[Array, Array]]

    def __call__(
        self, x_BTD: Array, low: int, high: int
    ) -> tuple[Array, tuple[Array, Array]]:
        if high - low == 1:
            x_BTD, (k, v) = self._layer(x_BTD, low, *self._data(low, high))
            return x_BTD, (k[None], v[None])
        rope, window = self._data(low, high)
        scanned = {
            "layer": jnp.arange(low, high),
            "rope": None if isinstance(rope, int) else rope,
            "window": None if isinstance(window, int) else window,
        }

        def body(x: Array, xs: Params) -> tuple[Array, tuple[Array, Array]]:
            return self._layer(
                x,
                xs["layer"],
                rope if xs["rope"] is None else xs["rope"],
                window if xs["window"] is None else xs["window"],
            )

        return jax.lax.scan(body, x_BTD, scanned)

    def _data(self, low: int, high: int) -> tuple[Any, Any]:
        """Returns rope index and window: an int where all layers agree, else [l]."""

        def shared(values: tuple[int, ...]) -> Any:
            part = values[self.first + low : self.first + high]
            same = len(set(part)) == 1
            return part[0] if same else jnp.asarray(part, jnp.int32)

        config = self.model.config
        return shared(config.layer_rope), shared(config.layer_window)

    def _layer(
        self, x_BTD: Array, layer: Array | int, rope: Any, window: Any
    ) -> tuple[Array, tuple[Array, Array]]:
        context, model = self.context, self.model
        if isinstance(rope, int):
            angles = self.ropes[rope] if rope >= 0 else None
        else:
            cos, sin = self.ropes[0]
            # Index -1, a layer without rotation, reads the last table: no turn.
            tables = [*self.ropes, (jnp.ones_like(cos), jnp.zeros_like(sin))]
            cos, sin = (jnp.stack(t)[rope] for t in zip(*tables, strict=True))
            angles = (cos, sin)
        cache = context.cache
        layer_context = LayerContext(
            positions_BT=context.positions_BT,
            valid_BT=context.valid_BT,
            mask=context.mask,
            rope=angles,
            window=window,
            segments=cache.segments(self.index, layer) if cache else (),
            rules=model.rules,
        )

        def run(weights: Params, x_BTD: Array) -> tuple[Array, tuple[Array, Array]]:
            x_BTD, pair = model._part("layer", weights)(x_BTD, layer_context)
            return constrain(x_BTD, ("batch", "tokens", None), model.rules), pair

        if model.remat != "none":
            run = jax.checkpoint(run, policy=_REMAT[model.remat])
        return run(layer_of(self.stack, layer), x_BTD)


def join_kv(first: NewKV, second: NewKV) -> NewKV:
    """Joins the new keys and values of two neighbouring runs of layers."""

    def join(a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)

    return tuple(join(a, b) for a, b in zip(first, second, strict=True))


def freeze(
    module: Decoder,
    *,
    policy: DTypePolicy | None = None,
    rules: ShardingRules | None = None,
    stacks: Sequence[int] | None = None,
) -> tuple[Model, Params]:
    """Turns a decoder into pure functions and a plain tree.

    Args:
      module: Decoder, with arrays or with shapes only.
      policy: Dtypes; float32 throughout when None.
      rules: Sharding of activations.
      stacks: Layers of each stack; the platform's default when None.

    Returns:
      `(model, params)`; `params` has keys `embedder`, `stacks`, `final_norm` and,
      unless the head is tied, `head`.
    """
    policy = DTypePolicy.of("float32") if policy is None else policy
    parts: dict[str, Any] = {}
    params: Params = {}
    axes: Params = {}
    named = {"embedder": module.embedder, "final_norm": module.final_norm}
    if module.head is not None:
        named["head"] = module.head
    for name, part in named.items():
        parts[name], params[name], axes[name] = _split(part)
    layers = []
    for layer in module.layers:
        definition, tree, layer_axes = _split(layer)
        if parts.setdefault("layer", definition) != definition:
            raise ConfigError(
                "cannot freeze: layers differ in structure, expected equal modules. "
                "Give differences as data beside the weights."
            )
        layers.append(tree)
        axes["layer"] = layer_axes
    params["stacks"] = tuple(join_layers([layer]) for layer in layers)
    sizes = default_stacks(len(layers)) if stacks is None else tuple(stacks)
    model = Model(module.config, policy, rules, tuple(parts.items()), axes)
    return model, restack(params, sizes)


def make_model(
    config: DecoderConfig, key: Array | None = None, **kwargs: Any
) -> tuple[Model, Params]:
    """Makes a model from its configuration.

    Args:
      config: The architecture.
      key: Draws random weights; the tree holds `jax.ShapeDtypeStruct`s when None.
      **kwargs: As for `freeze`.

    Returns:
      `(model, params)`, floating arrays in the policy's parameter dtype.
    """
    model, params = freeze(make_decoder(config, key), **kwargs)

    def cast(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, model.policy.params)
        return x.astype(model.policy.params)

    return model, jax.tree.map(cast, params)


def _split(module: nnx.Module) -> tuple[Any, Params, Params]:
    definition, state = nnx.split(module)
    axes = jax.tree.map(
        lambda v: v.get_metadata()["axes"],
        state,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return definition, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)

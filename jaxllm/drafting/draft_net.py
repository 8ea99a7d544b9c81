"""A drafting model with a cache of its own, kept in step with what is committed.

Every neural drafter stands on this. Its cache remembers which tokens it was fed; it is
good as far as these are the committed ones. So nobody has to tell it what was accepted,
and it may stand anywhere in a cascade.

Letters: B rows, S slots, M draft nodes, V vocabulary of the target, C chunk, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.attention.cache import DenseCache
from jaxllm.attention.masks import CAUSAL, Mask
from jaxllm.checkpoints import LanguageModel, load_language_model
from jaxllm.core import registry
from jaxllm.core.errors import ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.feed import Feeder, after
from jaxllm.decoding.protocol import Committed, Counts, Drafter, Params
from jaxllm.models.freeze import Context, Forward, Model
from jaxllm.quantization import METHODS as QUANTIZERS
from jaxllm.quantization import Quantizer, quantize_params

__all__ = ["DraftNet", "NetDrafter", "NetState", "add_pass"]

TARGET = "target"
"""Name of the target itself where the name of a drafting model is asked for."""

_PROMPT_CHUNK = 128
_CATCH_UP_CHUNK = 8


@pytree_dataclass
class NetState:
    """What a drafting model has seen.

    Attributes:
      cache: Its keys and values.
      fed_BS: int32 tokens that the cache was fed, slot for slot.
      count_B2: int32 forwards so far, and tokens that they ran for the row.
    """

    cache: DenseCache
    fed_BS: Array
    count_B2: Array


@dataclasses.dataclass(frozen=True)
class DraftNet:
    """A drafting model as static functions; its weights come with `params`.

    Attributes:
      model: The drafting model.
      vocabulary: V, the target's.
      name: What its counts are called.
      layers: Layers run; all when None.
      shares_weights: Whether it runs the target's own weights.
    """

    model: Model
    vocabulary: int
    name: str
    layers: int | None = None
    shares_weights: bool = False

    def weights(self, params: Params) -> Any:
        """Returns the drafting model's parameters."""
        return params["target"] if self.shares_weights else params["drafter"]

    def init(self, params: Params, committed: Committed) -> NetState:
        """Returns the state after `prompt[:-1]`."""
        rows, slots = committed.tokens_BS.shape
        weights = self.weights(params)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
        stacks = shapes["stacks"]
        if self.layers is not None:
            stacks = first_layers(stacks, self.layers)
        cache = self.model.init_cache({"stacks": stacks}, rows, slots)
        cache, _ = self._feeder(min(_PROMPT_CHUNK, slots), slots).run(
            weights,
            self._clip(committed.tokens_BS),
            cache,
            jnp.maximum(committed.length_B - 1, 0),
            empty=True,
        )
        return NetState(cache, committed.tokens_BS, jnp.zeros((rows, 2), jnp.int32))

    def keep_up(
        self, params: Params, state: NetState, committed: Committed, ahead: int
    ) -> NetState:
        """Drops what was not accepted and feeds all but the last `ahead` tokens.

        Costs nothing where no more than `ahead` tokens are missing.
        """
        length_B, slots = committed.length_B, committed.tokens_BS.shape[1]
        differs_BS = state.fed_BS != committed.tokens_BS
        first_B = jnp.argmax(differs_BS, axis=1)
        good_B = jnp.where(differs_BS.any(axis=1), first_B, slots)
        cache = state.cache.crop(jnp.minimum(good_B, length_B - 1))
        upto_B = jnp.maximum(length_B - ahead, cache.length_B)
        missing_B = upto_B - cache.length_B
        grown, _ = self._feeder(_CATCH_UP_CHUNK, slots).run(
            self.weights(params), self._clip(committed.tokens_BS), cache, upto_B
        )
        passes = jnp.max(-(-missing_B // _CATCH_UP_CHUNK))
        count_B2 = state.count_B2 + _count(passes, missing_B)
        return NetState(grown, committed.tokens_BS, count_B2)

    def catch_up(
        self, params: Params, state: NetState, committed: Committed, chunk: int
    ) -> tuple[NetState, Array]:
        """Feeds what is missing, the pending token included.

        Args:
          params: Parameters of target and drafter.
          state: Of any time before.
          committed: What is known now; may be virtual.
          chunk: C of the last pass: the most tokens that are usually missing.

        Returns:
          The state, and float32 logits `[B, 1, V]` after the pending token.
        """
        state = self.keep_up(params, state, committed, chunk)
        weights = self.weights(params)
        start_B = state.cache.length_B
        cache, x_BCD, _ = self._feeder(chunk, committed.tokens_BS.shape[1]).step(
            weights,
            self._clip(committed.tokens_BS),
            state.cache,
            committed.length_B,
        )
        last_B = jnp.clip(committed.length_B - 1 - start_B, 0, chunk - 1)
        x_B1D = jnp.take_along_axis(x_BCD, last_B[:, None, None], axis=1)
        logits_B1V = self._fit(self.model.unembed(weights, x_B1D))
        count_B2 = state.count_B2 + _count(1, committed.length_B - start_B)
        return NetState(cache, committed.tokens_BS, count_B2), logits_B1V

    def forward(
        self,
        params: Params,
        tokens_BT: Array,
        positions_BT: Array,
        cache: Any,
        mask: Mask,
        valid_BT: Array | None = None,
    ) -> Forward:
        """Runs tokens that are not committed; logits in the target's vocabulary.

        Args:
          params: Parameters of target and drafter.
          tokens_BT: int32.
          positions_BT: int32 absolute positions.
          cache: What they attend to beside each other.
          mask: Rule among them.
          valid_BT: Which are real; all when None.
        """
        weights = self.weights(params)
        context = Context(
            positions_BT,
            valid_BT,
            mask,
            cache,
            rope_length=cache.capacity,
        )
        x_BTD = self.model.embed(weights, self._clip(tokens_BT), positions_BT)
        x_BTD, new_kv, aux = self.model.run_layers(
            weights, x_BTD, context, 0, self.layers
        )
        logits_BTV = self._fit(self.model.unembed(weights, x_BTD))
        return Forward(logits_BTV, x_BTD, new_kv, aux)

    def extend(
        self, params: Params, state: NetState, token_B1: Array
    ) -> tuple[NetState, Array]:
        """Feeds one token of every row; returns the logits `[B, 1, V]` after it."""
        position_B1 = state.cache.length_B[:, None]
        forward = self.forward(params, token_B1, position_B1, state.cache, CAUSAL)
        one_B = after(forward.hidden_BTD, jnp.ones_like(state.cache.length_B))
        cache = state.cache.append(forward.new_kv, count_B=one_B)
        grown = dataclasses.replace(state, cache=cache)
        return add_pass(grown, 1), forward.logits_BTV

    def counts(self, state: NetState) -> Counts:
        """Returns the forwards and tokens so far, under the model's name."""
        return {self.name: state.count_B2}

    def _feeder(self, chunk: int, slots: int) -> Feeder:
        return Feeder(
            model=self.model, chunk=chunk, rope_length=slots, stop=self.layers
        )

    def _clip(self, tokens: Array) -> Array:
        return jnp.minimum(tokens, self.model.config.vocabulary - 1)

    def _fit(self, logits_BTV: Array) -> Array:
        """Pads or cuts the vocabulary to the target's; what lacks cannot be drawn."""
        own = logits_BTV.shape[-1]
        if own >= self.vocabulary:
            return logits_BTV[..., : self.vocabulary]
        padding = ((0, 0), (0, 0), (0, self.vocabulary - own))
        return jnp.pad(logits_BTV, padding, constant_values=-jnp.inf)


def _count(passes: Array | int, tokens_B: Array) -> Array:
    return jnp.stack([jnp.broadcast_to(passes, tokens_B.shape), tokens_B], axis=1)


def add_pass(state: NetState, tokens: Array | int) -> NetState:
    """Counts a forward that ran `tokens` (of each row, or `[B]`)."""
    rows = state.count_B2.shape[0]
    tokens_B = jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (rows,))
    return dataclasses.replace(state, count_B2=state.count_B2 + _count(1, tokens_B))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetDrafter(Drafter):
    """What the drafters that ask a drafting model have in common.

    Attributes:
      model: What `jaxllm.load` takes (a directory, `hf:org/name`, a shipped name), or
        `target` for a cheaper copy of the target itself.
      layers: Stops after so many layers of the model and reads its head there; with
        `model=target` an early-exit self-draft.
      quantize: Method that quantizes the model's weights; with `model=target` a
        quantized copy of the target.
      net: The model, once bound.
    """

    model: str = "demo-draft"
    layers: int | None = None
    quantize: str | None = None
    net: DraftNet | None = dataclasses.field(default=None, init=False)

    @property
    def bound_net(self) -> DraftNet:
        """The model.

        Raises:
          ConfigError: The drafter is not bound yet.
        """
        if self.net is None:
            raise ConfigError(
                f"cannot draft: {type(self).__name__} has no model yet, expected a "
                f"bound drafter. Call its bind, or jaxllm.bind."
            )
        return self.net

    def bind(self, lm: LanguageModel) -> tuple[Drafter, Any]:
        """Loads the model and checks that its tokens are the target's."""
        net, params = bind_net(
            lm, self.model, layers=self.layers, quantize=self.quantize
        )
        bound = dataclasses.replace(self)
        object.__setattr__(bound, "net", net)
        return bound, params

    def init(self, params: Params, committed: Committed, prefill: Forward) -> Any:
        """Runs the prompt through the model."""
        return self.bound_net.init(params, committed)

    def cost(self, params: Params) -> float:
        """Returns a forward for each token of depth, by the bytes that it reads."""
        net = self.bound_net
        draft = read_bytes(net.model, net.weights(params), net.layers)
        target = read_bytes(net.model, params["target"])
        return self.depth * draft / target

    def counts(self, state: Any) -> Counts:
        """Returns the model's forwards and the tokens that these ran."""
        return self.bound_net.counts(state)


def read_bytes(model: Model, params: Any, layers: int | None = None) -> int:
    """Returns the bytes of parameters that a forward of few tokens reads.

    Args:
      model: The model.
      params: Its tree; shapes will do.
      layers: Layers run; all when None.
    """
    stacks = params["stacks"]
    if layers is not None:
        stacks = first_layers(stacks, layers)
    # Of an embedding table that is no head only a row is read.
    head = params["embedder"] if model.config.tied_head else params["head"]
    read = jax.tree.leaves((stacks, head))
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in read)


def first_layers(stacks: tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    """Returns the shapes of the first layers of some stacks."""
    found = []
    for stack in stacks:
        size = jax.tree.leaves(stack)[0].shape[0]
        take = min(size, layers)
        if take:
            found.append(
                jax.tree.map(
                    lambda x, n=take: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype),
                    stack,
                )
            )
        layers -= take
    return tuple(found)


def bind_net(
    lm: LanguageModel,
    name: str,
    *,
    layers: int | None = None,
    quantize: str | None = None,
) -> tuple[DraftNet, Any]:
    """Loads a drafting model for a target, or makes one from it.

    Args:
      lm: The target.
      name: What `jaxllm.load` takes, or `"target"` for the target itself.
      layers: Stops after so many layers of it (an early exit).
      quantize: Quantizes its weights by this method; the target keeps its own.

    Returns:
      The functions and their parameters.

    Raises:
      ConfigError: Its tokens are not the target's, or there are not so many layers.
    """
    if name == TARGET:
        model, params, depth = lm.model, lm.params, lm.config.num_layers
        if layers is None and quantize is None:
            raise ConfigError(
                f"cannot draft: model is {TARGET!r} as it is, expected something "
                f"cheaper than the target. Add layers=N or quantize=METHOD."
            )
    else:
        draft = load_language_model(
            name, dtype=lm.model.policy.compute, mesh=lm.mesh, quantize=quantize
        )
        if not lm.shares_tokens(draft):
            raise ConfigError(
                f"cannot draft: {name}: its tokens are not those of "
                f"{lm.name or 'the target'}, expected one vocabulary, id for id. "
                f"Choose a model that was trained with the target's tokenizer."
            )
        model, params, depth = draft.model, draft.params, draft.config.num_layers
    if layers is not None and not 0 < layers <= depth:
        raise ConfigError(
            f"cannot draft: layers is {layers}, expected 1 to {depth}, the layers of "
            f"{name}. Correct it."
        )
    shares = name == TARGET and quantize is None
    if name == TARGET and quantize is not None:
        quantizer = registry.build(quantize, QUANTIZERS, {Quantizer: QUANTIZERS})
        params = quantize_params(params, quantizer)
    label = name.rstrip("/").rsplit("/", 1)[-1]
    label += f"[:{layers}]" if layers is not None else ""
    label += f" {quantize}" if quantize else ""
    net = DraftNet(model, lm.config.vocabulary, label, layers, shares)
    return net, {} if shares else params

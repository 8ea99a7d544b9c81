"""One configurable decoder-only transformer for every family.

What differs between families is a field of `DecoderConfig`, never a subclass.

Letters: B rows, T tokens, D width, V vocabulary, L layers.
"""

import dataclasses

import jax
from flax import nnx
from jax import Array

from jaxllm.attention.masks import GLOBAL_WINDOW
from jaxllm.attention.rope import RopeConfig
from jaxllm.core.errors import ConfigError
from jaxllm.layers.attention import Attention, AttentionConfig, LayerContext
from jaxllm.layers.embeddings import Embedder, Head
from jaxllm.layers.mlp import Mlp, MlpConfig
from jaxllm.layers.norms import Norm, NormConfig

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture of a decoder-only model.

    Attributes:
      vocabulary: V, rows of the embedding table.
      width: D.
      num_layers: L.
      max_positions: Longest sequence that the model was made for.
      attention: Shape of attention, the same in every layer.
      mlp: Shape of the feed-forward block.
      norm: Normalisation of every block's input and of the last hidden state.
      post_norms: Whether a block's output is normalised too before it is added.
      ropes: The rotation rules that layers choose from.
      layer_rope: Index into `ropes` for each layer, -1 for a layer without rotation.
      layer_window: For each layer how many positions back it sees, itself included;
        `GLOBAL_WINDOW` for all.
      learned_positions: Whether a table of positions is added to the embeddings.
      embedding_scale: Multiplies token embeddings.
      tied_head: Whether the output head is the embedding table.
      final_softcap: c of `c * tanh(logits / c)` on the output, if any.
    """

    vocabulary: int
    width: int
    num_layers: int
    max_positions: int
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = dataclasses.field(default_factory=NormConfig)
    post_norms: bool = False
    ropes: tuple[RopeConfig, ...] = ()
    layer_rope: tuple[int, ...] = ()
    layer_window: tuple[int, ...] = ()
    learned_positions: bool = False
    embedding_scale: float = 1.0
    tied_head: bool = False
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        none, wide = (-1,) * self.num_layers, (GLOBAL_WINDOW,) * self.num_layers
        first = none if not self.ropes else (0,) * self.num_layers
        object.__setattr__(self, "layer_rope", self.layer_rope or first)
        object.__setattr__(self, "layer_window", self.layer_window or wide)
        sizes = {
            "vocabulary": self.vocabulary,
            "width": self.width,
            "num_layers": self.num_layers,
            "max_positions": self.max_positions,
            "num_heads": self.attention.num_heads,
            "num_kv_heads": self.attention.num_kv_heads,
            "head_dim": self.attention.head_dim,
            "mlp hidden": self.mlp.hidden,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(
                    f"cannot build model: {name} is {size}, expected a positive "
                    f"integer. Check config.json."
                )
        if self.attention.num_heads % self.attention.num_kv_heads:
            raise ConfigError(
                f"cannot build model: num_heads is {self.attention.num_heads}, "
                f"expected a multiple of num_kv_heads "
                f"{self.attention.num_kv_heads}. Check config.json."
            )
        for name in ("layer_rope", "layer_window"):
            if len(getattr(self, name)) != self.num_layers:
                raise ConfigError(
                    f"cannot build model: {name} has {len(getattr(self, name))} "
                    f"entries, expected {self.num_layers}. Check layer_types in "
                    f"config.json."
                )

    @property
    def rope_original_length(self) -> int | None:
        """Length past which some layer's frequencies change; None if none do."""
        lengths = [r.original_length for r in self.ropes if r.depends_on_length]
        return min(lengths, default=None)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm(config.norm, config.width)

        self.attention_norm = norm()
        self.attention = Attention(config.attention, config.width, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = Mlp(config.mlp, config.width, rngs=rngs)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self, x_BTD: Array, context: LayerContext
    ) -> tuple[Array, tuple[Array, Array]]:
        """Returns the residual stream after the layer, and its new keys and values."""
        o_BTD, new_kv = self.attention(self.attention_norm(x_BTD), context)
        if self.attention_post_norm is not None:
            o_BTD = self.attention_post_norm(o_BTD)
        x_BTD = x_BTD + o_BTD
        o_BTD = self.mlp(self.mlp_norm(x_BTD), context.rules)
        if self.mlp_post_norm is not None:
            o_BTD = self.mlp_post_norm(o_BTD)
        return x_BTD + o_BTD, new_kv


class Decoder(nnx.Module):
    """The parts of a decoder; `freeze` turns them into pure functions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedder = Embedder(
            config.vocabulary,
            config.width,
            positions=config.max_positions if config.learned_positions else 0,
            scale=config.embedding_scale,
            rngs=rngs,
        )
        self.layers = nnx.List(
            [DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = Norm(config.norm, config.width)
        self.head = (
            None
            if config.tied_head
            else Head(config.vocabulary, config.width, rngs=rngs)
        )


def make_decoder(config: DecoderConfig, key: Array | None = None) -> Decoder:
    """Makes a decoder with random weights, or with shapes only when `key` is None."""
    if key is None:
        return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(jax.random.key(0))))
    return Decoder(config, rngs=nnx.Rngs(key))

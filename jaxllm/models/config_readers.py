"""From `config.json` of each family to `DecoderConfig`.

`jaxllm.models.families` says what is accepted, what is refused, and why.
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.attention.masks import GLOBAL_WINDOW
from jaxllm.attention.rope import RopeConfig
from jaxllm.core.errors import ConfigError
from jaxllm.layers.attention import AttentionConfig
from jaxllm.layers.mlp import MlpConfig
from jaxllm.layers.norms import NormConfig
from jaxllm.models.config_fields import FILE_NAME, REQUIRED, Fields, shown
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.rope_fields import LAYER_TYPES, read_layer_ropes, read_rope

__all__ = [
    "read_gemma2",
    "read_gemma3",
    "read_gemma3_text",
    "read_gpt2",
    "read_llama",
    "read_mistral",
    "read_phi3",
    "read_qwen2",
    "read_qwen3",
]

# Beyond these a file is damaged: nothing is allocated for it.
MAX_LAYERS = 2**10
MAX_SIZE = 2**20
MAX_HEADS = 2**14
MAX_VOCABULARY = 2**24
MAX_POSITIONS = 2**30 - 1

# The words of transformers; several name one function to within rounding.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}

# Keys that change the computation, and the one value that is implemented.
_SWITCHES: dict[str, bool] = {
    "add_cross_attention": False,
    "alibi": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "lm_head_bias": False,
    "scale_attn_by_inverse_layer_idx": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}
# Keys that must be null or empty.
_EMPTY = (
    "attention_chunk_size",
    "clip_qkv",
    "num_experts",
    "num_local_experts",
    "pruned_heads",
)


def read_llama(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads Llama 2 and 3.

    Args:
      values: Content of `config.json`; so for every reader.

    Raises:
      ConfigError: As for `families.decoder_config`; so for every reader.
    """
    fields = _open(values)
    bias = fields.flag("attention_bias", False)
    attention = _attention(fields, qkv_bias=bias, output_bias=bias)
    # The reference never reads it; a file that has one expects another model.
    if fields.has("sliding_window"):
        raise fields.error("sliding_window", "null for this model_type")
    return DecoderConfig(
        **_body(fields, attention, mlp_bias=fields.flag("mlp_bias", False)),
        ropes=(_rope(fields, attention),),
        layer_window=_uniform_windows(fields, None),
    )


def read_mistral(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads Mistral, whose layers all see one window."""
    fields = _open(values)
    _fixed(fields, attention_bias=False, mlp_bias=False)
    attention = _attention(fields, kv_heads=8)
    return DecoderConfig(
        **_body(fields, attention),
        ropes=(_rope(fields, attention),),
        layer_window=_uniform_windows(fields, 4096),
    )


def read_qwen2(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads Qwen2 and Qwen2.5."""
    fields = _open(values)
    _fixed(fields, attention_bias=True, mlp_bias=False)
    attention = _attention(fields, kv_heads=32, qkv_bias=True)
    return DecoderConfig(
        **_body(fields, attention),
        ropes=(_rope(fields, attention),),
        layer_window=_qwen_windows(fields),
    )


def read_qwen3(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads Qwen3 (dense)."""
    fields = _open(values)
    _fixed(fields, mlp_bias=False)
    bias = fields.flag("attention_bias", False)
    attention = _attention(
        fields,
        kv_heads=32,
        head_dim=128,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=_norm(fields),
    )
    return DecoderConfig(
        **_body(fields, attention),
        ropes=(_rope(fields, attention),),
        layer_window=_qwen_windows(fields),
    )


def read_phi3(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads Phi-3, Phi-3.5 (dense) and Phi-4."""
    fields = _open(values)
    _fixed(fields, attention_bias=False, mlp_bias=False)
    attention = _attention(fields)
    return DecoderConfig(
        **_body(fields, attention, norm=_norm(fields, 1e-5)),
        ropes=(_rope(fields, attention, phi3=True),),
        layer_window=_uniform_windows(fields, None),
    )


def read_gemma2(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads Gemma 2: every other layer is local, logits are capped."""
    fields = _open(values)
    attention = _gemma_attention(
        fields, softcap=_softcap(fields, "attn_logit_softcapping", 50.0)
    )
    layers = _layers(fields)
    types = _layer_types(fields, [LAYER_TYPES[(i + 1) % 2] for i in range(layers)])
    return DecoderConfig(
        **_gemma_body(fields, attention),
        ropes=(_rope(fields, attention),),
        layer_window=_gemma_windows(fields, types),
        final_softcap=_softcap(fields, "final_logit_softcapping", 30.0),
    )


def read_gemma3_text(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads Gemma 3 without its vision encoder."""
    return _gemma3(_open(values))


def read_gemma3(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads the decoder of Gemma 3 with its vision encoder."""
    outer = _open(values)
    text = outer.section("text_config")
    if text is None:
        raise outer.error("text_config", "an object {...}")
    tied = outer.flag("tie_word_embeddings", True)
    inner = {"tie_word_embeddings": tied} | dict(text.values)
    return _gemma3(_open(inner, text.place))


def read_gpt2(values: Mapping[str, Any]) -> DecoderConfig:
    """Reads GPT-2."""
    fields = _open(values)
    width = fields.integer("n_embd", high=MAX_SIZE)
    heads = fields.integer("n_head", high=MAX_HEADS)
    if width % heads:
        raise fields.error("n_embd", f"a multiple of 'n_head', {heads}")
    eps = fields.number("layer_norm_epsilon", 1e-5, low=0.0, high=1.0)
    scaled = fields.flag("scale_attn_weights", True)
    return DecoderConfig(
        vocabulary=fields.integer("vocab_size", high=MAX_VOCABULARY),
        width=width,
        num_layers=fields.integer("n_layer", high=MAX_LAYERS),
        # The table of positions is an array, and bounded like one.
        max_positions=fields.integer("n_positions", high=MAX_VOCABULARY),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            qkv_bias=True,
            output_bias=True,
            scale=None if scaled else 1.0,
        ),
        mlp=MlpConfig(
            hidden=fields.integer("n_inner", 4 * width, high=MAX_SIZE),
            activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
            gated=False,
            bias=True,
        ),
        norm=NormConfig(kind="layer", eps=eps, bias=True),
        learned_positions=True,
        tied_head=fields.flag("tie_word_embeddings", True),
    )


def _gemma3(fields: Fields) -> DecoderConfig:
    # The reference has the key and never reads it, so a cap would be a guess.
    if fields.has("attn_logit_softcapping"):
        raise fields.error("attn_logit_softcapping", "null for this model_type")
    # Official files of the vision-language models leave most sizes out.
    defaults = {"vocab_size": 262_208, "max_position_embeddings": 131_072}
    attention = _gemma_attention(fields, heads=8, qk_norm=_norm(fields, offset=1.0))
    every = fields.integer("sliding_window_pattern", 6, high=MAX_LAYERS)
    kinds = [LAYER_TYPES[(i + 1) % every > 0] for i in range(_layers(fields))]
    types = _layer_types(fields, kinds)
    body = _gemma_body(fields, attention, **defaults)
    return DecoderConfig(
        **body,
        ropes=read_layer_ropes(fields, attention.head_dim, body["max_positions"]),
        layer_rope=tuple(LAYER_TYPES.index(t) for t in types),
        layer_window=_gemma_windows(fields, types),
        final_softcap=_softcap(fields, "final_logit_softcapping", None),
    )


def _gemma_attention(fields: Fields, **traits: Any) -> AttentionConfig:
    bias = fields.flag("attention_bias", False)
    scalar = fields.number("query_pre_attn_scalar", 256.0, low=1e-3, high=1e6)
    return _attention(
        fields,
        kv_heads=4,
        head_dim=256,
        qkv_bias=bias,
        output_bias=bias,
        scale=scalar**-0.5,
        **traits,
    )


def _gemma_body(
    fields: Fields, attention: AttentionConfig, **defaults: Any
) -> dict[str, Any]:
    _fixed(fields, mlp_bias=False)
    body = _body(fields, attention, norm=_norm(fields, offset=1.0), **defaults)
    activation = fields.choice("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh")
    return body | {
        "mlp": MlpConfig(hidden=body["mlp"].hidden, activation=activation),
        "post_norms": True,
        "embedding_scale": body["width"] ** 0.5,
        "tied_head": fields.flag("tie_word_embeddings", True),
    }


def _open(values: Mapping[str, Any], place: str = "") -> Fields:
    """Returns typed access, once nothing in the file asks for what is not there."""
    fields = Fields(values, place)
    for key in ("quantization_config", "compression_config"):
        quantization = fields.values.get(key)
        if quantization:
            method = "another program"
            if isinstance(quantization, Mapping):
                method = shown(quantization.get("quant_method", method)).strip('"')
            raise ConfigError(
                f"cannot read config: {FILE_NAME}: '{place}{key}' says that the "
                f"weights were quantized by {method}, expected plain weights. Load "
                "the checkpoint that they were made from."
            )
    for key, implemented in _SWITCHES.items():
        if fields.flag(key, implemented) != implemented:
            word = "true" if implemented else "false"
            raise fields.error(key, word, "Nothing else is implemented.")
    for key in _EMPTY:
        if fields.values.get(key):
            raise fields.error(key, "null", "Nothing else is implemented.")
    for key in ("torch_dtype", "dtype"):
        # The weights say their dtype themselves; nonsense here means damage.
        if not isinstance(fields.values.get(key, ""), str | None):
            raise fields.error(key, "the name of a dtype")
    return fields


def _fixed(fields: Fields, **values: bool) -> None:
    """Refuses a file that says otherwise than its family always has it."""
    for key, value in values.items():
        if fields.flag(key, value) != value:
            word = "true" if value else "false"
            raise fields.error(key, f"{word} for this model_type")


def _body(
    fields: Fields,
    attention: AttentionConfig,
    *,
    mlp_bias: bool = False,
    norm: NormConfig | None = None,
    **defaults: Any,
) -> dict[str, Any]:
    """Reads what all Llama-like families have, as arguments of `DecoderConfig`."""

    def size(key: str, high: int) -> int:
        return fields.integer(key, defaults.get(key, REQUIRED), high=high)

    return {
        "vocabulary": size("vocab_size", MAX_VOCABULARY),
        "width": size("hidden_size", MAX_SIZE),
        "num_layers": _layers(fields),
        "max_positions": size("max_position_embeddings", MAX_POSITIONS),
        "attention": attention,
        "mlp": MlpConfig(
            hidden=size("intermediate_size", MAX_SIZE),
            activation=fields.choice("hidden_act", _ACTIVATIONS, "silu"),
            bias=mlp_bias,
        ),
        "norm": _norm(fields) if norm is None else norm,
        "tied_head": fields.flag("tie_word_embeddings", False),
    }


def _attention(
    fields: Fields,
    *,
    heads: Any = REQUIRED,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    **traits: Any,
) -> AttentionConfig:
    """Reads the heads; the arguments stand for absent keys, None for derived ones."""
    heads = fields.integer("num_attention_heads", heads, high=MAX_HEADS)
    if kv_heads is None or "num_key_value_heads" in fields.values:
        kv_heads = heads
    kv_heads = fields.integer("num_key_value_heads", kv_heads, high=MAX_HEADS)
    if heads % kv_heads:
        raise fields.error(
            "num_attention_heads", f"a multiple of 'num_key_value_heads', {kv_heads}"
        )
    head_dim = fields.integer("head_dim", head_dim, high=MAX_HEADS)
    if head_dim is None:
        width = fields.integer("hidden_size", high=MAX_SIZE)
        if width % heads:
            raise fields.error(
                "hidden_size", f"a multiple of 'num_attention_heads', {heads}"
            )
        head_dim = width // heads
    return AttentionConfig(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **traits
    )


def _layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", high=MAX_LAYERS)


def _norm(fields: Fields, eps: float = 1e-6, offset: float = 0.0) -> NormConfig:
    eps = fields.number("rms_norm_eps", eps, low=0.0, high=1.0)
    return NormConfig(eps=eps, offset=offset)


def _rope(
    fields: Fields, attention: AttentionConfig, *, phi3: bool = False
) -> RopeConfig:
    positions = fields.integer("max_position_embeddings", high=MAX_POSITIONS)
    return read_rope(fields, attention.head_dim, positions, phi3=phi3)


def _softcap(fields: Fields, key: str, default: float | None) -> float | None:
    return fields.optional_number(key, default, low=1e-3, high=1e6)


def _window(fields: Fields, default: int | None) -> int:
    window = fields.optional_integer("sliding_window", default, high=MAX_POSITIONS)
    return GLOBAL_WINDOW if window is None else window


def _windows(types: list[str], window: int) -> tuple[int, ...]:
    return tuple(window if t == LAYER_TYPES[1] else GLOBAL_WINDOW for t in types)


def _layer_types(fields: Fields, default: list[str]) -> list[str]:
    if not fields.has("layer_types"):
        return default
    return fields.words("layer_types", len(default), LAYER_TYPES)


def _uniform_windows(fields: Fields, default: int | None) -> tuple[int, ...]:
    """Reads the window of a family whose layers are all alike."""
    window, layers = _window(fields, default), _layers(fields)
    if fields.has("layer_types"):
        fields.words("layer_types", layers, LAYER_TYPES[window != GLOBAL_WINDOW :][:1])
    return (window,) * layers


def _qwen_windows(fields: Fields) -> tuple[int, ...]:
    """Reads the windows of Qwen, whose last layers are the local ones."""
    layers, window = _layers(fields), GLOBAL_WINDOW
    if fields.flag("use_sliding_window", False):
        window = _window(fields, 4096)
    first = layers
    if window != GLOBAL_WINDOW:
        count = fields.values.get("max_window_layers")
        # A count of layers, so that 0 is meant.
        none = type(count) is int and count == 0
        first = 0 if none else fields.integer("max_window_layers", 28, high=MAX_LAYERS)
    types = _layer_types(fields, [LAYER_TYPES[i >= first] for i in range(layers)])
    if window == GLOBAL_WINDOW and LAYER_TYPES[1] in types:
        raise fields.error(
            "layer_types", "no local layer without 'use_sliding_window' and a window"
        )
    return _windows(types, window)


def _gemma_windows(fields: Fields, types: list[str]) -> tuple[int, ...]:
    window = _window(fields, 4096)
    if window == GLOBAL_WINDOW and LAYER_TYPES[1] in types:
        raise fields.error("sliding_window", f"an integer from 1 to {MAX_POSITIONS}")
    return _windows(types, window)

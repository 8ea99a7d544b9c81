"""Where each of our arrays comes from in a Hugging Face checkpoint, per family.

A map follows from the configuration alone: no file is read. One layer of a family is
a list of rules; what differs is which projections are fused and what norms are called.
"""

import dataclasses

from jaxllm.models.decoder import DecoderConfig

__all__ = [
    "TensorRule",
    "gemma3_rules",
    "gpt2_rules",
    "llama_rules",
    "phi3_rules",
]

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one of our arrays comes from in a Hugging Face checkpoint.

    Attributes:
      path: Keys from the root of the tree to the array; layers are counted from 0 and
        carry no leading axis: `("layers", 3, "attention", "query", "kernel")`.
      source: Name of the tensor.
      transpose: Whether the tensor is `[out, in]`; our kernels are `[in, out]`.
      part: `(start, stop)` along the tensor's output axis, where it holds several
        projections; the whole tensor when None. The output axis is axis 0 of a
        tensor that is transposed, and the last axis of any other.
    """

    path: Path
    source: str
    transpose: bool = False
    part: tuple[int, int] | None = None


def llama_rules(
    config: DecoderConfig, prefix: str = "model.", head: str = "lm_head."
) -> tuple[TensorRule, ...]:
    """Returns the rules of every family with separate, Llama-named projections.

    Args:
      config: The model; biases, head norms and post norms follow from it.
      prefix: What stands before the names of the decoder's tensors.
      head: What stands before the name of the output head's.
    """
    rules = _ends(config, prefix, head)
    for i in range(config.num_layers):
        layer = f"{prefix}layers.{i}."
        rules += _norms(config, i, layer)
        attention = config.attention
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            path, source = ("attention", ours), f"self_attn.{theirs}_proj"
            rules += _linear(i, path, layer + source, bias=attention.qkv_bias)
        rules += _linear(
            i,
            ("attention", "output"),
            f"{layer}self_attn.o_proj",
            bias=attention.output_bias,
        )
        for name in ("gate", "up", "down"):
            source = f"{layer}mlp.{name}_proj"
            rules += _linear(i, ("mlp", name), source, bias=config.mlp.bias)
    return tuple(rules)


def gemma3_rules(config: DecoderConfig) -> tuple[TensorRule, ...]:
    """Returns the rules of Gemma 3 beside a vision encoder."""
    return llama_rules(config, "language_model.model.", "language_model.lm_head.")


def phi3_rules(config: DecoderConfig) -> tuple[TensorRule, ...]:
    """Returns the rules of Phi-3, whose q, k, v and whose gate, up are fused."""
    rules = _ends(config, "model.", "lm_head.")
    attention, hidden = config.attention, config.mlp.hidden
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    qkv = {
        "query": (0, queries),
        "key": (queries, queries + keys),
        "value": (queries + keys, queries + 2 * keys),
    }
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        rules += _norms(config, i, layer)
        for name, part in qkv.items():
            source = f"{layer}self_attn.qkv_proj"
            rules += _linear(i, ("attention", name), source, part=part)
        rules += _linear(i, ("attention", "output"), f"{layer}self_attn.o_proj")
        for name, part in {"gate": (0, hidden), "up": (hidden, 2 * hidden)}.items():
            source = f"{layer}mlp.gate_up_proj"
            rules += _linear(i, ("mlp", name), source, part=part)
        rules += _linear(i, ("mlp", "down"), f"{layer}mlp.down_proj")
    return tuple(rules)


def gpt2_rules(config: DecoderConfig) -> tuple[TensorRule, ...]:
    """Returns the rules of GPT-2, whose matrices are stored `[in, out]`."""
    prefix, width = "transformer.", config.width
    rules = [
        TensorRule(("embedder", "table"), f"{prefix}wte.weight"),
        TensorRule(("embedder", "positions"), f"{prefix}wpe.weight"),
        *_norm(("final_norm",), f"{prefix}ln_f", bias=True),
    ]
    if not config.tied_head:
        rules.append(TensorRule(("head", "kernel"), "lm_head.weight", transpose=True))
    qkv = {name: i for i, name in enumerate(("query", "key", "value"))}
    for i in range(config.num_layers):
        layer = f"{prefix}h.{i}."
        rules += _norm(("layers", i, "attention_norm"), f"{layer}ln_1", bias=True)
        rules += _norm(("layers", i, "mlp_norm"), f"{layer}ln_2", bias=True)
        for name, third in qkv.items():
            rules += _linear(
                i,
                ("attention", name),
                f"{layer}attn.c_attn",
                bias=True,
                transpose=False,
                part=(third * width, (third + 1) * width),
            )
        for path, source in (
            (("attention", "output"), "attn.c_proj"),
            (("mlp", "up"), "mlp.c_fc"),
            (("mlp", "down"), "mlp.c_proj"),
        ):
            rules += _linear(i, path, layer + source, bias=True, transpose=False)
    return tuple(rules)


def _ends(config: DecoderConfig, prefix: str, head: str) -> list[TensorRule]:
    rules = [
        TensorRule(("embedder", "table"), f"{prefix}embed_tokens.weight"),
        *_norm(("final_norm",), f"{prefix}norm", bias=config.norm.bias),
    ]
    if not config.tied_head:
        rules.append(TensorRule(("head", "kernel"), f"{head}weight", transpose=True))
    return rules


def _norms(config: DecoderConfig, i: int, layer: str) -> list[TensorRule]:
    # With post norms, "post_attention" names what follows attention; without, what
    # precedes the feed-forward block.
    names = {"attention_norm": "input", "mlp_norm": "post_attention"}
    if config.post_norms:
        names = {
            "attention_norm": "input",
            "attention_post_norm": "post_attention",
            "mlp_norm": "pre_feedforward",
            "mlp_post_norm": "post_feedforward",
        }
    rules = []
    for ours, theirs in names.items():
        rules += _norm(
            ("layers", i, ours), f"{layer}{theirs}_layernorm", bias=config.norm.bias
        )
    if config.attention.qk_norm is not None:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            path = ("layers", i, "attention", ours)
            bias = config.attention.qk_norm.bias
            rules += _norm(path, f"{layer}self_attn.{theirs}", bias=bias)
    return rules


def _norm(path: Path, source: str, *, bias: bool) -> list[TensorRule]:
    rules = [TensorRule((*path, "scale"), f"{source}.weight")]
    if bias:
        rules.append(TensorRule((*path, "bias"), f"{source}.bias"))
    return rules


def _linear(
    i: int,
    path: tuple[str, str],
    source: str,
    *,
    bias: bool = False,
    transpose: bool = True,
    part: tuple[int, int] | None = None,
) -> list[TensorRule]:
    path_to = ("layers", i, *path)
    rules = [TensorRule((*path_to, "kernel"), f"{source}.weight", transpose, part)]
    if bias:
        rules.append(TensorRule((*path_to, "bias"), f"{source}.bias", False, part))
    return rules

"""What `jaxllm doctor` computes twice, in two ways that have to agree."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.attention import RopeConfig, init_cache
from jaxllm.decoding import Request, decode, make_sampler
from jaxllm.drafting import Autoregressive
from jaxllm.layers.attention import AttentionConfig
from jaxllm.layers.mlp import MlpConfig
from jaxllm.models import DecoderConfig, make_model
from jaxllm.quantization import Int8
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.operands import Keys
from pallas_kernels.quant_matmul import IntWeight, pack_int4, quant_matmul

__all__ = ["SELF_TESTS"]

# Accelerators multiply float32 in parts; a wrong result is off by far more than this.
_TOLERANCE = 0.02

_CONFIG = DecoderConfig(
    vocabulary=97,
    width=32,
    num_layers=2,
    max_positions=64,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=MlpConfig(hidden=48),
    ropes=(RopeConfig(rotary_dim=8),),
)


def generation() -> None:
    """Checks that cached decoding of a ragged batch equals whole forwards."""
    model, params = make_model(_CONFIG, jax.random.key(0))
    prompts = [[5, 17, 80, 3, 41], [9]]
    request = Request(
        prompts=prompts, max_new_tokens=[6, 6], sampler=make_sampler(2), seeds=[0, 1]
    )
    outputs = decode(
        model, {"target": params, "drafter": {}}, request, drafter=Autoregressive()
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = [*prompt, *output.token_ids]
        logits_TV = np.asarray(model(params, jnp.asarray([ids])).logits_BTV[0])
        scored_TV = logits_TV[len(prompt) - 1 : -1]
        best_T = scored_TV.max(axis=-1)
        chosen_T = scored_TV[np.arange(len(scored_TV)), output.token_ids]
        if not (best_T - chosen_T <= _TOLERANCE * scored_TV.std()).all():
            raise ArithmeticError("a token was chosen that is not the likeliest")


def int8_weights() -> None:
    """Checks that int8 weights are near, and multiply like the array they stand for."""
    weight = jax.random.normal(jax.random.key(1), (64, 48))
    x = jax.random.normal(jax.random.key(2), (2, 3, 64))
    leaf = Int8().quantize(weight)
    _agree(leaf.dequantize(jnp.float32), weight)
    product = leaf.einsum("btd,df->btf", x, jnp.float32)
    _agree(product, jnp.einsum("btd,df->btf", x, leaf.dequantize(jnp.float32)))


def cache() -> None:
    """Checks that a cache keeps what each row accepted, and nothing else."""
    empty = init_cache(
        [2], rows=2, capacity=8, kv_heads=[1], head_dim=4, dtype=jnp.float32
    )
    new = jax.random.normal(jax.random.key(3), (2, 2, 1, 3, 4))
    grown = jax.jit(
        lambda cache, new: cache.append([(new, -new)], count_B=jnp.asarray([3, 1]))
    )(empty, new)
    if grown.length_B.tolist() != [3, 1]:
        raise ArithmeticError(f"lengths are {grown.length_B.tolist()}, not [3, 1]")
    for row, length in enumerate((3, 1)):
        kept = new[:, row, :, :length]
        if not jnp.array_equal(grown.k[0][:, row, :, :length], kept):
            raise ArithmeticError(f"keys of row {row} are not those appended")
        if not jnp.array_equal(grown.v[0][:, row, :, :length], -kept):
            raise ArithmeticError(f"values of row {row} are not those appended")
        if grown.k[0][:, row, :, length:].any():
            raise ArithmeticError(f"row {row} holds keys that it did not accept")


def attention_kernel() -> None:
    """Checks that attention to a cache, as it is run here, equals its reference."""
    shape = (3, 2, 40, 128)
    q_BTNH = jax.random.normal(jax.random.key(4), (3, 2, 4, 128), jnp.bfloat16)
    k, v = (jax.random.normal(jax.random.key(i), shape, q_BTNH.dtype) for i in (5, 6))
    keys = Keys(k, v, jnp.asarray([40, 1, 17]))
    found, wanted = (
        decode_attention(q_BTNH, keys, implementation=name)
        for name in (None, "reference")
    )
    for ours, theirs in zip(found, wanted, strict=True):
        _agree(ours, theirs)


def matmul_kernel() -> None:
    """Checks that a product with int4 weights, as it is run here, is right."""
    values = jax.random.randint(jax.random.key(7), (256, 128), -8, 8)
    scale = jax.random.uniform(jax.random.key(8), (2, 128), minval=0.5)
    x_MD = jax.random.normal(jax.random.key(9), (8, 256))
    weight = IntWeight(pack_int4(values), scale)
    whole = (values * jnp.repeat(scale, 128, axis=0)).astype(jnp.float32)
    _agree(quant_matmul(x_MD, weight), x_MD @ whole)


def _agree(found: jax.Array, wanted: jax.Array) -> None:
    error = float(jnp.abs(found - wanted).max() / wanted.std())
    if not error <= _TOLERANCE:
        raise ArithmeticError(f"results differ by {error:.3g} standard deviations")


SELF_TESTS: dict[str, Callable[[], None]] = {
    "generation equals a plain loop of forwards": generation,
    "int8 weights multiply like the array they stand for": int8_weights,
    "the cache keeps what was accepted": cache,
    "attention to a cache equals its reference": attention_kernel,
    "packed int4 weights multiply like the array they stand for": matmul_kernel,
}

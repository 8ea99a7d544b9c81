"""How much arithmetic a token costs, and what a device could do at most.

Letters: L layers, D width, F hidden width of the feed-forward block, N query heads,
K kv heads, H head dim, T tokens of a row.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models import DecoderConfig

__all__ = ["flops_per_token", "peak_flops"]

_BFLOAT16_PEAKS = {
    "v4": 275e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v5": 459e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
}
"""Operations a second with bfloat16 operands, by a part of the device's name; those of
the makers' data sheets, without sparsity."""


def flops_per_token(config: DecoderConfig, length: int) -> float:
    """Returns the operations of a forward and backward for a token.

    Two for each multiplication and addition, three times over (forward, and backward
    for activations and weights). Attention counts the keys that a token sees on
    average, half of the row. Embedding rows are looked up and count nothing.

    Args:
      config: The model.
      length: T.
    """
    attention = config.attention
    D, H = config.width, attention.head_dim
    heads = 2 * attention.num_heads + 2 * attention.num_kv_heads
    gates = 3 if config.mlp.gated else 2
    layer = D * H * heads + gates * D * config.mlp.hidden
    matrices = config.num_layers * layer + D * config.vocabulary
    mixing = config.num_layers * attention.num_heads * H * length
    return 6.0 * (matrices + mixing)


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Returns the operations a second that a device can do at most.

    Args:
      device: The first one when None.

    Returns:
      Of a known accelerator what its maker states for bfloat16; of a CPU the best of
      a few large float32 products; None for what is unknown.
    """
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        return _measured(device)
    kind = device.device_kind.lower()
    return next((peak for name, peak in _BFLOAT16_PEAKS.items() if name in kind), None)


def _measured(device: jax.Device, size: int = 1024) -> float:
    x = jax.device_put(np.ones((size, size), np.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best

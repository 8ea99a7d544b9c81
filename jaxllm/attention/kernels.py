"""Segments on a TPU: which of them a kernel reads, and how it is called over a mesh.

Keys that precede all queries (a cache, pages, a shared prefix) are read by a kernel,
which leaves the layers of a stacked cache where they are and writes no logits. New
tokens among themselves are few, or have their order in positions; they stay with XLA.

Letters: B rows, T queries, N query heads, K kv heads, H head dim, S keys, U users of a
segment, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxllm.attention.masks import GLOBAL_WINDOW
from jaxllm.core.sharding import ShardingRules

__all__ = ["attend_by_kernel"]

Parts = tuple[Array, Array]


def attend_by_kernel(
    q_BTNH: Array,
    query_position_BT: Array,
    segment: Any,
    *,
    scale: float,
    softcap: float | None,
    window: Array | int,
    rules: ShardingRules | None,
    implementation: str | None,
) -> Parts | None:
    """Attends over a segment by a kernel, where there is one for it.

    Args:
      q_BTNH: As for `attend_segment`, like all but the last.
      query_position_BT: See there.
      segment: See there; not one with `rows_UR`.
      scale: See there.
      softcap: See there.
      window: See there.
      rules: See there.
      implementation: As for `pallas_kernels.dispatch.choose`; None is the kernel of a
        TPU, and nothing elsewhere.

    Returns:
      Output and log-sum-exp, or None where the segment is left to XLA.
    """
    if implementation is None and _platform() != "tpu":
        return None
    simple = segment.mask.kind == "full" and segment.row_B is None
    if not simple or segment.position_US is not None or segment.valid_US is not None:
        return None
    call = _Call(segment, scale, softcap, implementation)
    users, rows = call.users(q_BTNH.shape[0]), q_BTNH.shape[0]
    split = _split(q_BTNH, segment, users, rules)
    if split is None or rows % users:
        return None
    local = isinstance(window, int) and window >= GLOBAL_WINDOW
    position_BT = query_position_BT
    if segment.start_U is not None:
        position_BT = position_BT - jnp.repeat(segment.start_U, rows // users)[:, None]
    reach = None if local else jnp.int32(window)
    arrays = (q_BTNH, position_BT, reach, segment.k_UKSH, segment.v_UKSH)
    found = split(call.function(users))(*arrays, *call.rest(users))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A call of an op on the arrays of a segment.

    Attributes:
      segment: The keys.
      scale: Of the logits.
      softcap: Of the logits.
      implementation: Of the op.
    """

    segment: Any
    scale: float
    softcap: float | None
    implementation: str | None

    def users(self, rows: int) -> int:
        """Returns U; rows of pages have tables of their own."""
        paged = self.segment.pages_BN is not None
        return rows if paged else self.segment.k_UKSH.shape[-4]

    def rest(self, users: int) -> tuple[Any, ...]:
        """Returns lengths, layer and pages as the op takes them."""
        segment = self.segment
        length_U = segment.length_U
        if length_U is None and segment.pages_BN is None:
            length_U = jnp.full((users,), segment.k_UKSH.shape[-2], jnp.int32)
        layer = jnp.int32(0 if segment.layer is None else segment.layer)
        return length_U, layer, segment.pages_BN

    def function(self, users: int) -> Callable[..., Parts]:
        """Returns the op as a function of arrays only."""
        # jax's kernels take a while to import, and a CPU never needs them.
        from pallas_kernels.decode_attention import decode_attention
        from pallas_kernels.operands import Keys, Logits, PagedKeys
        from pallas_kernels.prefix_attention import prefix_attention

        logits = Logits(scale=self.scale, softcap=self.softcap)
        options: dict[str, Any] = {
            "logits": logits,
            "implementation": self.implementation,
        }

        def run(
            q: Array,
            position: Array,
            window: Array | None,
            k: Array,
            v: Array,
            length: Array,
            layer: Array,
            pages: Array | None,
        ) -> Parts:
            if pages is not None:
                keys: Any = PagedKeys(k, v, length, pages, layer=layer)
                return decode_attention(q, keys, position, window, **options)
            B, T, N, H = q.shape
            held = k.shape[-4]  # users on this device
            if held == 1 and B > 1:
                one = Keys(k.squeeze(-4), v.squeeze(-4), length[0], layer=layer)
                return prefix_attention(q, one, position, window, **options)
            rows = (held, B // held * T)
            out, lse = decode_attention(
                q.reshape(*rows, N, H),
                Keys(k, v, length, layer=layer),
                position.reshape(rows),
                window,
                **options,
            )
            return out.reshape(B, T, N, H), lse.reshape(B, T, N)

        return run


def _platform() -> str:
    """Returns what is traced for: the mesh's devices, which need not be here."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def _split(
    q_BTNH: Array, segment: Any, users: int, rules: ShardingRules | None
) -> Callable[[Callable[..., Parts]], Callable[..., Parts]] | None:
    """Returns what makes every device run a function on its part of the arrays.

    None where the parts do not belong together: slots that are split, kv heads that do
    not divide, groups of rows of several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return lambda function: function
    rows = q_BTNH.shape[0]
    if rules is None or mesh.shape["sequence"] > 1:
        return None
    stacked = segment.k_UKSH.ndim == 5
    shape = segment.k_UKSH.shape[-4:]
    query = rules.spec(("batch", None, "heads", None), q_BTNH.shape, mesh)
    names = ("batch" if users == rows else None, "kv_heads", None, None)
    if segment.pages_BN is not None:
        names = (None, "kv_heads", None, None)
    key = rules.spec(names, shape, mesh)
    if query[2] != key[1] or (query[0] is not None and users not in (1, rows)):
        return None
    by_row, by_user = PartitionSpec(query[0]), PartitionSpec(key[0])
    if segment.pages_BN is not None:
        by_user = by_row
    keys = PartitionSpec(None, *key) if stacked else key
    every = PartitionSpec()
    in_specs = (query, by_row, every, keys, keys, by_user, every, by_row)
    out_specs = (query, PartitionSpec(*query[:3]))

    def split(function: Callable[..., Parts]) -> Callable[..., Parts]:
        return jax.shard_map(
            function, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    return split

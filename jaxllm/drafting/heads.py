"""Medusa: heads on the target's last hidden state guess the tokens behind the next.

Letters: B rows, M draft nodes, D width, V vocabulary, K heads, R ranks, W draft width.
"""

import dataclasses
import importlib.resources
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxllm.checkpoints.safetensors import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from jaxllm.core.einsum import einsum
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.core.pytree import pytree_dataclass
from jaxllm.decoding.protocol import Committed, Draft, Drafter, Params, Verdict
from jaxllm.decoding.sampling import candidates
from jaxllm.drafting.trees import StaticTree
from jaxllm.models.freeze import Forward, Model

__all__ = ["HeadsDrafter", "head_logits", "save_heads"]

_KERNEL = "heads"
_ACCURACY = "accuracy"


@pytree_dataclass
class HeadsState:
    """What the heads look at.

    Attributes:
      hidden_BD: The residual stream that the pending token was chosen from.
      known_B: Whether there is one: a prompt of one token has none.
    """

    hidden_BD: Array
    known_B: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsDrafter(Drafter):
    """Medusa heads: head k guesses the k-th token behind the pending one.

    The heads do not see each other's guesses; their best candidates form a tree whose
    shape follows from accuracies that were measured when they were trained.

    Attributes:
      heads: File that `experiments/train_heads.py` wrote, or the name of shipped heads.
      nodes: M, nodes of the tree, the pending one included.

    Source: Medusa (arXiv 2401.10774), sections 2.1 and 2.3.3.

    Differs from the paper: all heads share the target's own output matrix, and only
      tokens that the target would have chosen are accepted (no typical acceptance).
    """

    heads: str = "demo-heads"
    nodes: int = 8
    shape: StaticTree | None = dataclasses.field(default=None, init=False)
    target: Model | None = dataclasses.field(default=None, init=False)
    tree = True
    reads_hidden = True

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ConfigError(
                f"cannot draft: heads.nodes is {self.nodes}, expected 2 or more. "
                f"Correct it."
            )

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Of the tree; known once the heads are loaded."""
        return 1 if self.shape is None else self.shape.depth

    def bind(self, lm: Any) -> tuple[Drafter, Any]:
        """Loads the heads and plans the tree."""
        kernel_KDD, accuracy_KR = load_heads(self.heads)
        width = lm.config.width
        if kernel_KDD.shape[1:] != (width, width):
            raise ConfigError(
                f"cannot draft: {self.heads}: heads have width "
                f"{kernel_KDD.shape[1]}, expected {width}, the target's. Train heads "
                f"for this target."
            )
        bound = dataclasses.replace(self)
        shape = StaticTree.from_accuracy(accuracy_KR, self.nodes)
        object.__setattr__(bound, "shape", shape)
        object.__setattr__(bound, "target", lm.model)
        kernel = jnp.asarray(kernel_KDD, lm.model.policy.compute)
        return bound, {"kernel": kernel}

    def init(
        self, params: Params, committed: Committed, prefill: Forward
    ) -> HeadsState:
        """Starts from the prompt's last hidden state."""
        return HeadsState(prefill.hidden_BTD[:, -1], committed.length_B > 1)

    def propose(
        self, params: Params, state: HeadsState, committed: Committed
    ) -> tuple[HeadsState, Draft]:
        """Fills the tree with the heads' candidates."""
        shape, target = self.shape, self.target
        if shape is None or target is None:
            raise ConfigError(
                "cannot draft: HeadsDrafter has no heads yet, expected a bound "
                "drafter. Call its bind, or jaxllm.bind."
            )
        logits_BKV = head_logits(
            target, params["target"], params["drafter"]["kernel"], state.hidden_BD
        )[:, : shape.depth]
        position_BK = committed.length_B[:, None] + jnp.arange(shape.depth)
        tokens_BKW, _ = candidates(
            logits_BKV,
            position_BK,
            committed.row_key_B,
            committed.choice,
            shape.width,
        )
        tokens = [
            tokens_BKW[:, shape.depths[i] - 1, shape.ranks[i]]
            for i in range(1, shape.nodes)
        ]
        draft = shape.draft(committed.pending_B, tokens)
        root = jnp.arange(shape.nodes) == 0
        valid_BM = root | state.known_B[:, None]
        return state, dataclasses.replace(draft, valid_BM=valid_BM)

    def observe(
        self,
        params: Params,
        state: HeadsState,
        committed: Committed,
        draft: Draft,
        verdict: Verdict,
        forward: Forward,
    ) -> HeadsState:
        """Keeps the hidden state of the last accepted node."""
        node_B11 = verdict.path_BJ[:, -1][:, None, None]
        hidden_BD = jnp.take_along_axis(forward.hidden_BTD, node_B11, axis=1)[:, 0]
        return HeadsState(hidden_BD, jnp.ones_like(state.known_B))


def head_logits(
    model: Model, params: Any, kernel_KDD: Array, hidden_XD: Array
) -> Array:
    """Returns the logits of all heads, `[X, K, V]` float32.

    Args:
      model: The target.
      params: Its parameters.
      kernel_KDD: The heads; zeros guess what the target's own head does.
      hidden_XD: Residual stream after the last layer, of any number of positions.
    """
    x_XD = model.normalize(params, hidden_XD)
    h_XKD = x_XD[:, None] + jnp.stack(
        [
            jax.nn.silu(einsum("xd,df->xf", x_XD, kernel_KDD[k], out_dtype=jnp.float32))
            for k in range(kernel_KDD.shape[0])
        ],
        axis=1,
    ).astype(x_XD.dtype)
    return model.head(params, h_XKD)


def save_heads(
    path: str | os.PathLike[str],
    kernel_KDD: Any,
    accuracy_KR: Sequence[Sequence[float]],
) -> None:
    """Writes heads to a safetensors file, with what is known of their accuracy."""
    metadata = {_ACCURACY: json.dumps([list(map(float, row)) for row in accuracy_KR])}
    write_safetensors(path, {_KERNEL: kernel_KDD}, metadata)


def load_heads(name: str) -> tuple[np.ndarray, list[list[float]]]:
    """Reads heads and their accuracy by depth and rank.

    Args:
      name: A file, or the name of heads that ship with the package.

    Raises:
      CheckpointError: There is no such file, or it holds no heads.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        shipped = importlib.resources.files("jaxllm").joinpath("_data", name)
        path = Path(str(shipped)) / "heads.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"cannot find heads: {name!r}: no such file or shipped heads, expected "
            f"what experiments/train_heads.py wrote. Check the path."
        )
    tensors, metadata = read_safetensors(path), read_metadata(path)
    if _KERNEL not in tensors or _ACCURACY not in metadata:
        raise CheckpointError(
            f"cannot read heads: {path}: holds {', '.join(sorted(tensors))}, expected "
            f"{_KERNEL!r} and its accuracies. Give a file of "
            f"experiments/train_heads.py."
        )
    kernel = tensors[_KERNEL].read()
    accuracy = json.loads(metadata[_ACCURACY])
    if kernel.ndim != 3 or len(accuracy) != kernel.shape[0]:
        raise CheckpointError(
            f"cannot read heads: {path}: heads of shape {kernel.shape} with "
            f"accuracies of {len(accuracy)}, expected [K, D, D] with K. Train them "
            f"again."
        )
    return np.asarray(kernel), accuracy

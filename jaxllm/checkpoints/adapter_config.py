"""`adapter_config.json` of the PEFT library: what is read of it, and how it is written.

Keys that only say how an adapter was trained or initialised are accepted unread; a key
that changes what is computed is refused by name. Patterns are taken as names of
modules, or ends of names: a regular expression of somebody else's is never run.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoints.files import quote, read_json_object
from jaxllm.core.errors import ConfigError

__all__ = ["CONFIG_NAME", "AdapterConfig", "config_content", "read_adapter_config"]

CONFIG_NAME = "adapter_config.json"

_READ = "cannot load adapter"
# What is computed with these is something else than `W x + scaling * B (A x)`.
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
# Ways to begin that leave the base model's weights alone; others change them.
_HARMLESS_STARTS = ("gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter's configuration says of its tensors.

    Attributes:
      rank: R of every module that `ranks` does not name.
      alpha: The same of alpha.
      rslora: Whether alpha is divided by sqrt(R) instead of R.
      ranks: R by a module's name or the end of it; the first that fits counts.
      alphas: alpha likewise.
      targets: Ends of the names of all modules that have an adapter; empty where the
        file does not say it by names.
      base_model: Name or path of the model that it was made for; may be empty.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: tuple[str, ...]
    base_model: str

    def rank_of(self, names: Sequence[str]) -> int:
        """Returns R of a module, by any of the names that it may have."""
        return _lookup(self.ranks, names, self.rank)

    def scaling_of(self, names: Sequence[str], rank: int) -> float:
        """Returns what `B A` of a module counts.

        Source: LoRA (arXiv 2106.09685), section 4.1; rsLoRA (arXiv 2312.03732),
          section 3.
        """
        alpha = _lookup(self.alphas, names, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_target(self, names: Sequence[str]) -> bool:
        """Whether the file promises an adapter for a module."""
        return any(_fits(target, name) for target in self.targets for name in names)


def _fits(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _lookup(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    for pattern, value in patterns.items():
        if any(_fits(pattern, name) for name in names):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads the configuration of an adapter.

    Args:
      folder: The directory that holds it.

    Returns:
      The part of it that matters.

    Raises:
      ConfigError: The file is absent or malformed, or the adapter is of a kind that is
        not implemented; the message names the key.
    """
    path = folder / CONFIG_NAME
    content = read_json_object(path, _READ)

    def wrong(key: str, wanted: str, action: str) -> ConfigError:
        found = quote(content.get(key))
        return ConfigError(
            f"{_READ}: {path}: {key!r} is {found}, expected {wanted}. {action}"
        )

    if content.get("peft_type") != "LORA":
        raise wrong("peft_type", "'LORA'", "Only LoRA is implemented.")
    for key in _REFUSED:
        if content.get(key):
            raise wrong(key, "none", "Only plain LoRA of projections is implemented.")
    if content.get("bias", "none") != "none":
        raise wrong("bias", "'none'", "Trained biases are not implemented.")
    start = content.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _HARMLESS_STARTS:
        raise wrong(
            "init_lora_weights",
            f"true, false or one of {', '.join(_HARMLESS_STARTS)}",
            "It changes the base model too: let peft convert it, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    for key, is_right, wanted in (
        ("r", _is_rank, "a whole number from 1"),
        ("lora_alpha", _is_number, "a number"),
        ("rank_pattern", _are(_is_rank), "an object of module names and ranks"),
        ("alpha_pattern", _are(_is_number), "an object of module names and numbers"),
    ):
        optional = key.endswith("pattern") and content.get(key) is None
        if not optional and not is_right(content.get(key)):
            raise wrong(key, wanted, "Correct the file.")
    return AdapterConfig(
        rank=content["r"],
        alpha=content["lora_alpha"],
        rslora=bool(content.get("use_rslora", False)),
        ranks=_literal(content.get("rank_pattern") or {}),
        alphas=_literal(content.get("alpha_pattern") or {}),
        targets=_targets(content),
        base_model=str(content.get("base_model_name_or_path") or ""),
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are(is_right: Any) -> Any:
    def every(value: Any) -> bool:
        return isinstance(value, dict) and all(map(is_right, value.values()))

    return every


def _literal(patterns: Mapping[str, Any]) -> dict[str, Any]:
    # `^model\.layers\.0\.mlp$` is a name that peft has escaped.
    return {
        key.removeprefix("^").removesuffix("$").replace("\\.", "."): value
        for key, value in patterns.items()
    }


def _targets(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the ends of names of all adapted modules, where they are given so."""
    targets = content.get("target_modules")
    restricted = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if not isinstance(targets, list) or any(content.get(key) for key in restricted):
        return ()
    if content.get("layers_to_transform") == 0:
        return ()
    return tuple(target for target in targets if isinstance(target, str))


def config_content(
    base_model: str,
    adapted: Mapping[str, tuple[int, np.float32]],
    modules: Sequence[str],
    is_transposed: bool,
) -> dict[str, Any]:
    """Returns the content of an adapter's configuration.

    Args:
      base_model: What the model was called when it was loaded.
      adapted: R and scaling of every adapted module by name.
      modules: Names of all modules that could be adapted.
      is_transposed: Whether the reference implementation keeps its matrices `[I, O]`.
    """
    ranks = {name: rank for name, (rank, _) in adapted.items()}
    alphas = {name: _alpha(scaling, rank) for name, (rank, scaling) in adapted.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {n: value for n, value in ranks.items() if value != rank},
        "alpha_pattern": {n: value for n, value in alphas.items() if value != alpha},
        "target_modules": _shortest(list(adapted), modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _alpha(scaling: np.float32, rank: int) -> float:
    """Returns the shortest number that divided by the rank is the scaling again."""
    exact = float(scaling) * rank
    for digits in range(1, 18):
        alpha = float(f"{exact:.{digits}g}")
        if np.float32(alpha / rank) == scaling:
            return int(alpha) if alpha.is_integer() else alpha
    return exact


def _shortest(adapted: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Returns names of adapted modules, or their last part where all have adapters."""
    targets: dict[str, None] = {}
    for name in adapted:
        last = name.rsplit(".", 1)[-1]
        alike = [module for module in modules if module.rsplit(".", 1)[-1] == last]
        targets[last if set(alike) <= set(adapted) else name] = None
    return list(targets)

"""What a run is: a frozen dataclass that a Python file returns from `get_config`."""

import dataclasses
import json
import math
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxllm.compression import LoraConfig
from jaxllm.core.configs import apply_overrides
from jaxllm.core.errors import ConfigError
from jaxllm.drafting import make_drafter
from jaxllm.models import DecoderConfig
from jaxllm.training.checkpoints import CheckpointConfig
from jaxllm.training.data import DataConfig
from jaxllm.training.documents import Documents
from jaxllm.training.objectives import OBJECTIVES, NextToken, Objective
from jaxllm.training.optimizers import OptimizerConfig
from jaxllm.training.streams import TrajectoryData

__all__ = [
    "EvaluationConfig",
    "Memory",
    "SampleConfig",
    "TrainConfig",
    "describe",
    "differences",
    "load_config",
]

FREE = ("log_every", "checkpoint", "sample", "evaluation.every", "tensorboard", "mesh")
"""What a resumed run may change without being asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The next-token loss on text that is not learned, whatever a run minimises.

    Attributes:
      data: The text; read once, to its end.
      every: Steps between two evaluations; the last step is evaluated too.
    """

    data: DataConfig
    every: int = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text of the model, to look at, and how many tokens of it a pass gave.

    Attributes:
      prompts: Their beginnings.
      every: Steps between two samples.
      max_new_tokens: Of each.
      temperature: 0 is greedy.
      decode: The method that writes it, as for `jaxllm.generate`.
    """

    prompts: tuple[str, ...] = ()
    every: int = 500
    max_new_tokens: int = 48
    temperature: float = 0.0
    decode: str = "autoregressive"

    def __post_init__(self) -> None:
        make_drafter(self.decode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run.

    Attributes:
      init_from: The model to go on from, as `jaxllm.load` takes it; empty to start
        from random weights.
      decoder: The architecture of a model that starts from random weights.
      tokenizer: For such a model: a `tokenizer.json`, or a model with the tokenizer.
      data: What is learned.
      objective: What is minimised.
      optimizer: How.
      steps: Of the run.
      accumulate: Forwards that a step's rows are spread over.
      lora: Trains an adapter of this kind; None trains all parameters.
      dtype: Of activations; parameters and optimizer are float32.
      remat: What a backward computes again instead of keeping: `none`, `dots` (all but
        products of weights) or `full` (all of a layer).
      mesh: Such as `data=2,fsdp=4`; empty for one device.
      seed: Of weights, of dropping and drawing in objectives; data has its own.
      evaluation: None evaluates nothing.
      sample: Text to look at.
      checkpoint: What is saved and when.
      log_every: Steps between two lines of metrics.
      max_skipped: Steps in a row whose gradients may be not finite; one more ends the
        run.
      tensorboard: Whether event files are written too.
    """

    data: DataConfig | TrajectoryData
    steps: int
    init_from: str = ""
    decoder: DecoderConfig | None = None
    tokenizer: str = ""
    objective: Objective = dataclasses.field(default_factory=NextToken)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    accumulate: int = 1
    lora: LoraConfig | None = None
    dtype: str = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    mesh: str = ""
    seed: int = 0
    evaluation: EvaluationConfig | None = None
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log_every: int = 10
    max_skipped: int = 3
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"cannot train: {name} is {getattr(self, name)}, expected 1 or "
                    f"more. Correct it."
                )
        if bool(self.init_from) == (self.decoder is not None):
            raise ConfigError(
                "cannot train: the configuration has "
                f"{'both' if self.init_from else 'neither'} of init_from and decoder, "
                "expected one of them. Name a model to go on from, or an architecture."
            )
        if self.decoder is not None and not self.tokenizer:
            raise ConfigError(
                "cannot train: a model from random weights has no tokenizer, expected "
                "one. Set tokenizer to a tokenizer.json, or to a model."
            )


Memory = Callable[[Any], Mapping[str, Documents]]
"""From a model's tokenizer to the sources of format `"memory"`, by name."""


def load_config(
    path: str, overrides: Iterable[str] = ()
) -> tuple[TrainConfig, Memory | None]:
    """Runs a configuration file and applies overrides.

    Args:
      path: A Python file with `get_config() -> TrainConfig`, and with `get_documents`
        where the configuration has sources in memory.
      overrides: As `core.configs.apply_overrides` takes them.

    Returns:
      The configuration, and `get_documents` or None.

    Raises:
      ConfigError: The file is absent or returns something else, or an override does
        not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"cannot read config: {path}: is no file, expected a Python file with "
            f"get_config(). Check the path."
        )
    try:
        found = _run(file)
    except SyntaxError as cause:
        raise ConfigError(
            f"cannot read config: {path}: line {cause.lineno}: {cause.msg}, expected "
            f"Python. Correct the file."
        ) from None
    if not callable(found.get("get_config")):
        raise ConfigError(
            f"cannot read config: {path}: has no get_config(), expected a function "
            f"that returns a TrainConfig. Add it."
        )
    config = found["get_config"]()
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"cannot read config: {path}: get_config() returned "
            f"{type(config).__name__}, expected a TrainConfig. Correct the file."
        )
    changed = apply_overrides(config, overrides, {Objective: OBJECTIVES})
    return changed, found.get("get_documents")


def _run(file: Path) -> dict[str, Any]:
    """Runs a configuration; it may import its neighbours, as any script may."""
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(file))
    finally:
        sys.path.remove(folder)


def describe(config: Any) -> Any:
    """Returns a configuration as JSON; methods name their class."""
    if dataclasses.is_dataclass(config):
        fields = {
            f.name: describe(getattr(config, f.name))
            for f in dataclasses.fields(config)
            if f.init
        }
        return {"kind": type(config).__name__, **fields}
    if isinstance(config, tuple | list):
        return [describe(item) for item in config]
    if isinstance(config, dict):
        return {str(k): describe(v) for k, v in config.items()}
    if isinstance(config, float) and not math.isfinite(config):
        return str(config)
    if config is None or isinstance(config, str | int | float | bool):
        return config
    return str(config)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns the paths at which two described configurations differ, with values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in [*old, *(k for k in new if k not in old)]
            for line in differences(
                old.get(key), new.get(key), f"{path}.{key}".lstrip(".")
            )
        ]
    if old == new:
        return []
    return [f"{path}: {json.dumps(old)[:60]} -> {json.dumps(new)[:60]}"]

"""Training: data, objectives, the step and the loop around it."""

from jaxllm.training.batch import Batch
from jaxllm.training.checkpoints import CheckpointConfig, Checkpointer
from jaxllm.training.config import (
    EvaluationConfig,
    SampleConfig,
    TrainConfig,
    load_config,
)
from jaxllm.training.data import BatchStream, DataConfig, open_data
from jaxllm.training.documents import Documents, Examples
from jaxllm.training.export import export
from jaxllm.training.loop import DivergedError, PreemptedError, Run, fit
from jaxllm.training.optimizers import OptimizerConfig, make_optimizer
from jaxllm.training.sources import SourceConfig
from jaxllm.training.step import TrainState, gradients, init_state, train_step
from jaxllm.training.streams import TrajectoryData

__all__ = [
    "Batch",
    "BatchStream",
    "CheckpointConfig",
    "Checkpointer",
    "DataConfig",
    "DivergedError",
    "Documents",
    "EvaluationConfig",
    "Examples",
    "OptimizerConfig",
    "PreemptedError",
    "Run",
    "SampleConfig",
    "SourceConfig",
    "TrainConfig",
    "TrainState",
    "TrajectoryData",
    "export",
    "fit",
    "gradients",
    "init_state",
    "load_config",
    "make_optimizer",
    "open_data",
    "train_step",
]

"""What is minimised, a file for each loss; `OBJECTIVES` holds their names."""

from jaxllm.training.objectives.consistency import Consistency, TrajectoryBatch
from jaxllm.training.objectives.distillation import Distillation
from jaxllm.training.objectives.next_token import NextToken
from jaxllm.training.objectives.objective import Objective

OBJECTIVES = {
    "consistency": Consistency,
    "distillation": Distillation,
    "next_token": NextToken,
}

__all__ = [
    "OBJECTIVES",
    "Consistency",
    "Distillation",
    "NextToken",
    "Objective",
    "TrajectoryBatch",
]

"""`demo-cllm`: `demo`, consistency-tuned on Jacobi trajectories of its own.

    python -m experiments.write_trajectories --model=runs/demo/model
    jaxllm train --config configs/demo_cllm.py --workdir runs/demo-cllm --export

Source: CLLMs (arXiv 2403.00835). The plain loss stands on the prompts and positions of
the trajectories; elsewhere it would not keep what is decoded behind a prompt.
"""

import family

from jaxllm.training import TrainConfig, TrajectoryData
from jaxllm.training.objectives import Consistency


def get_config() -> TrainConfig:
    return TrainConfig(
        init_from="runs/demo/model",
        data=TrajectoryData(directory=f"{family.ROOT}/trajectories", batch_rows=32),
        steps=600,
        accumulate=4,
        objective=Consistency(ar_weight=5.0, positions=4),
        optimizer=family.optimizer(rate=5e-4),
        evaluation=family.evaluation(every=100),
        sample=family.SAMPLE,
        checkpoint=family.CHECKPOINT,
    )

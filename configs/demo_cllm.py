"""`demo-cllm`: `demo`, consistency-tuned on Jacobi trajectories of its own.

    python -m experiments.write_trajectories --model=runs/demo/model
    jaxllm train --config configs/demo_cllm.py --workdir runs/demo-cllm --export

and the control, as many steps of plain fine-tuning on the same texts:

    jaxllm train --config configs/demo_cllm.py --workdir runs/demo-control --export \\
        --set objective.weight=0

`sample/tokens_per_pass` in the metrics is that of Jacobi decoding on held-back tasks.

Source: CLLMs (arXiv 2403.00835). The plain loss stands on the prompts and positions of
the trajectories; elsewhere it would not keep what is decoded behind a prompt.
"""

import family

from jaxllm.training import SampleConfig, TrainConfig, TrajectoryData
from jaxllm.training.objectives import Consistency
from jaxllm.training.synthetic import TASKS, prompt_rows

QUESTIONS = tuple(row["prompt"] for row in prompt_rows(tuple(TASKS), 4, seed=13))


def get_config() -> TrainConfig:
    return TrainConfig(
        init_from="runs/demo/model",
        data=TrajectoryData(directory=f"{family.ROOT}/trajectories", batch_rows=32),
        steps=600,
        accumulate=4,
        objective=Consistency(ar_weight=5.0, positions=4),
        optimizer=family.optimizer(rate=5e-4),
        evaluation=family.evaluation(every=100),
        sample=SampleConfig(
            prompts=QUESTIONS,
            every=50,
            max_new_tokens=64,
            decode="jacobi:window=16,mode=block",
        ),
        checkpoint=family.CHECKPOINT,
    )

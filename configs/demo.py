"""`demo`, the shipped target: 5.5M parameters.

    jaxllm train --config configs/demo.py --workdir runs/demo --export

Expect two hours and a half on two CPU cores for 18M tokens.
"""

import family

from jaxllm.training import TrainConfig

get_documents = family.documents


def get_config() -> TrainConfig:
    return TrainConfig(
        decoder=family.decoder(width=256, num_layers=6, hidden=768),
        tokenizer=family.TOKENIZER,
        data=family.data(rows=12),
        steps=3000,
        accumulate=6,
        optimizer=family.optimizer(),
        evaluation=family.evaluation(every=250),
        sample=family.SAMPLE,
        checkpoint=family.CHECKPOINT,
    )

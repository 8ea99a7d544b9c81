"""`demo-draft`, the draft of `demo`: 0.64M parameters, the same tokens.

jaxllm train --config configs/demo_draft.py --workdir runs/demo-draft --export
"""

import family

from jaxllm.training import TrainConfig

get_documents = family.documents


def get_config() -> TrainConfig:
    return TrainConfig(
        decoder=family.decoder(width=128, num_layers=2, hidden=192),
        tokenizer=family.TOKENIZER,
        data=family.data(rows=12, seed=1),
        steps=3000,
        accumulate=3,
        optimizer=family.optimizer(),
        evaluation=family.evaluation(every=500),
        sample=family.SAMPLE,
        checkpoint=family.CHECKPOINT,
    )

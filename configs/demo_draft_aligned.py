"""`demo-draft-aligned`: `demo-draft`, distilled by TVD++ on what `demo` writes.

    python -m experiments.write_answers --model=runs/demo/model
    jaxllm train --config configs/demo_draft_aligned.py --workdir runs/aligned --export

Answers of the target and text of its own training, nine to one; from the draft that
learned the text alone. Source: Direct Alignment of Draft Model (arXiv 2403.00858).
"""

import dataclasses

import family

from jaxllm.training import SourceConfig, TrainConfig
from jaxllm.training.generated import GeneratedDocuments
from jaxllm.training.objectives import Distillation


def get_documents(tokenizer):
    answers = GeneratedDocuments(f"{family.ROOT}/answers.jsonl")
    return {"answers": answers, **family.documents(tokenizer, seed=2)}


def get_config() -> TrainConfig:
    data = family.data(rows=12, seed=2)
    text = (dataclasses.replace(s, weight=s.weight / 9) for s in data.sources)
    answers = SourceConfig(path="answers", weight=1.0, format="memory")
    return TrainConfig(
        init_from="runs/demo-draft/model",
        data=dataclasses.replace(data, sources=(answers, *text)),
        steps=800,
        accumulate=3,
        objective=Distillation(teacher="runs/demo/model", loss_kinds=("tvdpp",)),
        optimizer=family.optimizer(rate=1e-3),
        evaluation=family.evaluation(every=200),
        sample=family.SAMPLE,
        checkpoint=family.CHECKPOINT,
    )

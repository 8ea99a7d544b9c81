"""Teaches the shipped model the templated tasks with a LoRA adapter; needs no data.

    jaxllm train --config configs/lora_tasks.py --workdir runs/lora --export
    jaxllm generate --adapter runs/lora/model --prompt "Question: ..."

Expect about 2.2 nats a token of an answer after 200 steps of half a second on two CPU
cores, from 7.
"""

import functools

from jaxllm.compression import LoraConfig
from jaxllm.training import (
    CheckpointConfig,
    DataConfig,
    Examples,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
    TrainConfig,
)
from jaxllm.training.synthetic import mixed_example

PROMPT = "Question: Write the list in reverse order.\nList: cat, sun, milk\nAnswer:"


def get_documents(tokenizer):
    return {
        "tasks": Examples(functools.partial(mixed_example, seed=0), 10**6, tokenizer)
    }


def get_config() -> TrainConfig:
    return TrainConfig(
        init_from="demo",
        lora=LoraConfig(rank=8, targets=("query", "value", "up", "down")),
        data=DataConfig(
            sources=(SourceConfig(path="tasks", format="memory"),),
            packing="first_fit",
            row_length=256,
            batch_rows=8,
        ),
        steps=200,
        optimizer=OptimizerConfig(rate=3e-3, weight_decay=0.0),
        sample=SampleConfig(prompts=(PROMPT,), every=100, max_new_tokens=16),
        checkpoint=CheckpointConfig(every=50, min_seconds=0),
    )

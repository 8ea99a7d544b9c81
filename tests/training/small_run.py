"""A run that takes seconds: a tiny model on a made-up text."""

import dataclasses
import random

from jaxllm.attention import RopeConfig
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig
from jaxllm.training import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
)
from tests.training.small_data import SEPARATOR, byte_tokenizer

WORDS = "the cat saw a red ball and it ran to the tree with a dog".split()


def decoder(vocabulary, num_layers=2, max_positions=64):
    return DecoderConfig(
        vocabulary=vocabulary,
        width=16,
        num_layers=num_layers,
        max_positions=max_positions,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        mlp=MlpConfig(hidden=32),
        ropes=(RopeConfig(rotary_dim=4),),
        tied_head=True,
    )


def write_files(folder):
    """Writes a corpus and a tokenizer; a run can be configured from them."""
    draw = random.Random(0)
    stories = [" ".join(draw.choices(WORDS, k=draw.randint(5, 30))) for _ in range(200)]
    (folder / "corpus.txt").write_text(f"\n{SEPARATOR}\n".join(stories))
    byte_tokenizer().save(folder)


def small_config(folder, epochs=None, **changes):
    source = SourceConfig(path=str(folder / "corpus.txt"), separator=SEPARATOR)
    data = DataConfig(
        sources=(source,), row_length=32, batch_rows=8, seed=1, epochs=epochs
    )
    held_back = dataclasses.replace(data, epochs=1, batch_rows=32)
    options = {
        "decoder": decoder(byte_tokenizer().vocab_size),
        "tokenizer": str(folder),
        "data": data,
        "steps": 12,
        "evaluation": EvaluationConfig(data=held_back, every=6),
        "optimizer": OptimizerConfig(rate=1e-2),
        "checkpoint": CheckpointConfig(every=3, min_seconds=0, keep=4),
        "log_every": 1,
    }
    return TrainConfig(**{**options, **changes})


def write_config(folder, text="", **changes):
    """Writes a configuration file for a process of its own; returns its path."""
    arguments = "".join(f", {name}={value!r}" for name, value in changes.items())
    path = folder / "run_config.py"
    path.write_text(
        "import pathlib\n"
        "from tests.training.small_run import small_config\n"
        f"{text}\n"
        "def get_config():\n"
        f"    return small_config(pathlib.Path({str(folder)!r}){arguments})\n"
    )
    return path

"""What the configurations of the shipped family share: sizes, text, recipe.

    python -m experiments.prepare_family --data=DIR --output=runs/family

makes the text. Paths are relative to the folder in which `jaxllm train` is started.
"""

import functools

from jaxllm.attention import RopeConfig
from jaxllm.layers import AttentionConfig, MlpConfig, NormConfig
from jaxllm.models import DecoderConfig
from jaxllm.training import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Examples,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
)
from jaxllm.training.synthetic import END_OF_TEXT, TASKS, mixed_example

ROOT = "runs/family"
TOKENIZER = f"{ROOT}/tokenizer"
PROMPTS = (
    "Once upon a time",
    "Question: Write the list in reverse order.\nList: cat, sun, milk\nAnswer:",
    "def read_lines(path):\n",
)
# The hardest come twice as often.
MIXED = (*TASKS, "arithmetic", "sort", "reverse")


def decoder(width: int, num_layers: int, hidden: int) -> DecoderConfig:
    return DecoderConfig(
        vocabulary=3072,
        width=width,
        num_layers=num_layers,
        max_positions=1024,
        attention=AttentionConfig(
            num_heads=width // 64, num_kv_heads=width // 128, head_dim=64
        ),
        mlp=MlpConfig(hidden=hidden),
        norm=NormConfig(eps=1e-5),
        ropes=(RopeConfig(rotary_dim=64),),
        tied_head=True,
    )


def text(name: str, weight: float = 1.0) -> SourceConfig:
    return SourceConfig(path=f"{ROOT}/{name}.txt", weight=weight, separator=END_OF_TEXT)


def data(rows: int, length: int = 512, seed: int = 0) -> DataConfig:
    tasks = SourceConfig(path="tasks", weight=0.65, format="memory")
    return DataConfig(
        sources=(text("stories", 0.25), text("python", 0.1), tasks),
        row_length=length,
        batch_rows=rows,
        seed=seed,
    )


def documents(tokenizer, seed: int = 0, count: int = 2_000_000):
    """The tasks; so many examples are not seen twice by any run of the family."""
    make = functools.partial(mixed_example, seed=seed, tasks=MIXED)
    return {"tasks": Examples(make, count, tokenizer)}


def evaluation(every: int) -> EvaluationConfig:
    held_back = DataConfig(
        sources=(text("stories_valid"),),
        row_length=512,
        batch_rows=4,
        epochs=1,
        shuffle=False,
    )
    return EvaluationConfig(data=held_back, every=every)


def optimizer(rate: float = 5e-3) -> OptimizerConfig:
    return OptimizerConfig(
        name="muon",
        rate=rate,
        other_rate=0.6,
        warmup=0.02,
        schedule="linear",
        decay_from=0.35,
        floor=0.0,
    )


CHECKPOINT = CheckpointConfig(every=20, min_seconds=120, keep=2)
SAMPLE = SampleConfig(prompts=PROMPTS, every=100, max_new_tokens=48)

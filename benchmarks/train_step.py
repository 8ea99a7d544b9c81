"""What a training step costs: this project's, a bare one, and one of transformers.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/train_step.py --output=runs/train_step.json

One Llama of the shipped family's size, float32, AdamW, rows of random tokens. `bare` is
the least that a hand-written jitted step does: mean cross entropy, gradients, optax.
The trainer's step adds packing, metrics, clipping and the check for gradients that are
not finite; what it reads comes from its own data pipeline, whose share is timed apart.
All take turns, so that whatever else the machine does meets all of them; ratios are
medians of the ratios within a round. `transformers` takes part where torch is
installed.

Expect 1.10 or less over `bare`, and below 3% for data.
"""

import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Started by its path, only this file's own folder is found.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks.machine import available_cores, environment, use_cores
from jaxllm.attention import RopeConfig
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig, make_model
from jaxllm.training import (
    DataConfig,
    Examples,
    OptimizerConfig,
    SourceConfig,
    init_state,
    make_optimizer,
    open_data,
    train_step,
)
from jaxllm.training.objectives import NextToken
from jaxllm.training.step import Frozen

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Where the results go, as JSON.")
flags.DEFINE_integer("rounds", 7, "Turns of everybody.", lower_bound=1)
flags.DEFINE_integer("steps", 3, "Steps of a turn.", lower_bound=1)
flags.DEFINE_integer("rows", 4, "Rows of a batch.", lower_bound=1)
flags.DEFINE_integer("length", 256, "Tokens of a row.", lower_bound=2)
flags.DEFINE_integer("width", 256, "Width of the model.", lower_bound=64)
flags.DEFINE_integer("layers", 6, "Layers of the model.", lower_bound=1)

VOCABULARY = 3072
Step = Callable[[], None]


def decoder() -> DecoderConfig:
    width = FLAGS.width
    return DecoderConfig(
        vocabulary=VOCABULARY,
        width=width,
        num_layers=FLAGS.layers,
        max_positions=1024,
        attention=AttentionConfig(
            num_heads=width // 64, num_kv_heads=width // 64, head_dim=64
        ),
        mlp=MlpConfig(hidden=3 * width),
        ropes=(RopeConfig(rotary_dim=64),),
        tied_head=True,
    )


def random_tokens() -> np.ndarray:
    rng = np.random.default_rng(0)
    # One more than a row: all run as many positions, and shapes matter to a compiler.
    return rng.integers(0, VOCABULARY, (FLAGS.rows, FLAGS.length + 1)).astype(np.int32)


def bare() -> Step:
    """A step as one would write it down for a first try."""
    model, params = make_model(decoder(), jax.random.key(0))
    optimizer = optax.adamw(1e-3)
    tokens_BT = jnp.asarray(random_tokens())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens_BT: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = model(params, tokens_BT[:, :-1]).logits_BTV
            labels = tokens_BT[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    carry = [params, optimizer.init(params), None]

    def run() -> None:
        carry[:] = step(carry[0], carry[1], tokens_BT)
        jax.block_until_ready(carry[2])

    return run


def ours(scratch: str, waited: list[float]) -> Step:
    """The trainer's step on the trainer's data."""
    model, params = make_model(decoder(), jax.random.key(0))
    config = OptimizerConfig(rate=1e-3)
    optimizer = make_optimizer(config, 10_000)
    state = init_state(params, optimizer)
    frozen = Frozen(jax.tree.map(lambda _: None, params), {})
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (4096, 200))
    documents = Examples(lambda i: (rows[i][:1].tolist(), rows[i][1:].tolist()), 4096)
    data = DataConfig(
        sources=(SourceConfig(path="random", format="memory"),),
        row_length=FLAGS.length,
        batch_rows=FLAGS.rows,
    )
    stream = open_data(data, None, scratch, memory={"random": documents})
    key, objective, carry = jax.random.key(0), NextToken(), [state]

    def run() -> None:
        begun = time.perf_counter()
        batch = jax.tree.map(jnp.asarray, next(stream))
        waited.append(time.perf_counter() - begun)
        carry[0], metrics = train_step(
            carry[0],
            batch,
            key,
            frozen,
            model=model,
            objective=objective,
            optimizer=optimizer,
        )
        jax.block_until_ready(metrics)

    return run


def transformers_step() -> Step:
    """The same model and rule in torch."""
    import torch
    import transformers

    torch.set_num_threads(available_cores())
    config = decoder()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.width,
            intermediate_size=config.mlp.hidden,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.attention.num_heads,
            num_key_value_heads=config.attention.num_kv_heads,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.tensor(random_tokens()[:, 1:].astype(np.int64))

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    use_cores(available_cores())
    waited: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        steps = {"bare": bare(), "jaxllm": ours(scratch, waited)}
        try:
            steps["transformers"] = transformers_step()
        except ImportError as absent:
            print(f"transformers is left out: {absent}", file=sys.stderr)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(FLAGS.rounds + 1):
            for name, step in steps.items():
                begun = time.perf_counter()
                for _ in range(FLAGS.steps):
                    step()
                if turn:  # The first one compiles.
                    seconds[name].append((time.perf_counter() - begun) / FLAGS.steps)
        tokens = FLAGS.rows * FLAGS.length
        rows = []
        for name, found in seconds.items():
            ratios = [s / b for s, b in zip(found, seconds["bare"], strict=True)]
            rows.append(
                {
                    "contender": name,
                    "tokens_per_second": tokens / statistics.median(found),
                    "over_bare": statistics.median(ratios),
                    "over_bare_low": min(ratios),
                    "over_bare_high": max(ratios),
                    "seconds_samples": found,
                }
            )
        share = sum(waited[FLAGS.steps :]) / sum(seconds["jaxllm"]) / FLAGS.steps
        rows.append({"contender": "data of jaxllm", "share_of_step": share})
    for row in rows:
        figures = (f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
        print(f"{row['contender']:16} {'  '.join(figures)}")
    if FLAGS.output is not None:
        report = {
            "format": 1,
            "claim": "a step costs at most 1.10 of a bare one; data is hidden",
            "paper": "",
            "rows": rows,
            "environment": environment(),
        }
        path = pathlib.Path(FLAGS.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    app.run(main)

"""Trains Medusa heads for `demo`: the baseline that later drafters are compared with.

    python -m experiments.train_heads --data=DIR --output=heads.safetensors

`DIR` is that of `experiments/train_demo.py`. The target is frozen; head k learns the
target's own distribution k tokens further on, on the stories that the target was
trained on. Then the accuracy of every head and rank is measured on text that the target
writes greedily, and kept with the heads: their tree is planned from it.

Expect after 800 steps (about 10 minutes on two CPU cores): the table that is printed at
the end and stands in `experiments/demo/README.md`.

Letters: B rows, T tokens, D width, V vocabulary, K heads, R ranks.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax import Array

import jaxllm
from experiments.demo.stories import StoryStream
from jaxllm.drafting.heads import head_logits, save_heads
from jaxllm.training.corpora import read_stories

FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "Directory of the two TinyStories files.")
flags.DEFINE_string("model", "demo", "The target.")
flags.DEFINE_string("output", "heads.safetensors", "Where the heads go.")
flags.DEFINE_integer("heads", 4, "K.")
flags.DEFINE_integer("steps", 800, "Optimizer steps.")

ROWS, TOKENS, RANKS = 8, 256, 6
DECAY = 0.8
"""Weight of a head relative to the one before it (Medusa, section 2.2.1)."""


def loss(
    kernel_KDD: Array, lm: jaxllm.LanguageModel, params: Any, tokens_BT: Array
) -> Array:
    """Returns the weighted divergence of the heads from the target, in nats."""
    forward = lm.model(params, tokens_BT)
    teacher_BTV = jax.nn.log_softmax(forward.logits_BTV, axis=-1)
    hidden_BTD = forward.hidden_BTD
    heads, width = kernel_KDD.shape[:2]
    total, scale = jnp.float32(0), 0.0
    for k in range(heads):
        # The head at t speaks of what the target says at t + k + 1.
        x_BTD = hidden_BTD[:, : -(k + 1)].reshape(-1, width)
        logits = head_logits(lm.model, params, kernel_KDD[k : k + 1], x_BTD)[:, 0]
        target = teacher_BTV[:, k + 1 :].reshape(-1, logits.shape[-1])
        guess = jax.nn.log_softmax(logits, axis=-1)
        divergence = (jnp.exp(target) * (target - guess)).sum(-1).mean()
        total += DECAY**k * divergence
        scale += DECAY**k
    return total / scale


def measure(
    kernel_KDD: Array, lm: jaxllm.LanguageModel, prompts: list[str]
) -> list[list[float]]:
    """Returns how often each rank of each head is what the target writes."""
    results = jaxllm.generate(lm, prompts, max_new_tokens=128)
    hits, seen = np.zeros((kernel_KDD.shape[0], RANKS)), np.zeros(kernel_KDD.shape[0])

    @jax.jit
    def ranks(params: Any, kernel_KDD: Array, ids_T: Array) -> Array:
        hidden_TD = lm.model(params, ids_T[None]).hidden_BTD[0]
        logits_TKV = head_logits(lm.model, params, kernel_KDD, hidden_TD)
        return jax.lax.top_k(logits_TKV, RANKS)[1]

    for prompt, result in zip(prompts, results, strict=True):
        before = lm.tokenizer.encode(prompt)
        ids = np.asarray(before + result.token_ids, np.int32)
        padded = np.pad(ids, (0, 256 - len(ids)))
        found_TKR = np.asarray(ranks(lm.params, kernel_KDD, padded))
        for k in range(kernel_KDD.shape[0]):
            # The pending token is at t + 1, the head's own at t + 2 + k.
            at = np.arange(len(before) - 1, len(ids) - k - 2)
            hits[k] += (found_TKR[at, k] == ids[at + k + 2][:, None]).sum(axis=0)
            seen[k] += len(at)
    return (hits / seen[:, None]).tolist()


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    lm = jaxllm.load(FLAGS.model, dtype="float32")
    stories = read_stories(FLAGS.data)
    ids = [lm.tokenizer.encode(s, add_special_tokens=False) for s in stories.train]
    stream = StoryStream(ids, seed=0)
    width = lm.config.width
    kernel_KDD = jnp.zeros((FLAGS.heads, width, width))
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 40, FLAGS.steps)
    optimizer = optax.adam(rate)
    state = optimizer.init(kernel_KDD)

    @jax.jit
    def step(kernel_KDD: Array, state: Any, params: Any, tokens_BT: Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(kernel_KDD, lm, params, tokens_BT)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(kernel_KDD, updates), state, value

    begun, losses = time.monotonic(), []
    for i in range(FLAGS.steps):
        tokens_BT = jnp.asarray(stream.rows(i * ROWS * TOKENS, ROWS, TOKENS))
        kernel_KDD, state, value = step(kernel_KDD, state, lm.params, tokens_BT)
        losses.append(float(value))
        if (i + 1) % 50 == 0:
            left = (time.monotonic() - begun) * (FLAGS.steps / (i + 1) - 1) / 60
            mean = np.mean(losses[-50:])
            print(
                f"step {i + 1}  loss {mean:.4f} nats  {left:.1f} min left", flush=True
            )
    # Beginnings of validation paragraphs: the heads never saw them.
    long = [line for line in stories.held_back.splitlines() if len(line) > 80]
    prompts = [line[:60].rsplit(" ", 1)[0] for line in long[:320:10]]
    accuracy_KR = measure(kernel_KDD, lm, prompts)
    save_heads(FLAGS.output, kernel_KDD.astype(jnp.bfloat16), accuracy_KR)
    print("accuracy by rank, on the target's own greedy text:")
    for k, row in enumerate(accuracy_KR):
        print(f"  head {k + 1}: " + " ".join(f"{value:.3f}" for value in row))


if __name__ == "__main__":
    flags.mark_flag_as_required("data")
    app.run(main)

"""Trains the small models that ship inside the package on TinyStories.

    python -m experiments.train_demo --data=DIR --output=runs/demo --minutes=72
    python -m experiments.train_demo --data=DIR --model=demo-draft \
        --output=runs/demo-draft --minutes=25

`demo-draft` speaks the tokens of `demo`: it takes that model's tokenizer.

`DIR` holds `tinystories_train.txt.gz` (stories, each followed by a line
`<|endoftext|>`) and `tinystories_valid.txt.gz` (plain text). The run trains a
byte-level BPE tokenizer (`demo` only), then the model, and exports a Hugging Face
directory to `OUTPUT/model` (or `--export`) whenever the validation loss is the lowest
so far. The same command resumes a run that was stopped.

Expect after 72 minutes on two CPU cores shared with other work (3.1M tokens): 2.34 nats
a token, 0.92 bits a character on the validation text in windows of 512.
`experiments/demo/README.md` has the recipe, the curve and some of the text.

With `--steps` the run is a function of its flags: stopped and resumed anywhere it ends
in the same weights. With `--minutes` the schedule follows the clock instead, so the
number of steps depends on the machine.

Letters: B rows, T tokens of a row, V vocabulary.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from absl import app, flags
from jax import Array

from experiments.demo.stories import StoryStream
from jaxllm.api import generate
from jaxllm.attention import RopeConfig
from jaxllm.checkpoints import (
    GenerationDefaults,
    LanguageModel,
    Tokenizer,
    save_language_model,
    shipped_models,
)
from jaxllm.core.dtypes import DTypePolicy
from jaxllm.layers import AttentionConfig, MlpConfig, NormConfig
from jaxllm.models import DecoderConfig, Model, make_model
from jaxllm.models.families import FAMILIES
from jaxllm.training.corpora import read_stories, train_tokenizer
from jaxllm.training.synthetic import END_OF_TEXT

FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "Directory of the two TinyStories files.")
flags.DEFINE_enum("model", "demo", ["demo", "demo-draft"], "Which model.")
flags.DEFINE_string("output", "runs/demo", "Where state, metrics and plot are kept.")
flags.DEFINE_string("export", None, "Where the model goes; OUTPUT/model when unset.")
flags.DEFINE_float("minutes", 72.0, "Length of the run; unused with --steps.")
flags.DEFINE_integer("steps", 0, "Length of the run in optimizer steps.")

SAMPLE_PROMPT = "Once upon a time"
VALIDATION_CHARACTERS = 200_000


def decoder(width: int, num_layers: int) -> DecoderConfig:
    return DecoderConfig(
        vocabulary=2048,
        width=width,
        num_layers=num_layers,
        max_positions=1024,
        attention=AttentionConfig(
            num_heads=width // 64, num_kv_heads=width // 128, head_dim=64
        ),
        mlp=MlpConfig(hidden=2 * width),
        norm=NormConfig(eps=1e-5),
        ropes=(RopeConfig(rotary_dim=64),),
        tied_head=True,
    )


DECODERS = {"demo": decoder(256, 4), "demo-draft": decoder(128, 2)}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The model and its recipe.

    Attributes:
      decoder: The architecture.
      batch_tokens: Tokens of an optimizer step.
      chunk_tokens: Tokens of one forward and backward; small ones stay in the cache.
      row_lengths: T, and the share of the run from which it holds. Attention on a CPU
        is dear in long rows, and short ones teach most of what there is.
      peak_rate: Learning rate of the matrices after warm-up.
      other_rate: That of embeddings and norms, as a share of it.
      warmup: Share of the run in which the rate rises.
      decay_from: Share of the run from which it falls to zero.
      weight_decay: Of the matrices.
      seed: Of the first weights and of the order of stories.
    """

    decoder: DecoderConfig = DECODERS["demo"]
    batch_tokens: int = 6144
    chunk_tokens: int = 1024
    row_lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.7, 512))
    peak_rate: float = 5e-3
    other_rate: float = 0.6
    warmup: float = 0.02
    decay_from: float = 0.35
    weight_decay: float = 0.1
    seed: int = 0

    def row_length(self, progress: float) -> int:
        return [T for start, T in self.row_lengths if progress >= start][-1]

    def rate(self, progress: float) -> float:
        rise = progress / self.warmup
        fall = (1.0 - progress) / (1.0 - self.decay_from)
        return self.peak_rate * max(0.0, min(rise + 1e-3, 1.0, fall))


# --- Learning --------------------------------------------------------------------


def token_losses(model: Model, params: Any, tokens_BT: Array) -> Array:
    """Returns the loss of every token but each row's first, `[B, T - 1]`, in nats."""
    logits_BTV = model(params, tokens_BT[:, :-1]).logits_BTV
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])


def make_optimizer(config: DemoConfig) -> optax.GradientTransformation:
    """Returns Muon for matrices and Adam for the rest, at a learning rate of 1.

    The step multiplies by the rate, which depends on the clock.

    Source: Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2.
    """

    def dimensions(params: Any) -> Any:
        # Layers stand in stacks, `[l, in, out]`; the embedding table has two axes.
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda x: matrix if x.ndim == 3 else None, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            1.0,
            adam_learning_rate=config.other_rate,
            weight_decay=config.weight_decay,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


@dataclass
class TrainState:
    """All that a resumed run needs.

    Attributes:
      params: float32 weights.
      optimizer: State of the optimizer.
      step: Optimizer steps done.
      position: Tokens taken from the stream.
      seconds: Time spent in training.
      best: Lowest validation loss at this row length.
      best_length: The row length that it belongs to.
    """

    params: Any
    optimizer: Any
    step: int = 0
    position: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_length: int = 0

    def save(self, path: Path) -> None:
        leaves = jax.tree.leaves((self.params, self.optimizer))
        arrays = {f"leaf{i:04d}": np.asarray(x) for i, x in enumerate(leaves)}
        numbers = (self.step, self.position, self.seconds, self.best, self.best_length)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, numbers=np.asarray(numbers, np.float64), **arrays)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        tree = (self.params, self.optimizer)
        with np.load(path) as file:
            count = len(jax.tree.leaves(tree))
            leaves = [jnp.asarray(file[f"leaf{i:04d}"]) for i in range(count)]
            step, position, self.seconds, self.best, length = file["numbers"].tolist()
        self.step, self.position, self.best_length = (
            int(step),
            int(position),
            int(length),
        )
        self.params, self.optimizer = jax.tree.unflatten(
            jax.tree.structure(tree), leaves
        )


class Trainer:
    """The compiled functions of a run, and its data."""

    def __init__(self, config: DemoConfig, stream: StoryStream, valid: np.ndarray):
        self.config, self.stream, self.valid = config, stream, valid
        policy = DTypePolicy.of("float32")
        key = jax.random.key(config.seed)
        # Unrolled: at this size XLA:CPU copies as much as it computes in a scan.
        stacks = (1,) * config.decoder.num_layers
        self.model, params = make_model(
            config.decoder, key, policy=policy, stacks=stacks
        )
        optimizer = make_optimizer(config)
        self.state = TrainState(params, optimizer.init(params))
        model = self.model

        def accumulate(params: Any, total: Any, tokens_BT: Array) -> tuple[Any, Array]:
            def mean_loss(params: Any) -> Array:
                return token_losses(model, params, tokens_BT).mean()

            loss, gradient = jax.value_and_grad(mean_loss)(params)
            return jax.tree.map(jnp.add, total, gradient), loss

        def update(params: Any, state: Any, total: Any, scale: Array, rate: Array):
            gradient = jax.tree.map(lambda g: g * scale, total)
            updates, state = optimizer.update(gradient, state, params)
            updates = jax.tree.map(lambda u: u * rate, updates)
            return optax.apply_updates(params, updates), state

        self._accumulate = jax.jit(accumulate, donate_argnums=1)
        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._losses = jax.jit(lambda p, t: token_losses(model, p, t).sum())

    def step(self, progress: float) -> float:
        """Does one optimizer step; returns the mean loss before it."""
        config, state = self.config, self.state
        length = config.row_length(progress)
        rows = config.batch_tokens // length
        tokens_BT = self.stream.rows(state.position, rows, length)
        chunks = np.split(tokens_BT, config.batch_tokens // config.chunk_tokens)
        total = jax.tree.map(jnp.zeros_like, state.params)
        losses = []
        for chunk_BT in chunks:
            total, loss = self._accumulate(state.params, total, chunk_BT)
            losses.append(loss)
        state.params, state.optimizer = self._update(
            state.params,
            state.optimizer,
            total,
            jnp.float32(1 / len(chunks)),
            jnp.float32(config.rate(progress)),
        )
        state.step += 1
        state.position += config.batch_tokens
        return float(sum(losses)) / len(losses)

    def validate(self, params: Any, length: int) -> float:
        """Returns the mean loss of the validation text in nats per token.

        The text is cut into windows; each has `<|endoftext|>` before it.
        """
        count = len(self.valid) // length
        windows_BT = self.valid[: count * length].reshape(count, length)
        windows_BT = np.pad(windows_BT, ((0, 0), (1, 0)))  # id 0 is <|endoftext|>
        rows = max(1, 2048 // length)
        total = sum(
            float(self._losses(params, windows_BT[i : i + rows]))
            for i in range(0, count, rows)
        )
        return total / (count * length)


# --- Export ----------------------------------------------------------------------


def shipped(trainer: Trainer, tokenizer: tokenizers.Tokenizer) -> LanguageModel:
    """Returns the model as it will be stored, in bfloat16."""
    model = trainer.model
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    settings = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_positions,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return LanguageModel(
        model=dataclasses.replace(model, policy=DTypePolicy.of("bfloat16")),
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainer.state.params),
        tokenizer=Tokenizer(tokenizer, special_tokens=roles, settings=settings),
        hf_config=FAMILIES["llama"].to_hf(model.config) | ids,
        generation=GenerationDefaults(eos_ids=(0,), pad_id=0),
    )


def export(lm: LanguageModel, directory: Path) -> None:
    """Writes a Hugging Face directory.

    What stood there is replaced file by file, so a reader never sees half a file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".new-") as new:
        save_language_model(lm, new)
        for path in Path(new).iterdir():
            os.replace(path, directory / path.name)


def plot(metrics: Path, image: Path) -> None:
    """Draws the loss curves of a metrics file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, style in (("loss", "-"), ("valid_loss", "o-")):
        points = [(x["tokens"] / 1e6, x[name]) for x in lines if name in x]
        axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1)
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(1.0, 5.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(image, dpi=120)
    plt.close(figure)


# --- The run ---------------------------------------------------------------------


def prepare(config: DemoConfig, data: Path, output: Path) -> tuple[Any, Trainer, float]:
    """Returns the tokenizer, the trainer and validation characters per token."""
    stories = read_stories(data)
    path = output / "tokenizer.json"
    if config.decoder != DECODERS["demo"]:
        path = shipped_models()["demo"] / "tokenizer.json"
    if not path.exists():
        train_tokenizer(stories.train, config.decoder.vocabulary).save(str(path))
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    encoded = tokenizer.encode_batch(list(stories.train))
    stream = StoryStream([e.ids for e in encoded], config.seed)
    valid = stories.held_back[:VALIDATION_CHARACTERS]
    ids = tokenizer.encode(valid, add_special_tokens=False).ids
    print(
        f"{len(stories.train)} stories, {stream.epoch_tokens} tokens an epoch; "
        f"validation {len(ids)} tokens, {len(valid) / len(ids):.3f} characters each",
        flush=True,
    )
    trainer = Trainer(config, stream, np.asarray(ids, np.int32))
    return tokenizer, trainer, len(valid) / len(ids)


@dataclass
class Run:
    """A run in its directory: when to save, measure, export and stop."""

    config: DemoConfig
    trainer: Trainer
    tokenizer: tokenizers.Tokenizer
    characters: float
    output: Path
    model_directory: Path
    stopped: bool = False

    def progress(self) -> float:
        state = self.trainer.state
        if FLAGS.steps:
            return state.step / FLAGS.steps
        return state.seconds / (60 * FLAGS.minutes)

    def record(self, **values: Any) -> None:
        state = self.trainer.state
        line = {"step": state.step, "tokens": state.position, **values}
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def resume(self) -> None:
        """Goes back to the last saved step, where there is one."""
        if not (self.output / "state.npz").exists():
            return
        state = self.trainer.state
        state.load(self.output / "state.npz")
        print(f"resumed at step {state.step}", flush=True)
        metrics = self.output / "metrics.jsonl"
        if not metrics.exists():
            return
        # Steps after the save are done again.
        lines = metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= state.step]
        metrics.write_text("".join(kept))

    def evaluate(self) -> None:
        """Measures the weights as they would ship, and exports the best."""
        trainer, state = self.trainer, self.trainer.state
        length = self.config.row_length(self.progress())
        lm = shipped(trainer, self.tokenizer)
        rounded = jax.tree.map(lambda x: x.astype(jnp.float32), lm.params)
        loss = trainer.validate(rounded, length)
        bits = loss / math.log(2) / self.characters
        self.record(valid_loss=round(loss, 4), bits_per_character=round(bits, 4))
        text = generate(lm, [SAMPLE_PROMPT], max_new_tokens=60)[0].text
        print(f"\nvalidation {loss:.4f} nats/token, {bits:.4f} bits/char")
        print(f"  {SAMPLE_PROMPT}{text}\n", flush=True)
        # Losses of different row lengths do not compare: longer rows know more.
        if length != state.best_length or loss < state.best:
            state.best, state.best_length = loss, length
            export(lm, self.model_directory)
        plot(self.output / "metrics.jsonl", self.output / "loss.png")

    def train(self, save_every: float = 60.0, evaluate_every: float = 300.0) -> None:
        state = self.trainer.state
        saved = evaluated = state.seconds
        losses: list[float] = []
        while (progress := self.progress()) < 1.0 and not self.stopped:
            began = time.monotonic()
            losses.append(self.trainer.step(progress))
            state.seconds += time.monotonic() - began
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss is {losses[-1]} at step {state.step}")
            if len(losses) == 10:
                self.report(losses)
                losses = []
            if state.seconds - evaluated > evaluate_every:
                evaluated = state.seconds
                self.evaluate()
            if state.seconds - saved > save_every:
                saved = state.seconds
                state.save(self.output / "state.npz")
        if not self.stopped:
            self.evaluate()
        state.save(self.output / "state.npz")

    def report(self, losses: list[float]) -> None:
        state, progress = self.trainer.state, self.progress()
        loss = sum(losses) / len(losses)
        rate = self.config.rate(progress)
        self.record(
            loss=round(loss, 4), rate=round(rate, 6), progress=round(progress, 4)
        )
        left = state.seconds * (1 / progress - 1) / 60
        print(
            f"step {state.step}  {100 * progress:5.1f} %  loss {loss:.4f}  "
            f"{state.position / state.seconds:.0f} tokens/s  {left:.1f} min left",
            flush=True,
        )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config, output = DemoConfig(decoder=DECODERS[FLAGS.model]), Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(
        json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    )
    tokenizer, trainer, characters = prepare(config, Path(FLAGS.data), output)
    directory = Path(FLAGS.export) if FLAGS.export else output / "model"
    run = Run(config, trainer, tokenizer, characters, output, directory)

    def stop(*_: Any) -> None:
        run.stopped = True

    signal.signal(signal.SIGTERM, stop)
    run.resume()
    run.train()
    if run.stopped:
        sys.exit(143)


if __name__ == "__main__":
    flags.mark_flag_as_required("data")
    app.run(main)

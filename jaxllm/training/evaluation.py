"""What a run measures of its model on the way: a loss, and text to look at."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxllm.checkpoints import LanguageModel
from jaxllm.decoding import BoundDrafter, make_sampler
from jaxllm.decoding.job import Job, on_mesh
from jaxllm.drafting import make_drafter
from jaxllm.models import Model
from jaxllm.training.batch import Batch
from jaxllm.training.config import SampleConfig
from jaxllm.training.objectives import NextToken
from jaxllm.training.streams import Stream, place

__all__ = ["evaluate_loss", "sample_texts"]


def evaluate_loss(lm: LanguageModel, stream: Stream) -> dict[str, float]:
    """Returns the next-token loss on a finite stream, whatever the run minimises.

    Args:
      lm: The model.
      stream: Read from its position to its end, and then back where it was.

    Returns:
      `eval/loss` in nats a token, every token counted alike, and `eval/accuracy`.
    """
    begin = stream.get_state()
    total: dict[str, float] = {}
    count = 0.0
    while (batch := next(stream, None)) is not None:
        with on_mesh(lm):
            placed = place(batch, lm.mesh)
            found = _measure(lm.params, placed, model=lm.model)
        sums, weight = jax.device_get(found)
        count += float(weight)
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + float(value)
    stream.set_state(begin)
    return {f"eval/{name}": value / count for name, value in total.items()}


@functools.partial(jax.jit, static_argnames=("model",))
def _measure(params: Any, batch: Batch, *, model: Model) -> tuple[Any, Array]:
    """Returns sums over a batch, and the weight of its tokens."""
    objective = NextToken()
    weight = objective.weights(batch)["tokens"]
    one = {"tokens": jnp.float32(1)}
    loss, metrics = objective.loss(model, params, batch, one, jax.random.key(0), {})
    return {"loss": loss, "accuracy": metrics["accuracy"]}, weight


def sample_texts(
    lm: LanguageModel, config: SampleConfig
) -> tuple[list[str], dict[str, float]]:
    """Lets a model write, at any seed the same.

    Returns:
      The prompts with what the model makes of them; and `sample/tokens_per_pass`, of
      all of them together.
    """
    rows = len(config.prompts)
    job = Job.make(lm, list(config.prompts), config.max_new_tokens, (), 0)
    with on_mesh(lm):
        bound = BoundDrafter(lm, make_drafter(config.decode))
    texts = [""] * rows
    emitted = passes = 0
    for batch in job.batches():
        sampler = make_sampler(len(batch), temperature=config.temperature)
        outputs, readers = job.run(bound, batch, sampler)
        for row, output, reader in zip(batch, outputs, readers, strict=True):
            texts[row] = config.prompts[row] + job.result(output, reader, 0.0).text
            emitted += output.stats["emitted"]
            passes += output.stats["target_passes"]
    return texts, {"sample/tokens_per_pass": emitted / max(passes, 1)}

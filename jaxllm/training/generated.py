"""Texts that a target writes, for a drafter to learn from: prompts, then answers.

A file has a line for every answer, in an order that the prompts determine:

    {"id", "prompt", "temperature", "seed", "prompt_tokens", "token_ids",
     "finish_reason"}

`token_ids` holds prompt and answer; the first `prompt_tokens` are not learned. Whatever
stops a run leaves whole lines and at most one torn one, and the next run goes on with
the batch that is missing.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoints import LanguageModel
from jaxllm.core.errors import ConfigError, UserError
from jaxllm.decoding import BoundDrafter, Drafter, make_sampler
from jaxllm.decoding.decode import check
from jaxllm.decoding.job import Job, Prompt, encode, on_mesh
from jaxllm.drafting import Autoregressive
from jaxllm.training.origin import digest_of_params, digest_of_prompts, keep_origin

__all__ = [
    "GeneratedDocuments",
    "GenerationConfig",
    "prompts_from_texts",
    "write_generated",
]

Progress = Callable[[int, int], None]
"""Is told after every batch how many of how many answers are on the disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a target writes.

    Attributes:
      temperatures: Every prompt is answered once at each.
      top_p: Of the answers that are sampled.
      max_new_tokens: Longest answer.
      seed: Answer i draws with seed `seed + i`.

    Source: Direct Alignment of Draft Model (arXiv 2403.00858).
    """

    temperatures: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0)
    top_p: float = 0.95
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures or self.max_new_tokens < 1:
            raise ConfigError(
                f"cannot generate: temperatures are {self.temperatures} and "
                f"max_new_tokens is {self.max_new_tokens}, expected one or more of "
                f"each. Correct them."
            )


def prompts_from_texts(
    lm: LanguageModel,
    texts: Iterable[str],
    *,
    shortest: int = 8,
    longest: int = 64,
    seed: int = 0,
) -> list[list[int]]:
    """Cuts prompts from the beginnings of texts.

    Args:
      lm: The target, with its tokenizer.
      texts: Those with fewer than `shortest` tokens are left out.
      shortest: Fewest tokens of a prompt, 1 or more.
      longest: Most tokens; lengths between the two are equally likely, so that a
        drafter sees them all.
      seed: Of the lengths.

    Raises:
      ConfigError: The bounds are no range.
    """
    if not 1 <= shortest <= longest:
        raise ConfigError(
            f"cannot cut prompts: shortest is {shortest} and longest {longest}, "
            f"expected 1 <= shortest <= longest. Correct them."
        )
    prompts = []
    for index, text in enumerate(texts):
        length = np.random.default_rng([seed, index]).integers(shortest, longest + 1)
        ids = encode(lm, text, index)
        if len(ids) >= shortest:
            prompts.append(ids[:length])
    return prompts


def write_generated(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    path: str | Path,
    config: GenerationConfig,
    drafter: Drafter | None = None,
    progress: Progress | None = None,
) -> None:
    """Lets a target answer prompts into a file, or what is missing there.

    Beside the file stands `FILE.origin.json`, what it is made with. However often the
    run is stopped, the file ends in the same bytes.

    Args:
      lm: The target.
      prompts: Texts or token ids.
      path: The JSONL file.
      config: How they are answered.
      drafter: How tokens are proposed; plain decoding when None.
      progress: Called after every batch.

    Raises:
      UserError: A prompt is empty, too long or holds an id that the model lacks; or
        the file was begun with something else, or holds something else.
    """
    path = Path(path)
    temperatures = config.temperatures
    repeated = [prompt for prompt in prompts for _ in temperatures]
    job = Job.make(lm, repeated, config.max_new_tokens, (), config.seed)
    rows = range(len(repeated))
    check(lm.model, job.request(list(rows), make_sampler(len(repeated))))
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {
        **dataclasses.asdict(config),
        "model": lm.name,
        "params": digest_of_params(lm.params),
        "prompts": digest_of_prompts(job.prompts),
        "drafter": repr(drafter),
    }
    keep_origin(path.with_name(f"{path.name}.origin.json"), origin)
    batches = job.batches()
    done = _resume(path, [row for batch in batches for row in batch])
    with on_mesh(lm):
        bound = BoundDrafter(lm, Autoregressive() if drafter is None else drafter)
    with open(path, "ab") as file:
        for batch in batches:
            if done.issuperset(batch):
                continue
            for line in _answer(job, batch, bound, config):
                if line["id"] not in done:
                    file.write(json.dumps(line).encode() + b"\n")
                    done.add(line["id"])
            file.flush()
            os.fsync(file.fileno())
            if progress is not None:
                progress(len(done), len(repeated))


def _answer(
    job: Job, batch: list[int], bound: BoundDrafter, config: GenerationConfig
) -> list[dict[str, Any]]:
    """Returns the lines of a batch, which is decoded whole: then it repeats itself."""
    choices = config.temperatures
    temperature = [choices[row % len(choices)] for row in batch]
    sampler = make_sampler(len(batch), temperature=temperature, top_p=config.top_p)
    outputs, readers = job.run(bound, batch, sampler)
    lines = []
    for at, row in enumerate(batch):
        result = job.result(outputs[at], readers[at], 0.0)
        prompt = job.prompts[row]
        lines.append(
            {
                "id": row,
                "prompt": row // len(choices),
                "temperature": temperature[at],
                "seed": job.seeds[row],
                "prompt_tokens": len(prompt),
                "token_ids": [*prompt, *result.token_ids],
                "finish_reason": result.finish_reason,
            }
        )
    return lines


def _resume(path: Path, order: list[int]) -> set[int]:
    """Drops a torn last line and returns which answers are there.

    Raises:
      UserError: They are not the first ones of this run.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = [_id_of(line) for line in whole.splitlines()]
    if found != order[: len(found)]:
        raise UserError(
            f"cannot continue: {path}: holds other lines than this run has written, "
            f"expected its own. Choose another file."
        )
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return set(found)


def _id_of(line: bytes) -> Any:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None


class GeneratedDocuments:
    """The answers of a file as documents; prompts are not learned."""

    def __init__(self, path: str | Path):
        """Reads the file.

        Raises:
          UserError: It cannot be read, or holds something else than answers.
        """
        self._documents: list[tuple[np.ndarray, int]] = []
        try:
            with open(path, "rb") as file:
                for number, raw in enumerate(file, start=1):
                    self._documents.append(_document(raw, path, number))
        except OSError as cause:
            raise UserError(
                f"cannot read answers: {path}: {cause.strerror}, expected a file of "
                f"answers. Check the path."
            ) from None

    def __len__(self) -> int:
        """Returns how many answers there are."""
        return len(self._documents)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 ids and, as long, uint8 1 where a token is learned."""
        tokens, prompt = self._documents[index]
        return tokens, (np.arange(len(tokens)) >= prompt).astype(np.uint8)


def _document(raw: bytes, path: str | Path, number: int) -> tuple[np.ndarray, int]:
    try:
        line = json.loads(raw)
        return np.asarray(line["token_ids"], np.int32), int(line["prompt_tokens"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"cannot read answers: {path}: line {number} is no answer, expected "
            f"token_ids and prompt_tokens. Finish the file, or choose another."
        ) from None

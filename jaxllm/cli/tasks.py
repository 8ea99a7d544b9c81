"""From rows to what the engine runs: token ids, whole options, batches of one shape."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from jaxllm.checkpoints import LanguageModel
from jaxllm.cli.rows import Failure, Row
from jaxllm.core.errors import CapacityError, UserError
from jaxllm.decoding import Constraint, Drafter, make_sampler
from jaxllm.decoding.buckets import Shapes, prompt_bucket, shapes_for
from jaxllm.decoding.decode import check_ids
from jaxllm.decoding.job import BATCH, encode

__all__ = ["Settings", "Task", "batches", "encode_chat", "make_tasks", "shape_of"]

DEFAULT_NEW_TOKENS = 128
_PENDING_ROWS = 512
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
)

# Samples of one row are this far apart in seeds (the golden ratio of 2**32), so that
# they meet no other row's seed in any job of fewer than millions of rows.
_SAMPLE_STRIDE = 0x9E3779B9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the flags say of every row.

    Attributes:
      max_new_tokens: None for the default, or what the model's positions leave.
      temperature: As in `api.generate`, like the next five.
      top_p: See there.
      top_k: See there.
      min_p: See there.
      repetition_penalty: See there.
      presence_penalty: See there.
      verify: How drafts are tested, the same for all rows.
      constraint: What every text has to obey.
      stop: Strings that end a row.
      seed: Row i draws with `seed + i`, i being its line from 0.
      chat: Whether a prompt is what a user says in a conversation.
      num_samples: Results of each row.
      truncate: Whether a prompt that is too long loses its beginning.
      shared_prefix: As in `api.generate`.
      preamble: Text before every prompt; the system message of a conversation.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    verify: str = "match"
    constraint: Constraint | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    chat: bool = False
    num_samples: int = 1
    truncate: bool = False
    shared_prefix: str = "auto"
    preamble: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One sample of one row.

    Attributes:
      line: The row's line in the file, from 1.
      id: The row's id.
      sample: Which of the row's samples.
      ids: Token ids of the prompt.
      max_new_tokens: Whole number, like all options after defaults are filled in.
      sampling: `temperature`, the filters and the penalties, by name.
      stop: Strings that end it.
      seed: Of this sample.
      shared: `verify`, `constraint` and `shared_prefix`, the same for every task of a
        job.
    """

    line: int
    id: str | int
    sample: int
    ids: list[int]
    max_new_tokens: int
    sampling: dict[str, Any]
    stop: tuple[str, ...]
    seed: int
    shared: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)


def make_tasks(lm: LanguageModel, row: Row, settings: Settings) -> list[Task]:
    """Turns a row into tasks, one for each sample.

    Args:
      lm: The model.
      row: What the line asks for.
      settings: What holds where the line says nothing.

    Raises:
      UserError: The prompt is empty, too long or no text of the model's, or an option
        is out of range.
    """
    options = {**vars(settings), **row.options}
    sampling = {name: options[name] for name in _SAMPLING}
    _check_sampling(**sampling)
    ids, new = _fit(lm, _encode(lm, row, settings), options)
    seed = row.options.get("seed", settings.seed + row.line - 1)
    return [
        Task(
            line=row.line,
            id=row.id,
            sample=sample,
            ids=ids,
            max_new_tokens=new,
            sampling=sampling,
            stop=tuple(options["stop"]),
            seed=(seed + sample * _SAMPLE_STRIDE) % 2**32,
            shared={
                name: getattr(settings, name)
                for name in ("verify", "constraint", "shared_prefix")
            },
        )
        for sample in range(settings.num_samples)
    ]


@functools.lru_cache(maxsize=64)
def _check_sampling(**sampling: Any) -> None:
    # Cached because it makes arrays, and most rows of a job are alike.
    make_sampler(1, **sampling)


def _encode(lm: LanguageModel, row: Row, settings: Settings) -> list[int]:
    before = settings.preamble
    system = [{"role": "system", "content": before}] if before else []
    if row.is_chat:
        ids = encode_chat(lm, [*system, *row.prompt])
    elif settings.chat and isinstance(row.prompt, str):
        ids = encode_chat(lm, [*system, {"role": "user", "content": row.prompt}])
    elif isinstance(row.prompt, str):
        ids = encode(lm, before + row.prompt, row.line)
    else:
        head = encode(lm, before, row.line) if before else []
        ids = [*head, *encode(lm, row.prompt, row.line)]
    if not ids:
        raise CapacityError(
            "cannot generate: the prompt is empty, expected at least one token: the "
            "model has no start token to put in its place. Write a prompt."
        )
    check_ids(ids, lm.config.vocabulary, row.line)
    return ids


def encode_chat(lm: LanguageModel, messages: Any) -> list[int]:
    """Returns the ids of a conversation, up to where the model's answer begins.

    Raises:
      UserError: The model has no tokenizer or no chat template, or the template does
        not take these messages.
    """
    if lm.tokenizer is None:
        raise UserError(
            f"cannot chat: {lm.name}: has no tokenizer, expected one. Give token_ids."
        )
    text = lm.tokenizer.apply_chat_template(messages)
    return lm.tokenizer.encode(text, add_special_tokens=False)


def _fit(
    lm: LanguageModel, ids: list[int], options: dict[str, Any]
) -> tuple[list[int], int]:
    """Returns the ids, truncated if asked, and how many tokens may follow them."""
    positions, wanted = lm.config.max_positions, options["max_new_tokens"]
    if wanted is None:
        least = positions // 2 if options["truncate"] else 1
        new = min(DEFAULT_NEW_TOKENS, max(positions - len(ids), least))
    else:
        new = wanted
    room = positions - new
    if options["truncate"] and room > 0:
        ids = ids[-room:]
    if len(ids) > room:
        raise CapacityError(
            f"cannot generate: the prompt has {len(ids)} tokens, expected at most "
            f"{max(room, 0)} (the model's {positions} positions less {new} new ones). "
            f"Shorten it, lower --max_new_tokens or pass --truncate=left."
        )
    return ids, new


def batches(items: Iterable[list[Task] | Failure]) -> Iterator[list[Task] | Failure]:
    """Groups tasks into batches whose prompts share compiled shapes.

    The batches depend on the tasks alone, so a job that is started again forms the
    same ones and computes the same numbers.

    Args:
      items: Tasks of each row in order; failures pass through at once.

    Yields:
      Failures, and batches whose tasks have equal `max_new_tokens` and stop strings.
    """
    groups: dict[tuple[Any, ...], list[Task]] = {}
    pending = 0
    for item in items:
        if isinstance(item, Failure):
            yield item
            continue
        for task in item:
            bucket = prompt_bucket(len(task.ids))
            key = (bucket, task.max_new_tokens, task.stop)
            group = groups.setdefault(key, [])
            group.append(task)
            pending += 1
            if len(group) == BATCH:
                yield groups.pop(key)
                pending -= BATCH
        if pending >= _PENDING_ROWS:
            largest = max(groups, key=lambda key: len(groups[key]))
            pending -= len(groups[largest])
            yield groups.pop(largest)
    for key in sorted(groups, key=lambda key: json.dumps(key)):
        yield groups[key]


def shape_of(batch: list[Task], drafter: Drafter) -> tuple[Shapes, bool, bool, bool]:
    """Returns what decides which compiled program a batch runs."""
    lengths = [len(task.ids) for task in batch]
    new = max(task.max_new_tokens for task in batch)
    columns: dict[str, Any] = {
        name: [t.sampling[name] for t in batch] for name in batch[0].sampling
    }
    sampler = make_sampler(len(batch), **columns)
    shapes = shapes_for(lengths, new, drafter.depth)
    return shapes, sampler.greedy, sampler.filtered, sampler.penalized

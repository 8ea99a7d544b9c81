"""The Python door: load, logits, generate, stream, score, save.

Letters: T tokens of one sequence, V vocabulary.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoints import (
    LanguageModel,
    load_adapter,
    load_language_model,
    save_language_model,
)
from jaxllm.core.errors import UserError
from jaxllm.core.registry import MethodSpec
from jaxllm.core.sharding import fetch, make_mesh
from jaxllm.decoding import (
    BoundDrafter,
    Constraint,
    Decoded,
    Drafter,
    Snapshot,
    decode_chunks,
    make_sampler,
)
from jaxllm.decoding.buckets import batch_bucket, prompt_bucket
from jaxllm.decoding.constraints import make_constraint, with_room
from jaxllm.decoding.decode import check_ids
from jaxllm.decoding.job import BATCH, Job, Prompt, Result, column, encode, on_mesh
from jaxllm.decoding.stopping import StopText
from jaxllm.drafting import make_drafter
from jaxllm.models.freeze import Context, Model

__all__ = [
    "LanguageModel",
    "Result",
    "Score",
    "bind",
    "generate",
    "load",
    "logits",
    "save",
    "score",
    "stream",
]

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "verify",
)
_STREAM_STEPS = 8
_LOGIT_BUDGET = 2**25


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
      token_ids: Tokens of the continuation.
      logprobs: Log-probability of each, in nats.
      is_greedy: Whether each was the likeliest token.
    """

    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return float(sum(self.logprobs))


def load(
    path_or_name: str,
    dtype: Any = "bfloat16",
    mesh: Any = None,
    quantize: str | None = None,
    cache_dtype: Any = None,
    adapter: str | None = None,
) -> LanguageModel:
    """Loads a model and its tokenizer.

    Args:
      path_or_name: A Hugging Face directory, `hf:org/name`, an Orbax directory that
        this project wrote, or the name of a shipped model (`demo`).
      dtype: Dtype of parameters and activations.
      mesh: `jax.sharding.Mesh`, or text such as `"data=1,tensor=4"`; one device when
        None.
      quantize: Method that quantizes the weights as they are read, such as `"int8"`.
      cache_dtype: Dtype of cached keys and values. When None that of the activations,
        but float32 on a CPU, where narrow caches are slow to write.
      adapter: A directory with a LoRA adapter in PEFT's layout, or `hf:org/name`; it
        stays apart from the weights. `compression.merge` adds it to them, and
        `checkpoints.load_adapter` puts further ones around them.

    Returns:
      The model: `.model` (pure functions), `.params`, `.config`, `.tokenizer` (None if
      the directory has none).

    Raises:
      UserError: Something is missing or does not fit; the message says what to do.
    """
    cache_compiles()
    if isinstance(mesh, str):
        mesh = make_mesh(mesh)
    lm = load_language_model(
        path_or_name,
        dtype=dtype,
        mesh=mesh,
        quantize=quantize,
        cache_dtype=cache_dtype,
    )
    return lm if adapter is None else load_adapter(adapter, lm)


def save(lm: LanguageModel, directory: str, merge: bool = False) -> None:
    """Writes a Hugging Face directory that `load` and `transformers` read back.

    Args:
      lm: The model.
      directory: Where; absent or empty.
      merge: Whether adapters are written as part of the weights; they are refused
        otherwise. `checkpoints.save_adapter` writes one alone.
    """
    save_language_model(lm, directory, merge=merge)


def cache_compiles() -> None:
    """Keeps compiled programs on disk, unless the user has chosen where."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    folder = pathlib.Path.home() / ".cache" / "jaxllm" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # Nothing depends on it but start-up time.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def logits(lm: LanguageModel, token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Returns the logits of every token of every sequence.

    Args:
      lm: The model.
      token_ids: Ragged sequences of ids.

    Returns:
      For each sequence `[T, V]` float32.
    """
    rows = [list(ids) for ids in token_ids]
    found: list[np.ndarray] = [np.zeros((0, lm.config.vocabulary), np.float32)] * len(
        rows
    )
    for batch, tokens_BT, length_B in _padded(lm, rows):
        with on_mesh(lm):
            out = fetch(_logits(lm.params, tokens_BT, length_B, model=lm.model))
        for at, row in enumerate(batch):
            found[row] = out[at, : len(rows[row])]
    return found


@functools.partial(jax.jit, static_argnames=("model",))
def _logits(params: Any, tokens_BT: Any, length_B: Any, *, model: Model) -> Any:
    valid_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    context = Context.start(tokens_BT, valid_BT=valid_BT)
    return model(params, tokens_BT, context).logits_BTV


@functools.partial(jax.jit, static_argnames=("model",))
def _next_logprobs(params: Any, tokens_BT: Any, length_B: Any, *, model: Model) -> Any:
    """Returns the log-probability of every token but the first, and its top match."""
    out = _logits(params, tokens_BT, length_B, model=model)[:, :-1]
    following = tokens_BT[:, 1:]
    picked = jnp.take_along_axis(out, following[..., None], axis=-1)[..., 0]
    logprobs = picked - jax.nn.logsumexp(out, axis=-1)
    return logprobs, jnp.argmax(out, axis=-1) == following


def _padded(lm: LanguageModel, rows: list[list[int]]) -> Iterator[Any]:
    """Yields batches of equal padded length, small enough for their logits."""
    for row, ids in enumerate(rows):
        check_ids(ids, lm.config.vocabulary, row)
        if len(ids) > lm.config.max_positions:
            raise UserError(
                f"cannot run: sequence {row} has {len(ids)} tokens, expected at most "
                f"{lm.config.max_positions}, the model's positions. Shorten it."
            )
    groups: dict[int, list[int]] = {}
    for row, ids in enumerate(rows):
        if ids:
            groups.setdefault(prompt_bucket(len(ids)), []).append(row)
    for width, members in sorted(groups.items()):
        most = max(1, min(BATCH, _LOGIT_BUDGET // (width * lm.config.vocabulary)))
        for first in range(0, len(members), most):
            batch = members[first : first + most]
            tokens_BT = np.zeros((batch_bucket(len(batch)), width), np.int32)
            length_B = np.ones((len(tokens_BT),), np.int32)
            for at, row in enumerate(batch):
                tokens_BT[at, : len(rows[row])] = rows[row]
                length_B[at] = len(rows[row])
            yield batch, tokens_BT, length_B


def score(
    lm: LanguageModel, prompts: Sequence[Prompt], continuations: Sequence[Prompt]
) -> list[Score]:
    """Returns how likely each continuation is after its prompt.

    A text continuation is tokenized together with its prompt, as it would be read;
    where a token spans the two, it is tokenized alone.

    Args:
      lm: The model.
      prompts: Texts or ids; an empty one stands for the start token.
      continuations: As many texts or ids, each at least one token long.
    """
    if len(prompts) != len(continuations):
        raise UserError(
            f"cannot score: {len(continuations)} continuations, expected "
            f"{len(prompts)}, one for each prompt. Pass equal numbers."
        )
    pairs = [
        _join(lm, p, c, row)
        for row, (p, c) in enumerate(zip(prompts, continuations, strict=True))
    ]
    rows = [head + tail for head, tail in pairs]
    found: list[Score] = [Score([], [], True)] * len(rows)
    for batch, tokens_BT, length_B in _padded(lm, rows):
        with on_mesh(lm):
            logprob_BT, top_BT = fetch(
                _next_logprobs(lm.params, tokens_BT, length_B, model=lm.model)
            )
        for at, row in enumerate(batch):
            head, tail = pairs[row]
            span = slice(len(head) - 1, len(head) + len(tail) - 1)
            found[row] = Score(
                tail, logprob_BT[at, span].tolist(), bool(top_BT[at, span].all())
            )
    return found


def _join(
    lm: LanguageModel, prompt: Prompt, continuation: Prompt, row: int
) -> tuple[list[int], list[int]]:
    head = encode(lm, prompt, row)
    if not isinstance(continuation, str):
        tail = [int(i) for i in continuation]
    else:
        tail = []
        if isinstance(prompt, str):
            whole = encode(lm, prompt + continuation, row)
            tail = whole[len(head) :] if whole[: len(head)] == head else []
        if not tail and lm.tokenizer is not None:
            tail = lm.tokenizer.encode(continuation, add_special_tokens=False)
    if not head or not tail:
        which = "continuation" if head else "prompt"
        raise UserError(
            f"cannot score: {which} {row} has no tokens, expected at least one. "
            f"Write some text."
        )
    return head, tail


def bind(lm: LanguageModel, decode: str | MethodSpec | Drafter) -> BoundDrafter:
    """Makes a drafter ready for a model, to be used for several calls of `generate`.

    Args:
      lm: The target.
      decode: A method such as `"jacobi:window=16"`, or a `Drafter` made in Python.

    Returns:
      What `drafter=` takes. It keeps loaded files, and what an online drafter learns.
    """
    if not isinstance(decode, Drafter):
        decode = make_drafter(decode)
    with on_mesh(lm):
        return BoundDrafter(lm, decode)


def _bound(
    lm: LanguageModel, decode: str, drafter: Drafter | BoundDrafter | None
) -> BoundDrafter:
    if isinstance(drafter, BoundDrafter):
        return drafter
    return bind(lm, decode if drafter is None else drafter)


def _rule(
    lm: LanguageModel, constraint: Constraint | str | None, job: Job
) -> Constraint | None:
    """Returns a job's constraint, with room for its longest text."""
    if constraint is None:
        return None
    if isinstance(constraint, str):
        ends = lm.generation.eos_ids
        constraint = make_constraint(
            constraint, lm.tokenizer, lm.config.vocabulary, ends
        )
    return with_room(constraint, max(job.max_new_tokens, default=0))


def generate(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    decode: str = "autoregressive",
    drafter: Drafter | BoundDrafter | None = None,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    min_p: float | Sequence[float] = 0.0,
    stop: Sequence[str] | str = (),
    seed: int | Sequence[int] = 0,
    repetition_penalty: float | Sequence[float] = 1.0,
    presence_penalty: float | Sequence[float] = 0.0,
    verify: str = "match",
    constraint: Constraint | str | None = None,
    shared_prefix: str = "auto",
) -> list[Result]:
    """Generates a continuation of every prompt.

    Row i draws with seed `seed + i`, so a row's tokens do not depend on its batch.
    Every sampling option, `max_new_tokens` and `seed` may be given for each row.

    Args:
      lm: The model.
      prompts: Texts or lists of ids.
      decode: Method, `name[:option=value,...]`.
      drafter: A `Drafter` made in Python, or what `bind` returned, in place of
        `decode`.
      max_new_tokens: Most tokens to generate.
      temperature: 0 is greedy.
      top_p: Keeps the smallest set of likeliest tokens with this probability.
      top_k: Keeps the k likeliest tokens; 0 keeps all.
      min_p: Keeps tokens at least this likely relative to the likeliest.
      stop: Strings that end a row; they are not part of the text.
      seed: Seed of row 0, or of each row.
      repetition_penalty: Above 1 makes every token of prompt and output less likely.
      presence_penalty: Subtracted from the logits of every token of the output.
      verify: `"match"`: the tokens of plain decoding, whatever drafts; `"reject"`: the
        textbook rule for chains, equal to plain sampling in distribution only.
      constraint: What the text has to obey: `"regex:PATTERN"`, `"json:SCHEMA"` (inline
        or a file), `"lark:FILE"`, or a constraint made in Python. A row that has no
        end token to stop at stops where nothing may follow.
      shared_prefix: `"auto"`: what the prompts of a batch have in common is run and
        kept once, where it is long enough; `"off"`: every row has its own. Tokens are
        the same up to the rounding of ties.

    Returns:
      One result for each prompt, in order.

    Raises:
      UserError: An argument is wrong; the message says what to do.
    """
    job = Job.make(lm, prompts, max_new_tokens, stop, seed, shared_prefix)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options |= {"min_p": min_p, "repetition_penalty": repetition_penalty}
    options["presence_penalty"] = presence_penalty
    columns = {name: column(x, len(prompts), name) for name, x in options.items()}
    bound = _bound(lm, decode, drafter)
    rule = _rule(lm, constraint, job)
    results: list[Any] = [None] * len(prompts)
    for batch in job.batches():
        begun = time.perf_counter()
        sampler = make_sampler(
            len(batch),
            **{name: [x[i] for i in batch] for name, x in columns.items()},
            verify=verify,
        )
        outputs, readers = job.run(bound, batch, sampler, rule)
        seconds = time.perf_counter() - begun
        for at, row in enumerate(batch):
            results[row] = job.result(outputs[at], readers[at], seconds)
    return results


def stream(
    lm: LanguageModel, prompt: Prompt, **options: Any
) -> Generator[str, None, Result]:
    """Generates one continuation, handing out text as it comes.

    Args:
      lm: The model; it must have a tokenizer.
      prompt: Text or ids.
      **options: As for `generate`.

    Yields:
      Pieces of text whose concatenation is `generate`'s text.

    Returns:
      The whole result, as the generator's value.
    """
    if lm.tokenizer is None:
        raise UserError(
            f"cannot stream: {lm.name} has no tokenizer, expected one. Use generate, "
            f"which returns ids."
        )
    sampling = {n: options.pop(n) for n in _SAMPLING if n in options}
    sampler = make_sampler(1, **sampling)
    method = {n: options.pop(n) for n in ("decode", "drafter") if n in options}
    constraint = options.pop("constraint", None)
    options.pop("shared_prefix", None)  # one prompt shares nothing
    settings = {"max_new_tokens": 64, "stop": (), "seed": 0} | options
    if len(settings) > 3:
        unknown = sorted(set(settings) - {"max_new_tokens", "stop", "seed"})[0]
        raise UserError(
            f"cannot stream: option {unknown!r} is unknown, expected an option of "
            f"generate. Remove it."
        )
    job = Job.make(
        lm, [prompt], settings["max_new_tokens"], settings["stop"], settings["seed"]
    )
    bound = _bound(lm, method.get("decode", "autoregressive"), method.get("drafter"))
    reader = StopText(lm.tokenizer, job.stop)

    def watch(snapshot: Snapshot) -> list[bool]:
        return [reader.stopped]

    begun = time.perf_counter()
    request = job.request([0], sampler, _STREAM_STEPS)
    with on_mesh(lm):
        chunks = decode_chunks(
            lm.model,
            bound.arguments(_rule(lm, constraint, job)),
            request,
            drafter=bound.drafter,
            watch=watch,
        )
        done = yield from _pieces(chunks, reader)
    bound.params, [output] = done.drafter, done.outputs
    tail = reader.finish()
    if tail:
        yield tail
    return job.result(output, reader, time.perf_counter() - begun)


def _pieces(
    chunks: Iterator[Snapshot], reader: StopText
) -> Generator[str, None, Decoded]:
    """Yields the text of one row as its snapshots come; returns what it gave."""
    seen = 0
    while True:
        try:
            ids = next(chunks).token_ids[0]
        except StopIteration as end:
            return end.value
        piece = reader.step(ids[seen:])
        seen = len(ids)
        if piece:
            yield piece

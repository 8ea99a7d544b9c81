"""Decode speed beside other software: one machine, one model, one interleaved run.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/decode.py --output=runs/decode.json

Every contender continues the same random prompts with the same random weights, a Llama
of 110M parameters, on the same cores: this project, Hugging Face transformers eager and
compiled, CTranslate2, and llama.cpp where `llama-cpp-python` and `gguf` are installed.
What is not installed is left out and named. All contenders of a setting take turns,
round after round, so that whatever else the machine does meets all of them; figures are
medians over the rounds, ratios medians of the ratios within a round. Bars are judged
only when nothing else kept the machine busy.

Expect, on two otherwise idle cores with AVX-512, some ten minutes and the ratios of
`BARS` in `verdicts.py` met. Ratios hold from machine to machine; tokens/s do not.

A run gives two rates. *End to end* divides all new tokens by the whole time, prompt
included. *Decode* divides the tokens after the first by the time after the first, which
is the whole time less that of a separate run to the first token. No token ends a row
anywhere; that every row has the asked number of tokens is checked in every run.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

# Started by its path, only this file's own folder is found.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from absl import app, flags

from benchmarks import printed, verdicts
from benchmarks.machine import (
    OtherWork,
    ReadBandwidth,
    available_cores,
    environment,
    load_average,
    use_cores,
)
from benchmarks.peers import KINDS
from benchmarks.random_llama import MODELS, RandomLlama, random_prompts
from benchmarks.workers import ContenderError, Job, Worker

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Where the results go, as JSON.")
flags.DEFINE_enum("model", "llama-110m", sorted(MODELS), "Sizes of the random Llama.")
flags.DEFINE_integer("rounds", 5, "Turns of every contender.", lower_bound=1)
flags.DEFINE_integer("threads", 0, "Of every contender; all cores when 0.")
flags.DEFINE_integer("prompt", 128, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("new", 128, "New tokens of a row.", lower_bound=2)
flags.DEFINE_integer("prefill", 512, "Prompt of the prefill setting; 0: none.")
flags.DEFINE_list("batches", ["1", "8"], "Batch sizes.")
flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Dtypes of weights.")
flags.DEFINE_list(
    "contenders",
    [name for name in KINDS if name != "CTranslate2 int8"],
    f"Who takes part; known: {'; '.join(KINDS)}.",
)
flags.DEFINE_integer("seed", 0, "Of weights and prompts.")

PAUSE = 0.25
WIDE = "jaxllm wide"
CLAIM = (
    "Decoding on a CPU is about as fast as the fastest C++ engines and more than "
    "twice as fast as eager PyTorch in float32."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One interleaved run: what is done, by whom it can be done."""

    name: str
    dtype: str
    batch: int
    prompt: int
    new: int

    def entrants(self) -> list[str]:
        """Returns who was asked to take part; wide passes have one setting."""
        one = (self.batch, self.dtype, self.new > 1) == (1, "float32", True)
        return [name for name in FLAGS.contenders if one or name != WIDE]

    def obstacle(self, contender: str) -> str | None:
        """Returns why a contender does not enter, or None."""
        if contender.startswith("CTranslate2") and self.dtype != "float32":
            return "has no bfloat16 on a CPU"
        if contender == "llama.cpp" and (self.batch, self.dtype) != (1, "float32"):
            return "compared at batch 1 in float32 only"
        if contender == "HF compiled" and self.new == 1:
            return "compiles decode steps, not the prompt"
        return None


@dataclasses.dataclass
class Findings:
    """What a setting's rounds gave.

    Attributes:
      times: For each contender the answers of `measure`, one a round.
      warm: For each the answer of `warm_up`.
      missing: Why others have none.
      bandwidth: Bytes per second, one a round; empty where it is not measured.
      other_cores: How many cores others used meanwhile; None where that is unknown.
    """

    times: dict[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    warm: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    bandwidth: list[float] = dataclasses.field(default_factory=list)
    other_cores: float | None = None


def settings() -> list[Setting]:
    """Returns the settings, those of one dtype together."""
    found = []
    for dtype in FLAGS.dtypes:
        for batch in map(int, FLAGS.batches):
            found.append(
                Setting(
                    name=f"decode {dtype} batch {batch}",
                    dtype=dtype,
                    batch=batch,
                    prompt=FLAGS.prompt,
                    new=FLAGS.new,
                )
            )
        if dtype == "float32" and FLAGS.prefill:
            name = f"prefill {FLAGS.prefill} float32"
            found.append(
                Setting(name=name, dtype=dtype, batch=1, prompt=FLAGS.prefill, new=1)
            )
    return found


def say(text: str) -> None:
    """Tells a person who waits; the results go to standard output."""
    print(text, file=sys.stderr, flush=True)


class Field:
    """The workers of one dtype, and the settings that they run."""

    def __init__(self, directory: str, scratch: str, threads: int, vocabulary: int):
        self._options = (directory, threads, scratch)
        self._vocabulary = vocabulary
        self._workers: dict[str, Worker] = {}

    def run(self, setting: Setting, bandwidth: ReadBandwidth | None) -> Findings:
        """Warms up everyone who can enter, then lets them take turns."""
        findings = Findings()
        for name in setting.entrants():
            obstacle = setting.obstacle(name)
            if obstacle is not None:
                findings.missing[name] = obstacle
            elif name not in self._workers:
                self._start(name, setting.dtype)
        prompts = random_prompts(
            self._vocabulary, setting.batch, setting.prompt, FLAGS.seed
        )
        job = Job(prompts=prompts, count=setting.new)
        for name in setting.entrants():
            if name not in findings.missing:
                say(f"{setting.name}: {name}: load and warm up")
                self._try(findings, name, "warm_up", job)
        workers = [self._workers[name].pid for name in findings.warm]
        others = OtherWork([os.getpid(), *workers])
        for turn in range(FLAGS.rounds):
            say(f"{setting.name}: round {turn + 1} of {FLAGS.rounds}")
            self._round(findings, job, turn, bandwidth)
        findings.other_cores = others.cores()
        if setting.dtype == "float32" and setting.new > 1:
            self._compare_tokens(findings, job)
        return findings

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers = {}

    def _start(self, name: str, dtype: str) -> None:
        directory, threads, scratch = self._options
        dtype = "int8" if name.endswith("int8") else dtype
        self._workers[name] = Worker(name, directory, dtype, threads, scratch)

    def _round(
        self,
        findings: Findings,
        job: Job,
        turn: int,
        bandwidth: ReadBandwidth | None,
    ) -> None:
        names = list(findings.warm)
        # Everyone begins a round once, so that no one always follows the same one.
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            # OpenMP threads spin for a while after their work, on the next one's core.
            time.sleep(PAUSE)
            self._try(findings, name, "measure", job)
        if bandwidth is not None:
            time.sleep(PAUSE)
            findings.bandwidth.append(bandwidth.measure())

    def _try(self, findings: Findings, name: str, question: str, job: Job) -> None:
        """Asks a worker; one that fails is out of the setting, with the reason."""
        try:
            answer = self._workers[name].ask(question, job)
        except ContenderError as error:
            say(f"{name} is left out: {error}")
            findings.missing[name] = str(error)
            findings.warm.pop(name, None)
            findings.times.pop(name, None)
            return
        if question == "warm_up":
            findings.warm[name] = answer
        else:
            findings.times.setdefault(name, []).append(answer)

    def _compare_tokens(self, findings: Findings, job: Job) -> None:
        """Says for each contender where it first differs from HF eager, and how."""
        reference = findings.warm.get(verdicts.REFERENCE)
        if reference is None:
            return
        for name, warm in findings.warm.items():
            if name.endswith("int8"):
                continue  # Other weights, other tokens.
            warm["difference"] = difference = verdicts.first_difference(
                warm["tokens"], reference["tokens"]
            )
            if difference is not None:
                row, at = difference["row"], difference["index"]
                known = job.prompts[row] + reference["tokens"][row][:at]
                pair = warm["tokens"][row][at], reference["tokens"][row][at]
                judge = self._workers[verdicts.REFERENCE]
                difference.update(judge.ask("margin", known, *pair))


def measure_all(model: RandomLlama, threads: int, scratch: str) -> list[dict[str, Any]]:
    """Runs every setting and returns the rows of all."""
    directory = pathlib.Path(scratch) / "model"
    say(f"writing {model.parameters / 1e6:.0f}M random parameters")
    model.write(directory, FLAGS.seed)
    bandwidth = ReadBandwidth(threads, 64 if FLAGS.model == "tiny" else 512)
    rows: list[dict[str, Any]] = []
    for dtype in FLAGS.dtypes:
        field = Field(str(directory), scratch, threads, model.vocabulary)
        try:
            for setting in (s for s in settings() if s.dtype == dtype):
                steady = setting.batch == 1 and setting.new > 1
                findings = field.run(setting, bandwidth if steady else None)
                rows += verdicts.rows_of(setting, findings, model.parameters)
        finally:
            field.close()
    # The bars were set for one model and one shape of work.
    asked = (FLAGS.model, FLAGS.prompt, FLAGS.new, FLAGS.prefill)
    judged = asked == ("llama-110m", 128, 128, 512)
    return rows + verdicts.bars(rows, judged=judged)


def main(argv: list[str]) -> None:
    """Runs the benchmark, prints the table and writes the JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    unknown = sorted(set(FLAGS.contenders) - set(KINDS))
    if unknown:
        known = "; ".join(KINDS)
        raise app.UsageError(f"unknown contender {unknown[0]!r}; known: {known}")
    model = MODELS[FLAGS.model]
    threads = FLAGS.threads or available_cores()
    about = environment() | {"load_average_before": load_average()}
    use_cores(threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure_all(model, threads, scratch)
    prompts = [
        random_prompts(model.vocabulary, setting.batch, setting.prompt, FLAGS.seed)
        for setting in settings()
    ]
    about |= {
        "load_average_after": load_average(),
        "seconds": round(time.perf_counter() - start, 1),
        "device": "cpu",
        "threads": threads,
        "rounds": FLAGS.rounds,
        "seed": FLAGS.seed,
        "model": {"name": FLAGS.model, "parameters": model.parameters}
        | dataclasses.asdict(model),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    result = {
        "format": 1,
        "claim": CLAIM,
        "paper": None,
        "rows": rows,
        "environment": about,
    }
    print(printed.render(rows, about))
    if FLAGS.output:
        path = pathlib.Path(FLAGS.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {path}")


if __name__ == "__main__":
    app.run(main)

"""Every kind of drafter on a model of 110M random weights: what a step costs.

    python benchmarks/compare_random.py --output=runs/random

Writes a Llama with random weights and prompts of two categories, and runs `jaxllm
compare` on them. Random weights have nothing to say, so the tokens per pass mean little
here; the times are those of a model of that size, whatever its weights are. Greedy text
of random weights repeats itself; drawn at a temperature of 1 it never does. `free`
prompts hold no token twice; `repeated` ones the same few tokens again and again.

Plain decoding at eight query rows stands among the methods: what a drafter of eight
nodes takes longer for a pass than that is the overhead of proposing, verifying and
appending.

Expect, on two otherwise idle cores, some twenty minutes.
"""

import contextlib
import json
import pathlib
import sys
import tempfile

# Started by its path, only this file's own folder is found.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
from absl import app, flags

from benchmarks.random_llama import MODELS
from jaxllm.cli.main import main as jaxllm_command

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Folder for the results.", required=True)
flags.DEFINE_enum("model", "llama-110m", sorted(MODELS), "Sizes of the random Llama.")
flags.DEFINE_integer("runs", 7, "Timed rounds.", lower_bound=1)
flags.DEFINE_integer("new", 64, "New tokens of a prompt.", lower_bound=2)
flags.DEFINE_integer("prompts", 2, "Prompts of each category.", lower_bound=1)
flags.DEFINE_integer("length", 96, "Tokens of a prompt.", lower_bound=8)
flags.DEFINE_float("temperature", 0.0, "1 gives text in which nothing repeats.")
flags.DEFINE_integer("seed", 0, "Of weights and prompts.")
flags.DEFINE_multi_string("decode", [], "Methods; a selection when none is given.")

METHODS = (
    "autoregressive",
    "autoregressive:query_width=8",
    "prompt_lookup",
    "prompt_lookup:lean=false",
    "adaptive:drafter=(prompt_lookup)",
    "trigram",
    "jacobi:window=8",
    "lookahead:window=2,ngram=3,pool=2",
    "model:model=target,layers=2,length=3",
    "tree:model=target,layers=2,nodes=8",
    "adaptive:drafter=(model:model=target,layers=2,length=3),widths=1+4",
)


def prompts(vocabulary: int, count: int, length: int, seed: int) -> list[dict]:
    """Returns rows for `jaxllm compare --prompts`."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        free = rng.choice(np.arange(3, vocabulary), length, replace=False)
        phrase = rng.choice(np.arange(3, vocabulary), 8, replace=False)
        repeated = np.resize(phrase, length)
        rows.append({"id": f"free-{i}", "category": "free", "token_ids": free.tolist()})
        rows.append(
            {
                "id": f"repeated-{i}",
                "category": "repeated",
                "token_ids": repeated.tolist(),
            }
        )
    return rows


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    sizes = MODELS[FLAGS.model]
    output = pathlib.Path(FLAGS.output).absolute()
    # Inside the folder, so that results name the model and not a place.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        sizes.write(pathlib.Path(FLAGS.model), FLAGS.seed)
        rows = prompts(sizes.vocabulary, FLAGS.prompts, FLAGS.length, FLAGS.seed)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path("prompts.jsonl").write_text(lines)
        arguments = [
            f"--model={FLAGS.model}",
            "--prompts=prompts.jsonl",
            f"--output={output}",
            f"--runs={FLAGS.runs}",
            f"--max_new_tokens={FLAGS.new}",
            f"--temperature={FLAGS.temperature}",
            "--dtype=float32",
            *(f"--decode={method}" for method in FLAGS.decode or METHODS),
        ]
        sys.exit(jaxllm_command(["compare", *arguments]))


if __name__ == "__main__":
    app.run(main)

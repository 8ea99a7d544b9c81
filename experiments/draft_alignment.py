"""Does an aligned draft emit more tokens a pass? Block efficiency, prompt by prompt.

    python -m experiments.draft_alignment --target=runs/demo/model \
        --drafts=runs/demo-draft/model,runs/aligned/model --output=alignment.json

Every draft writes ahead for the same held-back prompts, tasks and beginnings of
stories, greedily and at a temperature, at every length. A row has the block efficiency
(tokens a target pass), its ratio to the first draft's, and the interval that 95 % of
paired bootstrap samples of the prompts fall in: a ratio whose interval holds 1 is no
gain. Drafts may be several trainings of one recipe that differ in their seed; look at
all of them before claiming anything.

Paper (Direct Alignment of Draft Model, arXiv 2403.00858): up to 2.3.
"""

import pathlib
from typing import Any

import numpy as np
from absl import app, flags

import jaxllm
from experiments.counted_cost import story_beginnings, write_report
from jaxllm.training.synthetic import TASKS, prompt_rows

FLAGS = flags.FLAGS
flags.DEFINE_string("target", "demo", "Directory or name.")
flags.DEFINE_list("drafts", ["demo-draft"], "Directories or names.")
flags.DEFINE_list("lengths", ["3", "5"], "Tokens that are drafted.")
flags.DEFINE_list("temperatures", ["0", "1"], "0 is greedy; else `reject` verifies.")
flags.DEFINE_string("family", "runs/family", "Where the validation stories are.")
flags.DEFINE_integer("examples", 10, "Held-back prompts of each task.", lower_bound=1)
flags.DEFINE_integer("stories", 60, "Validation stories.", lower_bound=0)
flags.DEFINE_integer("new", 64, "New tokens of a prompt.", lower_bound=2)
flags.DEFINE_integer("samples", 10_000, "Of the bootstrap.", lower_bound=100)
flags.DEFINE_string("output", None, "Where the rows go, as JSON.")


def held_back_prompts(lm: jaxllm.LanguageModel) -> list[list[int]]:
    """Prompts that no training of the family has seen: tasks, then stories."""
    rows = prompt_rows(tuple(TASKS), FLAGS.examples, seed=11)
    found = [lm.tokenizer.encode(row["prompt"]) for row in rows]
    file = pathlib.Path(FLAGS.family) / "stories_valid.txt"
    return [*found, *story_beginnings(lm, file, FLAGS.stories, seed=11)]


def counts(
    lm: jaxllm.LanguageModel, draft: str, prompts: Any, length: int, temperature: float
) -> np.ndarray:
    """Returns tokens and target passes of every prompt, `[prompts, 2]`."""
    results = jaxllm.generate(
        lm,
        prompts,
        decode=f"model:model={draft},length={length}",
        max_new_tokens=FLAGS.new,
        temperature=temperature,
        verify="reject" if temperature else "match",
    )
    return np.asarray(
        [(r.stats["emitted"], r.stats["target_passes"]) for r in results], np.float64
    )


def efficiency(counted: np.ndarray) -> np.ndarray:
    """Tokens a pass of all prompts together; any axes may stand before the two."""
    total = counted.sum(axis=-2)
    return total[..., 0] / total[..., 1]


def interval(
    counted: np.ndarray, first: np.ndarray, samples: int
) -> tuple[float, float]:
    """Returns the 2.5 and 97.5 percentiles of the ratio over resampled prompts."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(counted), (samples, len(counted)))
    ratios = efficiency(counted[drawn]) / efficiency(first[drawn])
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    lm = jaxllm.load(FLAGS.target, dtype="float32")
    prompts = held_back_prompts(lm)
    rows = []
    for temperature in map(float, FLAGS.temperatures):
        for length in map(int, FLAGS.lengths):
            first = None
            for draft in FLAGS.drafts:
                counted = counts(lm, draft, prompts, length, temperature)
                first = counted if first is None else first
                low, high = interval(counted, first, FLAGS.samples)
                row = {
                    "draft": draft,
                    "length": length,
                    "temperature": temperature,
                    "block_efficiency": round(float(efficiency(counted)), 4),
                    "ratio": round(float(efficiency(counted) / efficiency(first)), 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                }
                print(row, flush=True)
                rows.append(row)
    write_report(
        FLAGS.output,
        "a draft distilled on what its target writes has more of its tokens accepted",
        "arXiv 2403.00858: up to 2.3 times",
        rows,
    )


if __name__ == "__main__":
    app.run(main)

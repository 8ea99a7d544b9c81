"""Cascade Speculative Drafting: counted cost against the best-tuned single draft.

    python -m experiments.cs_drafting --output=cs_drafting.json

Paper (arXiv 2312.11462, table 2): up to 1.81 times over speculative decoding with the
same draft, in counted cost, with FLAN-T5-XXL and LLaMA-2-7B as targets and drafts that
are taken to be nearly free: a LLaMA-2-7B target is entered as 70,000 against 160.

Set-up: `demo` (2.9M parameters), `demo-draft` (0.56M) and the statistical drafter
`max_gram` at no cost, greedy, 12 story prompts, 96 tokens each. Every length of the
single draft is tried; a cascade has to beat the best of them.

Measured over the single draft at its best length (3): vertical 1.003, horizontal 1.042
and both 1.050.

Believe a gain of 1.0 to 1.4 here: the draft costs a fifth of the target, so little is
left to save in it.
"""

from absl import app, flags

import jaxllm
from experiments.counted_cost import Setting, measure, story_prompts, write_report

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Where the JSON report goes.")
flags.DEFINE_string("model", "demo", "The target.")
flags.DEFINE_string("draft", "demo-draft", "The drafting model.")
flags.DEFINE_string("table", "demo-ngrams", "The statistical drafter's table.")
flags.DEFINE_integer("max_new_tokens", 96, "Of each prompt.")

LENGTHS = (1, 2, 3, 4, 5, 6, 8)


def settings(draft: str, table: str) -> dict[str, list[str]]:
    """Returns the methods of every kind."""
    gram = f"(max_gram:table={table},length=4)"
    tail = f"(max_gram:table={table},length=8)"
    verticals = {
        n: f"vertical:model={draft},length={n},drafter={gram}" for n in LENGTHS
    }
    return {
        "single draft": [f"model:model={draft},length={n}" for n in LENGTHS],
        "vertical": list(verticals.values()),
        "horizontal": [
            f"horizontal:drafters=(model:model={draft},length={n})+{tail},lengths={n}+{m}"
            for n in (2, 3, 4)
            for m in (2, 4)
        ],
        "both": [
            f"horizontal:drafters=({verticals[n]})+{tail},lengths={n}+{m}"
            for n in (2, 3, 4)
            for m in (2, 4)
        ],
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    lm = jaxllm.load(FLAGS.model, dtype="float32")
    best: dict[str, Setting] = {}
    rows = []
    for kind, methods in settings(FLAGS.draft, FLAGS.table).items():
        for method in methods:
            found = measure(
                lm, method, story_prompts(), max_new_tokens=FLAGS.max_new_tokens
            )
            rows.append({"kind": kind, **found.row()})
            if kind not in best or found.cost < best[kind].cost:
                best[kind] = found
    single = best["single draft"].cost
    for kind, found in best.items():
        ratio = round(single / found.cost, 4)
        rows.append({"kind": f"best {kind}", **found.row(), "over_single": ratio})
    claim = "cascades cost less, counted, than the best-tuned single draft"
    write_report(FLAGS.output, claim, "arXiv 2312.11462: up to 1.81", rows)


if __name__ == "__main__":
    app.run(main)

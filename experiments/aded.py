"""ADED: a table of tri-grams that learns while it drafts, against prompt lookup.

    python -m experiments.aded --output=aded.json

Paper (arXiv 2407.12021): up to 2.5x, Vicuna and LLaMA; adapting beats a frozen matrix.

Set-up: `demo` on the twelve story prompts of the package, greedy, 128 new tokens,
drafts of 8 nodes, of fewer for prompt lookup, whose best length counts. `frozen` keeps
the table that ships; `adapting` begins with it and learns; in the `second round` it
begins with what it learned from the same prompts. All rows of a batch teach one table.

Tokens a pass: 2.35 frozen, 2.52 adapting, 3.00 in the second round; 1.85 without a
table to begin with; prompt lookup 1.48 at its best length, 7. The paper's search (PUCT)
gives 2.34, 2.53 and 2.96: as much as taking the best nodes first, which is its optimum.
They are counted, and the same on every machine up to near ties.
"""

from absl import app, flags

import jaxllm
from experiments.counted_cost import measure, story_prompts, write_report
from jaxllm.decoding import BoundDrafter

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "demo", "The target.")
flags.DEFINE_string("table", "demo-ngrams", "Table to begin with.")
flags.DEFINE_integer("nodes", 8, "Nodes of a draft.", lower_bound=2)
flags.DEFINE_integer("max_new_tokens", 128, "Tokens of a story.", lower_bound=1)
flags.DEFINE_string("output", None, "Where the rows go, as JSON.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    lm = jaxllm.load(FLAGS.model, dtype="float32")
    prompts = story_prompts()
    rows = []

    def add(kind: str, drafter: str | BoundDrafter, name: str) -> None:
        found = measure(lm, drafter, prompts, max_new_tokens=FLAGS.max_new_tokens)
        rows.append({"kind": kind, **found.row(), "method": name})

    for search in ("best_first", "puct"):
        method = f"trigram:table={FLAGS.table},nodes={FLAGS.nodes},search={search}"
        add("frozen", f"{method},adapt=false", f"{method},adapt=false")
        bound = jaxllm.bind(lm, method)
        add("adapting", bound, method)
        add("second round", bound, method)
    bound = jaxllm.bind(lm, f"trigram:nodes={FLAGS.nodes}")
    add("without a table", bound, f"trigram:nodes={FLAGS.nodes}")
    for length in range(1, FLAGS.nodes):
        method = f"prompt_lookup:length={length}"
        add("prompt lookup", method, method)
    write_report(
        FLAGS.output,
        "more tokens a pass than prompt lookup at the same nodes; adapting helps",
        "arXiv 2407.12021: up to 2.5x",
        rows,
    )


if __name__ == "__main__":
    app.run(main)

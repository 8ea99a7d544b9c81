"""Counts the n-gram table that ships inside the package.

    python -m experiments.build_ngrams --data=DIR

`DIR` holds `tinystories_train.txt.gz` and `tinystories_valid.txt.gz`. Stories that also
stand in the validation text are left out. What is written are counts of up to
three tokens of `demo`'s tokenizer, as shares, and no text: for every slot of the table
the most frequent context that belongs there, and its likeliest continuations.

Expect 1,804,521 tokens of 8,112 stories and a file of 0.69 MB.
"""

from pathlib import Path

import numpy as np
from absl import app, flags

from jaxllm.checkpoints import load_tokenizer, resolve
from jaxllm.drafting.ngram_counts import build_trigram
from jaxllm.drafting.ngrams import save_table
from jaxllm.training.corpora import read_stories

FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "Directory of the two TinyStories files.")
flags.DEFINE_string("model", "demo", "Whose tokenizer counts the tokens.")
flags.DEFINE_string("output", "jaxllm/_data/ngrams/demo-ngrams.safetensors", "File.")
flags.DEFINE_integer("vocabulary", 2048, "V of the model.")
flags.DEFINE_integer("slots", 2**15, "Contexts of two tokens that have a place.")
flags.DEFINE_integer("rank", 4, "Continuations kept of each context.")


def main(argv: list[str]) -> None:
    stories = read_stories(FLAGS.data).train
    tokenizer = load_tokenizer(resolve(FLAGS.model))
    if tokenizer is None:
        raise app.UsageError(f"{FLAGS.model} has no tokenizer")
    tokens = np.concatenate([np.asarray(tokenizer.encode(s)) for s in stories])
    table = build_trigram(tokens, FLAGS.vocabulary, FLAGS.slots, FLAGS.rank)
    output = Path(FLAGS.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_table(output, table)
    used = int((np.asarray(table.key_H2)[:, 0] >= 0).sum())
    print(f"{len(stories)} stories, {len(tokens)} tokens")
    print(f"{used} of {table.slots} slots used, {table.nbytes} bytes in memory")
    print(f"{output}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    flags.mark_flag_as_required("data")
    app.run(main)

"""Files and things in memory as sources of a stream."""

import re

import numpy as np
import pytest

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.training.data import DataConfig, open_data
from jaxllm.training.sources import SourceConfig
from tests.training.small_data import (
    SEPARATOR,
    TOKENIZER,
    Lists,
    finite,
    pieces,
)


def write_texts(path, texts):
    path.write_text("".join(f"{text}\n{SEPARATOR}\n" for text in texts))
    return path


def file_config(path, **options):
    source = SourceConfig(path=str(path), separator=SEPARATOR)
    options = {"row_length": 16, "batch_rows": 2, "prefetch": 0} | options
    return DataConfig(sources=(source,), **options)


def test_a_stream_of_a_file_speaks_its_text(tmp_path):
    texts = ["the cat", "a dog and a bird that sings", "x"]
    path = write_texts(tmp_path / "a.txt", texts)
    config = file_config(path, epochs=1, shuffle=False)
    stream = open_data(config, TOKENIZER, tmp_path / "cache")
    tokens = np.concatenate([b.tokens_BT[b.segment_BT > 0] for b in stream])
    wanted = "".join(f"<s>{text}</s>" for text in texts)
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == wanted
    (summary,) = stream.sources
    assert (summary.documents, summary.tokens) == (3, len(tokens))
    assert not summary.is_estimate


def test_a_position_is_of_the_text(tmp_path):
    path = write_texts(tmp_path / "a.txt", ["the cat"] * 9)
    state = open_data(file_config(path), TOKENIZER, tmp_path / "cache").get_state()
    open_data(file_config(path), TOKENIZER, tmp_path / "other").set_state(state)
    write_texts(path, ["the cow"] * 9)
    with pytest.raises(ConfigError, match="cannot resume data"):
        open_data(file_config(path), TOKENIZER, tmp_path / "cache").set_state(state)


def test_several_files_are_one_source(tmp_path):
    for i in range(3):
        write_texts(tmp_path / f"part-{i}.txt", [f"{i}a", f"{i}b"])
    config = file_config(tmp_path / "part-*.txt", epochs=1, shuffle=False)
    stream = open_data(config, TOKENIZER, tmp_path / "cache")
    found = [TOKENIZER.decode(piece) for piece in pieces(stream)]
    assert "".join(found) == "0a0b1a1b2a2b"
    assert [source.documents for source in stream.sources] == [6]
    with pytest.raises(ConfigError, match=f"looked for {tmp_path}/no-"):
        open_data(file_config(tmp_path / "no-*.txt"), TOKENIZER, tmp_path / "cache")


def test_what_is_cut_off_is_counted(tmp_path):
    path = write_texts(tmp_path / "a.txt", ["x" * 14, "y" * 15, "z" * 20, "w"])
    config = file_config(path, packing="first_fit", epochs=1, shuffle=False)
    stream = open_data(config, TOKENIZER, tmp_path / "cache")
    (summary,) = stream.sources
    # Every text has a begin and an end token beside its letters.
    assert (summary.cut_documents, summary.cut_tokens) == (2, 1 + 6)
    assert sorted(map(len, pieces(stream))) == [3, 16, 16, 16]
    whole = open_data(file_config(path), TOKENIZER, tmp_path / "cache").sources[0]
    assert (whole.cut_documents, whole.cut_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([[1, 2]] * 3 + [[]], "document 3: tokens of shape (0,)"),
        ([[1, 2]] * 3 + [[[1, 2]]], "document 3: tokens of shape (1, 2)"),
        ([[1, 2]] * 3 + [[1] * 17], "document 3: 17 tokens, expected at most 16"),
    ],
)
def test_a_wrong_document_is_refused(documents, said):
    with pytest.raises(UserError, match=re.escape(said)):
        finite(documents, packing="first_fit")


class BreaksLater(Lists):
    def __getitem__(self, index):
        tokens, learn = super().__getitem__(index)
        return tokens, learn if index != 300 else learn[1:]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_wrong_document_is_refused_from_the_thread_too(prefetch):
    documents = {"only": BreaksLater([[1, 2, 3]] * 301)}
    stream = finite(documents, prefetch=prefetch)
    with pytest.raises(UserError, match="document 300: tokens of shape"):
        list(stream)

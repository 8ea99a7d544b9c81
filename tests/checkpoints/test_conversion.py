import gzip
import json
import shutil

import pytest

from jaxllm.checkpoints import load_tokenizer
from jaxllm.core.errors import CheckpointError
from tests.checkpoints.tokenizer_oracle import TEXTS, edit, transformers_tokenizer


@pytest.fixture
def llama2(data_dir, tmp_path):
    """A directory with a SentencePiece model and settings that name its class."""
    shutil.copy(data_dir / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def assert_equals_sentencepiece(directory):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(directory / "tokenizer.model")
    )
    tokenizer = load_tokenizer(directory, 32_000)
    # Special tokens written out in a text are plain text to sentencepiece.
    for text in [t for t in TEXTS if "<s>" not in t and "</s>" not in t]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("a</s>")[-1] == 2
    return tokenizer


def test_a_sentencepiece_model_gives_its_own_ids(llama2):
    assert_equals_sentencepiece(llama2)


def test_a_sentencepiece_model_without_settings(llama2):
    (llama2 / "tokenizer_config.json").unlink()
    (llama2 / "config.json").write_text('{"model_type": "llama"}')
    assert_equals_sentencepiece(llama2)


def test_settings_can_switch_the_bos_token_off(llama2):
    edit(llama2 / "tokenizer_config.json", add_bos_token=False)
    assert load_tokenizer(llama2, 32_000).encode("Hello") == [15043]


def test_a_damaged_sentencepiece_model(llama2):
    path = llama2 / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(llama2, 32_000)
    message = str(caught.value)
    assert message.startswith(f"cannot load tokenizer: {path}: Error parsing message")
    assert message.endswith(
        ", expected a SentencePiece model. Download it again, or save it as "
        "tokenizer.json."
    )


def train_sentencepiece(directory, data_dir, **options):
    import sentencepiece

    with gzip.open(data_dir / "text" / "tinystories_valid.txt.gz", "rt") as file:
        lines = file.read(50_000).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=400,
        minloglevel=2,
        **options,
    )
    return directory / "tokenizer.model"


# As Llama's and Gemma's were trained; the defaults of the trainer change the text.
PLAIN = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "bos_id": -1, "eos_id": 5},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<|user|>", "\n\n"]},
    ],
)
def test_other_sentencepiece_models_give_their_own_ids(data_dir, tmp_path, options):
    import sentencepiece

    path = train_sentencepiece(tmp_path, data_dir, **PLAIN, **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(tmp_path, 400)
    for text in [*TEXTS, "hi <|user|> there", "a\n\n\nb"]:
        if "<s>" in text or "</s>" in text:
            continue  # plain text to sentencepiece
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
    bos = options.get("bos_id", 1)
    assert tokenizer.bos_id == (None if bos < 0 else bos)
    assert tokenizer.eos_id == options.get("eos_id", 2)
    assert tokenizer.encode("")[:1] == ([] if bos < 0 else [bos])
    if "user_defined_symbols" in options:  # they are text, unlike special tokens
        assert tokenizer.decode(tokenizer.encode("hi <|user|>")) == "hi <|user|>"


@pytest.mark.parametrize(
    ("options", "model_type", "rule"),
    [
        (PLAIN | {"model_type": "unigram"}, 1, "identity"),
        (PLAIN | {"normalization_rule_name": "nmt_nfkc"}, 2, "nmt_nfkc"),
        (PLAIN | {"remove_extra_whitespaces": True}, 2, "identity"),
        (PLAIN | {"treat_whitespace_as_suffix": True}, 2, "identity"),
    ],
)
def test_a_sentencepiece_model_that_cannot_be_converted_exactly(
    data_dir, tmp_path, options, model_type, rule
):
    path = train_sentencepiece(tmp_path, data_dir, **options)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path, 400)
    assert str(caught.value) == (
        f"cannot load tokenizer: {path}: is of model type {model_type} and normalizes "
        f"by '{rule}', expected BPE (2) that changes no text. Save it as "
        "tokenizer.json."
    )


def test_a_sentencepiece_model_with_pieces_that_are_no_text(data_dir, tmp_path):
    path = train_sentencepiece(tmp_path, data_dir, **PLAIN)
    content = path.read_bytes()
    piece = "\u2581the".encode()
    assert piece in content
    path.write_bytes(content.replace(piece, b"\xff\xff\xffthe"))
    with pytest.raises(CheckpointError, match="expected a SentencePiece model"):
        load_tokenizer(tmp_path, 400)


def test_symbols_that_convert_differently_are_noticed(data_dir, tmp_path):
    options = PLAIN | {"user_defined_symbols": ["<|user|>"]}
    path = train_sentencepiece(tmp_path, data_dir, **options)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path, 400)
    assert f"{path}: 'a<|user|>b <|user|>' converts to ids [" in str(caught.value)


def test_tokens_added_to_a_sentencepiece_model(llama2):
    listed = llama2 / "added_tokens.json"
    listed.write_text('{"<|b|>": 32001, "<|a|>": 32000}')
    tokenizer = load_tokenizer(llama2, 32_064)
    assert tokenizer.encode("<|a|><|b|>") == [1, 32000, 32001]
    with pytest.raises(CheckpointError, match="has id 32001, expected ids below 32001"):
        load_tokenizer(llama2, 32_001)
    listed.write_text('{"<|a|>": 32005}')
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(llama2, 32_064)
    assert str(caught.value) == (
        f"cannot load tokenizer: {listed}: '<|a|>' has id 32005, expected 32000, the "
        "next one. Save the tokenizer as tokenizer.json."
    )
    listed.write_text('{"<|a|>": "32000"}')
    with pytest.raises(CheckpointError, match="an id that is not a whole number"):
        load_tokenizer(llama2, 32_064)


def test_a_conversion_that_differs_is_noticed(llama2, monkeypatch):
    import sentencepiece

    # What the right model would say, but for one piece.
    encode = sentencepiece.SentencePieceProcessor.encode

    def other(self, text, **options):
        pieces = encode(self, text, **options)
        return pieces[:-1] if text == "12345" else pieces

    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "encode", other)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(llama2, 32_000)
    assert str(caught.value) == (
        f"cannot load tokenizer: {llama2 / 'tokenizer.model'}: '12345' converts to ids "
        "[29871, 29896, 29906, 29941, 29946, 29945], expected [29871, 29896, 29906, "
        "29941, 29946] as sentencepiece gives. Save it as tokenizer.json."
    )


@pytest.fixture
def gpt2(data_dir, tmp_path):
    """A directory with GPT-2's vocabulary and merges, and its model type."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data_dir / "tokenizers" / "gpt2" / name, tmp_path)
    config = {"model_type": "gpt2", "bos_token_id": 50256, "eos_token_id": 50256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_vocabulary_with_merges(gpt2):
    tokenizer = load_tokenizer(gpt2, 50_257)
    theirs = transformers_tokenizer(gpt2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (50256, 50256)
    assert tokenizer.vocab_size == 50_257


def test_merges_must_be_there(gpt2):
    (gpt2 / "merges.txt").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(gpt2, 50_257)
    assert str(caught.value) == (
        f"cannot load tokenizer: {gpt2 / 'vocab.json'}: has no merges.txt beside it, "
        "expected both. Download it."
    )


def test_a_vocabulary_of_no_known_class(gpt2):
    (gpt2 / "config.json").unlink()
    with pytest.raises(CheckpointError, match="expected a readable file and a tokeni"):
        load_tokenizer(gpt2, 50_257)


def test_code_in_the_directory_is_not_run(gpt2, monkeypatch):
    marker = gpt2 / "marker"
    (gpt2 / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    auto_map = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Config"}
    edit(gpt2 / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    edit(gpt2 / "config.json", model_type="own", auto_map=auto_map)

    def no_input(*args):
        raise AssertionError("standard input was used")

    monkeypatch.setattr("builtins.input", no_input)
    with pytest.raises(CheckpointError, match="transformers cannot convert it"):
        load_tokenizer(gpt2, 50_257)
    assert not marker.exists()


def test_a_converted_tokenizer_is_saved_as_it_behaves(llama2, tmp_path):
    tokenizer = load_tokenizer(llama2, 32_000)
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    again = load_tokenizer(saved, 32_000)
    theirs = transformers_tokenizer(saved)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text)
    assert (again.bos_id, again.eos_id) == (1, 2)

import gzip
import json
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from jaxllm.checkpoints import Tokenizer, load_tokenizer
from jaxllm.core.errors import CheckpointError, ConfigError, UserError
from tests.checkpoints.tokenizer_oracle import TEXTS, edit, transformers_tokenizer

CHECKPOINTS = {"stories260K": 512, "babyllama105": 105}


def word_level(words):
    return Backend(models.WordLevel({w: i for i, w in enumerate(words)}, words[0]))


@pytest.fixture
def small(tmp_path):
    """A directory with a vocabulary of four tokens, two of them special."""
    backend = word_level(["<unk>", "<s>", "hello", "world"])
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return tmp_path


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_ids_and_text_equal_those_of_transformers(data_dir, name):
    directory = data_dir / "models" / name
    ours = load_tokenizer(directory, CHECKPOINTS[name])
    theirs = transformers_tokenizer(directory)
    with gzip.open(data_dir / "text" / "tinystories_valid.txt.gz", "rt") as file:
        lines = file.read(20_000).splitlines()
    for text in [*TEXTS, *lines]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                decoded = ours.decode(ids, skip_special_tokens=skip)
                assert decoded == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs) == CHECKPOINTS[name]
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_prompts(data_dir, name):
    directory = data_dir / "models" / name
    tokenizer = load_tokenizer(directory, CHECKPOINTS[name])
    golden = json.loads((directory / "golden.json").read_text())
    for prompt in golden["prompts"]:
        assert tokenizer.encode(prompt["text"]) == prompt["ids"]
        assert tokenizer.decode(prompt["greedy_64"]) == prompt["greedy_text"]


def test_tokens_and_their_ids(data_dir):
    tokenizer = load_tokenizer(data_dir / "models" / "stories260K", 512)
    assert tokenizer.token_string(1) == "<s>"
    assert tokenizer.token_string(13) == "<0x0A>"
    assert tokenizer.token_string(512) is None
    assert tokenizer.id_of("</s>") == 2
    assert tokenizer.id_of("no such token") is None
    assert tokenizer.decode([512, 99_999]) == ""


def test_a_fast_load_imports_no_transformers(data_dir):
    code = (
        "import sys; from jaxllm.checkpoints import load_tokenizer\n"
        f"t = load_tokenizer({str(data_dir / 'models' / 'stories260K')!r}, 512)\n"
        "assert t.encode('Once upon a time') == [1, 403, 407, 261, 378]\n"
        "heavy = {'transformers', 'huggingface_hub', 'sentencepiece', 'jinja2'}\n"
        "print(sorted((heavy | {'torch', 'tensorflow', 'orbax'}) & set(sys.modules)))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert child.stdout == "[]\n"


def test_a_directory_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path, 10) is None


def test_a_truncated_tokenizer_is_named(small):
    path = small / "tokenizer.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(small, 4)
    message = str(caught.value)
    assert message.startswith(f"cannot load tokenizer: {path}: EOF while parsing")
    assert message.endswith(
        ", expected a file of the tokenizers package. Download or save it again."
    )


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"version": "1.0", "model": {}}']
)
def test_a_malformed_tokenizer_is_named(small, content):
    (small / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*, expected a file"):
        load_tokenizer(small, 4)


def test_a_vocabulary_larger_than_the_model(small):
    assert load_tokenizer(small, 4).vocab_size == 4
    assert load_tokenizer(small, 64).vocab_size == 4  # a padded embedding is fine
    assert load_tokenizer(small).vocab_size == 4
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(small, 3)
    assert str(caught.value) == (
        f"cannot load tokenizer: {small / 'tokenizer.json'}: 'world' has id 3, expected"
        " ids below 3 (vocab_size in config.json). Use the tokenizer that the model "
        "was trained with."
    )


def test_a_special_token_that_reaches_the_models_vocabulary(small):
    edit(small / "tokenizer_config.json", pad_token="[PAD]")
    assert load_tokenizer(small, 5).id_of("[PAD]") == 4
    with pytest.raises(CheckpointError, match=r"'\[PAD\]' has id 4, expected ids belo"):
        load_tokenizer(small, 4)


def test_a_post_processor_that_reaches_beyond_the_vocabulary(small):
    content = json.loads((small / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [77]
    (small / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="None has id 77, expected ids below 64"):
        load_tokenizer(small, 64)


def test_tokens_that_only_the_settings_declare(small):
    edit(
        small / "tokenizer_config.json",
        eos_token={"__type": "AddedToken", "content": "<|end|>", "lstrip": False},
        additional_special_tokens=["<|user|>"],
        added_tokens_decoder={
            "5": {"content": "<|tool|>", "special": False, "rstrip": True},
            "4": {"content": "<|end|>", "special": True},
        },
        tokenizer_class="PreTrainedTokenizerFast",
    )
    ours = load_tokenizer(small, 64)
    theirs = transformers_tokenizer(small)
    assert ours.eos_id == 4
    assert ours.bos_id == 1
    text = "hello<|end|><|user|><|tool|> world"
    assert ours.encode(text) == theirs.encode(text) == [1, 2, 4, 6, 5, 3]
    assert ours.decode([2, 4, 5, 6]) == "hello <|tool|>"


def test_special_tokens_of_older_checkpoints(small):
    (small / "tokenizer_config.json").write_text("{}")
    (small / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    tokenizer = load_tokenizer(small, 4)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


def test_bos_and_eos_that_only_the_config_names(small):
    (small / "tokenizer_config.json").unlink()
    config = {"bos_token_id": 1, "eos_token_id": [3, 2]}
    (small / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(small, 4)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 3)
    (small / "config.json").write_text('{"bos_token_id": 9, "eos_token_id": null}')
    tokenizer = load_tokenizer(small, 4)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"bos_token": 3},
        {"eos_token": {"id": 3}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"9": {"special": True}}},
        {"additional_special_tokens": [None]},
        {"extra_special_tokens": 5},
    ],
)
def test_malformed_settings_are_named(small, fields):
    edit(small / "tokenizer_config.json", **fields)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(small, 64)
    assert str(caught.value).startswith(
        f"cannot load tokenizer: {small / 'tokenizer_config.json'}: "
    )


def test_settings_that_are_not_json(small):
    (small / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: line 1"):
        load_tokenizer(small, 4)
    assert not issubclass(CheckpointError, ConfigError)


def test_truncation_and_padding_of_the_file_are_off(small):
    backend = Backend.from_file(str(small / "tokenizer.json"))
    backend.enable_truncation(1)
    backend.enable_padding(length=7)
    backend.save(str(small / "tokenizer.json"))
    assert load_tokenizer(small, 4).encode("hello") == [1, 2]


def test_text_that_is_not_unicode(small):
    with pytest.raises(UserError) as caught:
        load_tokenizer(small, 4).encode("a\ud800")
    assert str(caught.value) == (
        r"cannot encode text: 'a\ud800': is not Unicode text, expected a string without"
        " lone surrogates. Correct the text."
    )


def test_fingerprints_tell_vocabularies_apart(data_dir, tmp_path):
    stories = load_tokenizer(data_dir / "models" / "stories260K", 512)
    again = load_tokenizer(data_dir / "models" / "stories260K")
    assert stories.fingerprint() == again.fingerprint()
    assert len(stories.fingerprint()) == 64
    one, two = (Tokenizer(word_level(w)) for w in (["a", "b"], ["b", "a"]))
    assert len({t.fingerprint() for t in (stories, one, two)}) == 3


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer"])
def test_saved_files_are_read_back_by_transformers(data_dir, tmp_path, tokenizer_class):
    directory = data_dir / "models" / "stories260K"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(directory / name, tmp_path / name)
    fields = {"chat_template": "{{ messages[0]['content'] }}!"}
    if tokenizer_class is not None:
        fields["tokenizer_class"] = tokenizer_class
    edit(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": "x"}, **fields)
    tokenizer = load_tokenizer(tmp_path, 512)
    saved = tmp_path / "saved"
    saved.mkdir()
    shutil.copyfile(directory / "config.json", saved / "config.json")
    tokenizer.save(saved)
    again = load_tokenizer(saved, 512)
    theirs = transformers_tokenizer(saved)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    assert theirs.special_tokens_map == tokenizer.special_tokens == again.special_tokens
    assert again.fingerprint() == tokenizer.fingerprint()
    chat = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(chat) == "Hi!"
    assert theirs.apply_chat_template(chat, tokenize=False) == "Hi!"
    assert "auto_map" not in (saved / "tokenizer_config.json").read_text()


def test_saving_where_nothing_can_be_written(small, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot save tokenizer: .*No such file"):
        load_tokenizer(small, 4).save(tmp_path / "absent")

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxllm.checkpoints import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def stories(data_dir):
    return load_tokenizer(data_dir / "models" / "stories260K", 512)


@pytest.fixture(scope="module")
def babyllama(data_dir):
    return load_tokenizer(data_dir / "models" / "babyllama105", 105)


@pytest.fixture(scope="module")
def byte_level():
    """Every byte a token, and two bytes of a character in one."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    letters += [letters[200] + letters[150], "Ġ" + letters[100]]
    backend = Backend(models.BPE({t: i for i, t in enumerate(letters)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["<|tool|>"])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def blank():
    """A token without text, and a decoder that takes the first space away."""
    words = ["~", "\u2581", "\u2581a", "b", "<0xC3>", "<0xA9>"]
    backend = Backend(models.BPE({w: i for i, w in enumerate(words)}, []))
    steps = [decoders.Replace("~", ""), decoders.Replace("\u2581", " ")]
    steps += [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def word_piece():
    words = ["[UNK]", "un", "##related", ".", "don", "'", "t", "a"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}))
    backend.decoder = decoders.WordPiece(cleanup=True)
    return Tokenizer(backend)


def assert_adds_up(tokenizer, blocks, skip=True):
    stream = tokenizer.stream(skip_special_tokens=skip)
    parts = [stream.step(block) for block in blocks]
    whole = "".join(parts) + stream.finish()
    ids = [i for block in blocks for i in block]
    assert whole == tokenizer.decode(ids, skip_special_tokens=skip)
    assert stream.finish() == ""
    return parts


def blocks_of(size):
    return st.lists(st.lists(st.integers(0, size - 1), max_size=6), max_size=12)


@hypothesis.settings(max_examples=400)
@hypothesis.given(blocks=blocks_of(520), skip=st.booleans())
def test_byte_fallback_adds_up(stories, blocks, skip):
    assert_adds_up(stories, blocks, skip)


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    blocks=st.lists(
        st.lists(
            # Bytes of multi-byte characters, spaces and special tokens, mostly.
            st.sampled_from([1, 2, 0, 198, 130, 175, 229, 230, 3, 36, 261, 410, 432])
            | st.integers(3, 258),
            max_size=4,
        ),
        max_size=10,
    ),
    skip=st.booleans(),
)
def test_runs_of_bytes_add_up(stories, blocks, skip):
    assert_adds_up(stories, blocks, skip)


@hypothesis.settings(max_examples=200)
@hypothesis.given(blocks=blocks_of(105), skip=st.booleans())
def test_a_character_vocabulary_adds_up(babyllama, blocks, skip):
    assert_adds_up(babyllama, blocks, skip)


@hypothesis.settings(max_examples=400)
@hypothesis.given(blocks=blocks_of(261), skip=st.booleans())
def test_byte_level_adds_up(byte_level, blocks, skip):
    assert byte_level.vocab_size == 260
    assert_adds_up(byte_level, blocks, skip)


def test_only_special_tokens_are_left_out(byte_level):
    end, tool = byte_level.id_of("<|end|>"), byte_level.id_of("<|tool|>")
    assert assert_adds_up(byte_level, [[tool, end]]) == ["<|tool|>"]
    parts = assert_adds_up(byte_level, [[end], [tool]], skip=False)
    assert parts == ["<|end|>", "<|tool|>"]


@hypothesis.settings(max_examples=400)
@hypothesis.given(blocks=blocks_of(6))
def test_tokens_without_text_add_up(blank, blocks):
    assert_adds_up(blank, blocks)


@hypothesis.settings(max_examples=100)
@hypothesis.given(blocks=blocks_of(8))
def test_word_pieces_add_up(word_piece, blocks):
    assert_adds_up(word_piece, blocks)


@hypothesis.settings(max_examples=200)
@hypothesis.given(text=st.text(max_size=30))
def test_real_text_adds_up_one_id_at_a_time(stories, text):
    assert_adds_up(stories, [[i] for i in stories.encode(text)])


def test_text_comes_as_soon_as_it_is_certain(stories):
    ids = stories.encode("Once upon a time", add_special_tokens=False)
    parts = assert_adds_up(stories, [[i] for i in ids])
    assert parts == ["Once", " upon", " a", " time"]
    stream = stories.stream()
    assert stream.step([1]) == ""
    assert stream.step(ids[:2]) == "Once upon"
    assert stream.step([]) == ""
    assert stream.step(ids[2:]) == " a time"


def test_half_a_character_is_held_back(stories):
    ids = stories.encode("ž!", add_special_tokens=False)
    strings = [stories.token_string(i) for i in ids]
    assert strings == ["\u2581", "<0xC5>", "<0xBE>", "!"]
    assert assert_adds_up(stories, [[i] for i in ids]) == ["", "", "", "ž!"]
    stream = stories.stream()
    assert stream.step(ids[:-1]) == ""
    assert stream.finish() == "ž"


def test_a_long_text_is_not_decoded_over_and_over(stories, monkeypatch):
    stream = stories.stream()
    longest = 0
    decode = stream._decode

    def counting(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(stream, "_decode", counting)
    for token in stories.encode("Once upon a time there was a dog. " * 50):
        stream.step([token])
    assert longest < 6

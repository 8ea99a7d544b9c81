"""Stop strings, however tokens split them."""

from hypothesis import given
from hypothesis import strategies as st

from jaxllm.decoding.stopping import StopText


class Letters:
    """A tokenizer whose ids are code points, and whose stream holds nothing back."""

    def stream(self):
        class Stream:
            def step(self, ids):
                return "".join(map(chr, ids))

            def finish(self):
                return ""

        return Stream()


def test_text_ends_where_the_stop_string_begins() -> None:
    reader = StopText(Letters(), ["END"])
    shown = [reader.step([ord(c)]) for c in "one E two ENDless"]
    assert "".join(shown) + reader.finish() == "one E two "
    assert reader.stopped
    assert reader.tokens == len("one E two END")


def test_what_might_begin_a_stop_string_is_withheld() -> None:
    reader = StopText(Letters(), ["abc"])
    assert reader.step(map(ord, "xxab")) == "xx"
    assert reader.step(map(ord, "d")) == "abd"
    assert reader.step(map(ord, "ab")) == ""
    assert reader.finish() == "ab"
    assert not reader.stopped


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_equals_a_search_of_the_whole_text(text, stop, size) -> None:
    reader = StopText(Letters(), stop)
    ids = list(map(ord, text))
    shown = "".join(reader.step(ids[i : i + size]) for i in range(0, len(ids), size))
    shown += reader.finish()
    # The stop string that is complete first wins; of those, the earliest beginning.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert shown == text
        assert not reader.stopped
        return
    first = min(ends)
    begins = [text[:first].find(s) for s in stop if s in text[:first]]
    assert shown == text[: min(begins)]
    assert reader.stopped
    assert reader.tokens == first

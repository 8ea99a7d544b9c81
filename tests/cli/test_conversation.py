"""`jaxllm generate --chat` at a terminal, and a stream that is interrupted."""

import contextlib
import signal
import subprocess

import pytest

from jaxllm import api
from jaxllm.cli import conversation
from tests.cli.conftest import CONFIG, write_checkpoint

FLAGS = ("--chat", "--max_new_tokens", 4)


@pytest.fixture
def answers(checkpoint):
    """What the model says to a text that a template wrote."""
    lm = api.load(str(checkpoint), dtype="float32")
    return lambda text: api.generate(lm, [text], max_new_tokens=4)[0].text


def test_a_conversation_has_a_history(generate, answers):
    first = answers("[user]Hi[assistant]")
    second = answers(f"[user]Hi[assistant]{first}[user]Why[assistant]")
    found = generate(*FLAGS, stdin=b"Hi\n\n  \nWhy\n", terminal=True)
    assert (found.code, found.err) == (0, "")
    assert found.out == f"> {first}\n> > > {second}\n> \n"


def test_a_turn_that_does_not_fit_is_forgotten(generate, answers):
    stdin = b"x" * 90 + b"\nHi\n"
    found = generate(*FLAGS, stdin=stdin, terminal=True)
    assert found.code == 0
    assert found.out == f"> > {answers('[user]Hi[assistant]')}\n> \n"
    assert found.err.startswith("jaxllm generate: cannot generate: the prompt has 107 ")


def test_an_interrupt_ends_the_answer_only(generate, answers, monkeypatch):
    first = answers("[user]Hi[assistant]")
    second = answers(f"[user]Hi[assistant]{first[:1]}[user]Why[assistant]")
    real, calls = api.stream, []

    def stream(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            yield first[:1]
            raise KeyboardInterrupt
        return (yield from real(*arguments, **options))

    monkeypatch.setattr(conversation.api, "stream", stream)
    found = generate(*FLAGS, stdin=b"Hi\nWhy\n", terminal=True)
    assert (found.code, found.err) == (0, "")
    assert found.out == f"> {first[:1]}\n> {second}\n> \n"


def test_an_interrupt_at_the_prompt_ends_the_conversation(generate, monkeypatch):
    def pressed(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    found = generate(*FLAGS, terminal=True)
    assert (found.code, found.out, found.err) == (130, "", "")


def test_a_conversation_is_counted(generate):
    found = generate(*FLAGS, "--stats", stdin=b"Hi\nWhy\n", terminal=True)
    assert '"rows": 2' in found.err


def test_a_conversation_needs_a_template(generate, tmp_path):
    directory = write_checkpoint(tmp_path / "plain", template=None)
    found = generate(*FLAGS, terminal=True, model=directory)
    assert (found.code, found.out) == (2, "")
    assert "has no 'chat_template'" in found.err
    assert found.err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--output=x.jsonl", "--num_samples=2"])
def test_a_conversation_goes_to_the_terminal(flag, generate):
    found = generate(*FLAGS, flag, terminal=True)
    name = flag.split("=")[0]
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"jaxllm generate: cannot generate: {name}: in a conversation, expected none. "
        "Leave it out.\n"
    )


def interrupt(process):
    """Presses Ctrl-C, again where nobody heard it; returns what was printed.

    Python loses an interrupt that comes while it runs a destructor.
    """
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=20)
    raise AssertionError("interrupted three times, and still running")


def test_an_interrupted_stream_keeps_its_text(child, tmp_path):
    config = CONFIG | {"max_position_embeddings": 40_000}
    model = write_checkpoint(tmp_path / "long", config)
    flags = ("--prompt=hello", "--stream", "--max_new_tokens=30000")
    process = child(*flags, model=model)
    begun = process.stdout.read(1)
    out, err = interrupt(process)
    assert process.returncode == 130
    assert err == b""
    assert begun and out.endswith(b"\n") and out.count(b"\n") == 1
    assert len(out) < 30_000

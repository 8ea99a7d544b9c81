"""The console script: commands, flags, exit codes."""

import io
import os
import pathlib
import re
import resource
import subprocess
import sys
import types

import pytest

from jaxllm.cli import main as main_module
from jaxllm.cli.main import COMMANDS, main
from jaxllm.version import __version__

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS_OF_GENERATE = (
    "model adapter prompt prompts decode max_new_tokens temperature top_p top_k min_p "
    "repetition_penalty presence_penalty verify constraint stop chat num_samples "
    "shared_prefix kv_dtype seed dtype mesh coordinator num_processes "
    "process_id initialization_timeout output stream stats truncate"
).split()


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "jaxllm: cannot start: no command is given, expected one of generate, "
            "compare, train, analyze, systems, doctor. Run jaxllm --help.",
        ),
        (
            ["genrate"],
            "jaxllm: cannot start: 'genrate' is no command, expected one of generate, "
            "compare, train, analyze, systems, doctor. Did you mean generate?",
        ),
        (
            ["--prompt", "x"],
            "jaxllm: cannot start: '--prompt' is no command, expected one of generate, "
            "compare, train, analyze, systems, doctor. Run jaxllm --help.",
        ),
        (
            ["generate", "--promt=x"],
            "jaxllm generate: cannot read flags: --promt: no such flag, expected one "
            "that --help lists. Did you mean --prompt?",
        ),
        (
            ["generate", "--xyzzy"],
            "jaxllm generate: cannot read flags: --xyzzy: no such flag, expected one "
            "that --help lists. Run with --help.",
        ),
        (
            ["generate", "--prompt"],
            "jaxllm generate: cannot read flags: --prompt: has no value, expected one. "
            "Write --prompt=VALUE.",
        ),
        (
            ["generate", "--prompt=a", "--prompt=b"],
            "jaxllm generate: cannot read flags: --prompt: is given twice (a, then b), "
            "expected once. Leave one out.",
        ),
        (
            ["generate", "Once upon", "--stream"],
            "jaxllm generate: cannot read flags: 'Once upon': is no flag, expected "
            "--name=value. Put a value with spaces in quotes.",
        ),
        (
            ["generate", "--temperature=-1", "--prompt=x"],
            "jaxllm generate: cannot read flags: --temperature: '-1', expected a "
            "number, 0 or more. Correct it.",
        ),
        (
            ["generate", "--temperature=nan", "--prompt=x"],
            "jaxllm generate: cannot read flags: --temperature: 'nan', expected a "
            "number, 0 or more. Correct it.",
        ),
        (
            ["generate", "--temperature=inf", "--prompt=x"],
            "jaxllm generate: cannot read flags: --temperature: 'inf', expected a "
            "number, 0 or more. Correct it.",
        ),
        (
            ["generate", "--top_p=0", "--prompt=x"],
            "jaxllm generate: cannot read flags: --top_p: '0', expected a number, "
            "from 1e-06 to 1. Correct it.",
        ),
        (
            ["generate", "--top_p=1.5", "--prompt=x"],
            "jaxllm generate: cannot read flags: --top_p: '1.5', expected a number, "
            "from 1e-06 to 1. Correct it.",
        ),
        (
            ["generate", "--max_new_tokens=-1", "--prompt=x"],
            "jaxllm generate: cannot read flags: --max_new_tokens: '-1', expected an "
            "integer, 0 or more. Correct it.",
        ),
        (
            ["generate", "--max_new_tokens=1.5", "--prompt=x"],
            "jaxllm generate: cannot read flags: --max_new_tokens: '1.5', expected an "
            "integer, 0 or more. Correct it.",
        ),
        (
            ["generate", "--seed=4294967296", "--prompt=x"],
            "jaxllm generate: cannot read flags: --seed: '4294967296', expected an "
            "integer, from 0 to 4294967295. Correct it.",
        ),
        (
            ["generate", "--stream=perhaps"],
            "jaxllm generate: cannot read flags: --stream: 'perhaps', expected true "
            "or false. Write --stream alone.",
        ),
        (
            ["generate", "--truncate=right", "--prompt=x"],
            "jaxllm generate: cannot read flags: --truncate: 'right', expected one of "
            "left. Correct it.",
        ),
        (
            ["systems", "--jsn"],
            "jaxllm systems: cannot read flags: --jsn: no such flag, expected one "
            "that --help lists. Did you mean --json?",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == message + "\n"
    assert captured.out == ""
    assert re.match(r"jaxllm( \w+)?: [a-z].+: .+, expected .+\. .+[.?]$", message) or (
        "cannot start" in message
    )


def test_mistakes_on_the_command_line_are_found_without_jax():
    code = (
        "import sys\n"
        "from jaxllm.cli.main import main\n"
        "for a in (['generate'], ['generate', '--promt=x'], ['generate', '--help'],\n"
        "          ['generate', '--prompts=/no/such/file'], ['doctor', '--help'],\n"
        "          ['--help'], ['nothing'], ['generate', '--top_p=7']): main(a)\n"
        "print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "False False"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxllm {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S+ .*\S", captured.out, re.MULTILINE)
    assert captured.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: jaxllm {name} [--FLAG=VALUE ...]\n")
    for flag in ("profile_dir", "traceback", "help"):
        assert f"  --{flag}" in text
    assert max(map(len, text.splitlines())) <= 88


def test_help_of_generate_lists_its_flags_in_order(capsys):
    assert main(["generate", "-h"]) == 0
    found = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert found == [*FLAGS_OF_GENERATE, "profile_dir", "traceback", "help"]


def test_help_comes_within_a_second():
    # Of processor time, which other work on the machine does not lengthen.
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begun = spent()
    assert python("-m", "jaxllm.cli.main", "generate", "--help").returncode == 0
    assert spent() - begun < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_to_run(name):
    child = python("-m", f"jaxllm.cli.{name}", "--help")
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(f"usage: jaxllm {name} ")
    assert child.stderr == ""


@pytest.fixture
def command(monkeypatch):
    """Replaces a command by one that does what the test wants."""

    def replace(run):
        module = types.ModuleType("jaxllm.cli.fake")
        module.SUMMARY, module.FLAGS, module.run = "fake", (), run
        monkeypatch.setitem(sys.modules, "jaxllm.cli.fake", module)
        monkeypatch.setitem(main_module.COMMANDS, "fake", "jaxllm.cli.fake")

    return replace


def raising(error):
    def run(values):
        raise error

    return run


def test_the_exit_code_is_the_commands(command):
    command(lambda values: 7)
    assert main(["fake"]) == 7


def test_a_users_mistake_is_one_line(command, capsys):
    from jaxllm.core.errors import CheckpointError

    command(raising(CheckpointError("cannot load: x:\n is  bad, expected good.")))
    assert main(["fake"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "jaxllm fake: cannot load: x: is bad, expected good.\n"
    assert captured.out == ""


def test_traceback_shows_where_a_mistake_came_from(command, capsys):
    from jaxllm.core.errors import UserError

    command(raising(UserError("cannot do it: x: bad, expected good.")))
    assert main(["fake", "--traceback"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "jaxllm fake: cannot do it: x: bad, expected good."


def test_a_bug_keeps_its_traceback(command):
    command(raising(ValueError("not the user's")))
    with pytest.raises(ValueError, match="not the user's"):
        main(["fake"])


def test_a_bug_ends_a_process_with_1():
    code = (
        "import sys\n"
        "from jaxllm.cli import generate, main\n"
        "generate.run = lambda values: 1 / 0\n"
        "sys.exit(main.main(['generate', '--prompt=x']))"
    )
    child = python("-c", code)
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_an_interrupt_ends_quietly(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main(["fake"]) == 130
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "utf-16"])
def test_output_is_utf_8_in_any_language(encoding, command, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    command(lambda values: print("é") or 0)
    assert main(["fake"]) == 0
    assert written.getvalue() == "é\n".encode()


def test_memory_that_ran_out_is_one_line(command, capsys):
    command(raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory: 12 GB")))
    assert main(["fake"]) == 2
    assert capsys.readouterr().err == (
        "jaxllm fake: out of memory: RESOURCE_EXHAUSTED: Out of memory: 12 GB, "
        "expected less. Shorten the prompts, lower --max_new_tokens, or split the "
        "model with --mesh.\n"
    )


def test_a_reader_that_has_gone_is_no_error():
    command = (
        f"{sys.executable} -m jaxllm.cli.main --help | true; echo ${{PIPESTATUS[0]}}"
    )
    child = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert child.stdout.strip() in ("0", "141")
    assert child.stderr == ""


def test_profile_dir_gets_a_trace(jaxllm, tmp_path):
    assert jaxllm("systems", "--profile_dir", tmp_path / "trace").code == 0
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_profile_dir_has_to_be_a_folder(jaxllm, tmp_path):
    (tmp_path / "file").touch()
    found = jaxllm("systems", "--profile_dir", tmp_path / "file" / "x")
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"jaxllm systems: cannot profile: {tmp_path}/file/x: Not a directory, expected "
        "a folder to write to. Correct --profile_dir.\n"
    )

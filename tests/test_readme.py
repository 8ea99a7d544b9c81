"""Every command and example of README.md is run, and SYSTEMS.md names real files.

The two install lines are run by `.ci/run`, in a fresh environment; here it is only
checked that it runs the lines that stand in the README.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = ("run", "test")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of a marker before it."""

    language: str
    text: str
    marker: str
    line: int


def blocks(markdown):
    """The fenced blocks of a markdown text, in order."""
    found, before, inside = [], "", None
    for number, line in enumerate(markdown.splitlines(), start=1):
        if inside is None and line.startswith("```"):
            inside, language, start = [], line[3:].strip(), number
        elif inside is not None and line.startswith("```"):
            found.append(Block(language, "\n".join(inside), before, start))
            inside, before = None, ""
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            before = line
    assert inside is None, f"the block of line {start} has no end"
    return found


README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
INSTALLS = {
    command: block
    for command in COMMANDS
    for block in README
    if block.marker == f"<!-- command: {command} -->"
}
EXAMPLES = [block for block in README if block not in INSTALLS.values()]


def named_by_line(block):
    return f"{block.language}-line{block.line}"


def run(arguments, directory, **environment):
    child = subprocess.run(
        arguments,
        cwd=directory,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, f"{child.stdout[-2000:]}\n{child.stderr[-4000:]}"
    return child.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_ci_runs_the_line_that_the_readme_shows(command):
    text = INSTALLS[command].text
    assert "\n" not in text
    shown = run(["bash", str(ROOT / ".ci" / "run"), "--print", command], ROOT)
    assert shown == text + "\n"
    assert "pip install -c constraints.txt" in text
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f'bash -c "$(readme_command {command})"' in script


def test_every_block_is_one_that_this_file_runs():
    assert {block.language for block in README} <= {"sh", "python"}
    assert len(INSTALLS) == len(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in EXAMPLES if b.language == "python"], ids=named_by_line
)
def test_the_python_examples_run(block, tmp_path):
    assert run([sys.executable, "-c", block.text], tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in EXAMPLES if b.language == "sh"], ids=named_by_line
)
def test_the_shell_examples_run(block, tmp_path):
    # The command of this environment and this checkout, installed or not.
    command = tmp_path / "bin" / "jaxllm"
    command.parent.mkdir()
    python = shlex.quote(sys.executable)
    command.write_text(f'#!/bin/sh\nexec {python} -m jaxllm.cli.main "$@"\n')
    command.chmod(0o755)
    # The lines are run in a checkout.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    script = "set -euo pipefail\n" + block.text
    assert run(["bash", "-c", script], tmp_path, PATH=path).strip()


def test_systems_names_files_that_exist():
    text = (ROOT / "SYSTEMS.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+/[\w.-]+)`", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_systems_rows_are_whole():
    text = (ROOT / "SYSTEMS.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert {row.count("|") for row in rows} == {rows[0].count("|")}


def test_blocks_are_found_with_their_markers():
    text = "words\n<!-- m -->\n```sh\na\nb\n```\n\n```python\nc\n```\n"
    assert blocks(text) == [
        Block("sh", "a\nb", "<!-- m -->", 3),
        Block("python", "c", "", 8),
    ]

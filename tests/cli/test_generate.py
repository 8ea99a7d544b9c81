"""`jaxllm generate`, called in this process on a tiny random model."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import api
from jaxllm.drafting import METHODS, Autoregressive
from tests.cli.conftest import CONFIG, read_rows, write_checkpoint, write_rows

SHORT = ("--max_new_tokens", 8)
SAMPLED = ("--temperature", 1, "--seed", 3)


@pytest.fixture(scope="module")
def lm(checkpoint):
    return api.load(str(checkpoint), dtype="float32")


def assert_refused(found, message):
    assert found.code == 2
    assert found.err == f"jaxllm generate: {message}\n"
    assert found.out == ""


def test_the_text_of_a_prompt_is_printed(generate, lm):
    found = generate("--prompt", "Hello", *SHORT)
    [result] = api.generate(lm, ["Hello"], max_new_tokens=8)
    assert (found.code, found.out, found.err) == (0, result.text + "\n", "")


def test_options_reach_the_sampler(generate, lm):
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    flags = [f"--{name}={value}" for name, value in options.items()]
    [result] = api.generate(lm, ["Hello"], max_new_tokens=8, **options)
    assert generate("--prompt=Hello", *SHORT, *flags).out == result.text + "\n"
    assert generate("--prompt=Hello", *SHORT).out != result.text + "\n"


def test_penalties_reach_the_sampler(generate, lm, tmp_path):
    options = {"repetition_penalty": 1.5, "presence_penalty": 3.0}
    flags = [f"--{name}={value}" for name, value in options.items()]
    [free] = api.generate(lm, ["Hello"], max_new_tokens=8)
    [result] = api.generate(lm, ["Hello"], max_new_tokens=8, **options)
    assert result.text != free.text
    assert generate("--prompt=Hello", *SHORT, *flags).out == result.text + "\n"
    rows = [{"prompt": "Hello"}, {"prompt": "Hello"} | options]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = sorted(generate("--prompts", path, *SHORT).rows, key=lambda r: r["id"])
    assert [row["text"] for row in found] == [free.text, result.text]


def test_the_verifier_is_the_one_named(generate, lm):
    options = {"temperature": 1.0, "seed": 4}
    matched, rejected = (
        api.generate(lm, ["Hello"], max_new_tokens=8, verify=verify, **options)[0].text
        for verify in ("match", "reject")
    )
    assert matched != rejected
    flags = ("--prompt=Hello", *SHORT, "--temperature=1", "--seed=4")
    assert generate(*flags).out == matched + "\n"
    assert generate(*flags, "--verify=reject").out == rejected + "\n"


@dataclasses.dataclass(frozen=True)
class Bushy(Autoregressive):
    tree = True


def test_what_trees_cannot_have_is_refused_before_any_row(generate, monkeypatch):
    monkeypatch.setitem(METHODS, "bushy", Bushy)
    flags = ("--prompt=Hello", "--num_samples=2", "--decode=bushy")
    assert_refused(
        generate(*flags, "--verify=reject"),
        "cannot verify: Bushy drafts trees, expected a chain: a rejected child changes "
        "what its siblings are tested against. Leave --verify=match, which is exact "
        "for trees.",
    )
    assert_refused(
        generate(*flags, "--presence_penalty=1"),
        "cannot penalize: Bushy drafts trees, expected a chain: every node would need "
        "the counts of its own path. Choose a drafter of chains, or leave the "
        "penalties out.",
    )


def test_a_constraint_holds_for_every_row(generate, tmp_path):
    pattern = "[a-z]{2,5}[.!]"
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hello"}, {"prompt": "ab"}])
    for flags in ((), ("--temperature=2", "--num_samples=2")):
        found = generate(
            "--prompts", path, *SHORT, f"--constraint=regex:{pattern}", *flags
        )
        assert found.code == 0
        for row in found.rows:
            assert re.fullmatch(pattern, row["text"])
            assert row["finish_reason"] == "eos"
    for flags in ((), ("--stream",)):
        found = generate(
            "--prompt=ab", *SHORT, "--constraint", f"regex:{pattern}", *flags
        )
        assert re.fullmatch(pattern, found.out.removesuffix("\n"))


def test_a_stream_adds_up_to_the_text(generate, monkeypatch):
    whole = generate("--prompt=Hello", *SHORT, *SAMPLED).out
    writes = []
    real = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda s: (writes.append(s), real(s)))
    found = generate("--prompt=Hello", "--max_new_tokens=40", *SAMPLED, "--stream")
    assert found.out.startswith(whole[:-1])
    assert (found.code, found.err) == (0, "")


def test_a_stop_string_ends_the_text(generate):
    text = generate("--prompt=Hello", *SHORT, *SAMPLED).out
    stop = text[3:5]
    for flags in ((), ("--stream",)):
        found = generate(
            "--prompt=Hello", *SHORT, *SAMPLED, "--stop=\x00", "--stop", stop, *flags
        )
        assert found.out.rstrip("\n") == text[: text.index(stop)]


def test_no_new_tokens_is_no_text(generate):
    found = generate("--prompt=Hello", "--max_new_tokens=0")
    assert (found.code, found.out, found.err) == (0, "\n", "")


def test_an_empty_prompt_starts_a_text(generate):
    assert generate("--prompt=", *SHORT).code == 0


def test_totals_are_json_on_stderr(generate, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hello"}, {"prompt": "Hi"}])
    streamed = generate("--prompt=Hello", *SHORT, "--stats", "--stream")
    whole = generate("--prompt=Hello", *SHORT, "--stats")
    both = generate("--prompts", rows, *SHORT, "--stats")
    for found, count, prompt in ((streamed, 1, 5), (whole, 1, 5), (both, 2, 7)):
        totals = json.loads(found.err.splitlines()[-1])
        assert totals["rows"] == count and totals["failed"] == 0
        assert totals["prompt_tokens"] == prompt
        assert totals["new_tokens"] == totals["emitted"] == 8 * count
        assert totals["target_passes"] == 8 * count
        assert totals["tokens_per_pass"] == 1.0
        assert totals["drafted"] == 0 and totals["acceptance_by_depth"] == []
        assert totals["seconds"] > totals["compile_seconds"] >= 0
        assert totals["tokens_per_second"] > 0
    assert len(whole.err.splitlines()) == 1


def test_chat_continues_a_conversation(generate, lm):
    prompt = "[user]Hello[assistant]"
    [result] = api.generate(lm, [prompt], max_new_tokens=8)
    assert generate("--prompt=Hello", "--chat", *SHORT).out == result.text + "\n"


def test_samples_are_rows(generate, lm):
    found = generate("--prompt=Hello", *SHORT, *SAMPLED, "--num_samples=3")
    assert [(row["id"], row["sample"]) for row in found.rows] == [
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert len({row["text"] for row in found.rows}) == 3
    [first] = api.generate(lm, ["Hello"], max_new_tokens=8, temperature=1, seed=3)
    assert found.rows[0]["token_ids"] == first.token_ids


def test_a_file_stands_before_every_prompt_and_is_run_once(generate, lm, tmp_path):
    system = "Once there was a dog, and a cat, and a bird, and a fish, and a fox. "
    prefix = tmp_path / "system.txt"
    prefix.write_text(system)
    said = ("Hi", "No", "At", "Me")
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": p} for p in said])
    flags = (f"--prompts={path}", *SHORT)
    found = generate(*flags, f"--shared_prefix={prefix}")
    expected = api.generate(lm, [system + p for p in said], max_new_tokens=8)
    assert [x.stats["shared_tokens"] for x in expected] == [len(system)] * 4
    assert [r["token_ids"] for r in found.rows] == [x.token_ids for x in expected]
    assert [r["prompt_tokens"] for r in found.rows] == [len(system) + 2] * 4
    off = generate(*flags, "--shared_prefix=off")
    assert [row["prompt_tokens"] for row in off.rows] == [2] * 4


def test_rows_of_a_file_are_printed(generate, lm, tmp_path):
    prompts = ["Hello", "Once", "Tom"]
    rows = [{"id": "a", "prompt": prompts[0]}, {"prompt": prompts[1]}]
    rows.append({"prompt": prompts[2], "temperature": 0, "seed": 1})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = generate("--prompts", path, *SHORT, *SAMPLED)
    assert found.code == 0
    expected = api.generate(
        lm, prompts, max_new_tokens=8, temperature=[1, 1, 0], seed=[3, 4, 1]
    )
    assert [row["id"] for row in found.rows] == ["a", 2, 3]
    for row, result, prompt in zip(found.rows, expected, prompts, strict=True):
        assert list(row) == [
            "id",
            "text",
            "token_ids",
            "finish_reason",
            "prompt_tokens",
            "new_tokens",
            "target_passes",
            "seconds",
        ]
        assert row["text"] == result.text
        assert row["token_ids"] == result.token_ids
        assert row["finish_reason"] == result.finish_reason
        assert row["prompt_tokens"] == len(prompt)
        assert row["new_tokens"] == row["target_passes"] == len(result.token_ids)
        assert row["seconds"] > 0
    size = sum(array.nbytes for array in jax.tree.leaves(lm.params)) / 1e6
    assert found.err == (
        f"jaxllm generate: parameters {size:.4g} MB, rows 3, batches 1, shapes to "
        "compile 1, target passes at most 8\n"
    )


def test_rows_of_standard_input(generate):
    stdin = b'{"prompt": "Hello"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n'
    found = generate("--prompts=-", *SHORT, stdin=stdin)
    assert found.code == 0
    assert [row["id"] for row in found.rows] == [1, 2]
    assert found.rows[1]["prompt_tokens"] == len("[user]Hi[assistant]")
    assert found.rows[0]["text"] == generate("--prompt=Hello", *SHORT).out[:-1]


def test_a_row_stops_where_it_says(generate, tmp_path):
    rows = [{"prompt": "Hello", "max_new_tokens": n} for n in (8, 3)]
    rows.append({"prompt": "Hello", "stop": "\x00"})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = generate("--prompts", path, *SHORT)
    lengths = {row["id"]: row["new_tokens"] for row in found.rows}
    assert lengths == {1: 8, 2: 3, 3: 8}


def test_bad_rows_do_not_stop_the_others(generate, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": "a", "prompt": "Hello"}\r\n'
        b'{"id": "a", "prompt": "Hello"}\r\n'
        b'{"id": "b", "prompt": "\xff"}\r\n'
        b'{"id": "c"}\r\n'
        b"\r\n"
        b'{"id": "d", "prompt": "' + b"x" * 90 + b'"}\r\n'
        b'{"id": "e", "prompt": "Hello"}'
    )
    found = generate("--prompts", path, *SHORT)
    assert found.code == 0
    rows = {(row["id"], row.get("line")): row for row in found.rows}
    good = {("a", None), ("e", None)}
    assert set(rows) == good | {("a", 2), (3, 3), ("c", 4), ("d", 6)}
    for key in set(rows) - good:
        row = rows[key]
        assert row["finish_reason"] == "error"
        assert row["error"].startswith(f"line {row['line']}: ")
        assert (row["text"], row["token_ids"]) == ("", [])
    assert found.err.splitlines()[1:] == [
        "jaxllm generate: 4 rows failed; their 'error' says why"
    ]


def test_a_job_of_which_every_row_fails(generate, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "a"}, {"id": 1.5}])
    found = generate("--prompts", path, *SHORT)
    assert found.code == 2
    assert [row["id"] for row in found.rows] == ["a", 2]
    assert found.err == (
        "jaxllm generate: cannot generate: all rows failed (2), expected one that "
        "succeeds. The first: line 1: cannot read row: what to continue: none is "
        "given, expected one of prompt, messages, token_ids. Give one of them.\n"
    )


def test_values_that_are_not_finite_fail_their_rows(generate, tmp_path):
    untied = CONFIG | {"tie_word_embeddings": False}
    directory = write_checkpoint(tmp_path / "broken", untied)
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.copy()
    embedding[3 + ord("D") - 32] = np.nan  # so that prompts with a D go wrong
    save_file(tensors, directory / "model.safetensors")
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ot"}, {"prompt": "Dot"}])
    found = generate("--prompts", path, "--max_new_tokens=1", model=directory)
    assert found.code == 0
    good, bad = sorted(found.rows, key=lambda row: row["id"])
    assert good["finish_reason"] == "length"
    assert bad["finish_reason"] == "error"
    assert bad["error"] == (
        "line 2: cannot decode: logits of row 0 at position 3 are not finite: the "
        "embedding gives the first such value, expected finite numbers. Check the "
        "weights, or compute in float32 with --dtype=float32."
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [],
            "cannot generate: --prompt: no prompt is given, expected --prompt TEXT or "
            "--prompts FILE. Give one, or --chat in a terminal.",
        ),
        (
            ["--chat"],
            "cannot generate: --prompt: no prompt is given, expected --prompt TEXT or "
            "--prompts FILE. Give one, or --chat in a terminal.",
        ),
        (
            ["--prompt=a", "--prompts=b"],
            "cannot generate: --prompt and --prompts: both are given, expected one. "
            "Leave one out.",
        ),
        (
            ["--prompts=/no/such/file.jsonl"],
            "cannot read prompts: /no/such/file.jsonl: No such file or directory, "
            "expected a JSONL file. Correct --prompts.",
        ),
        (
            ["--prompts=-", "--stream"],
            "cannot generate: --stream: with --prompts, expected --prompt alone. Drop "
            "one.",
        ),
        (
            ["--prompt=a", "--output=b", "--stream"],
            "cannot generate: --stream: with --output, expected --prompt alone. Drop "
            "one.",
        ),
        (
            ["--prompt=a", "--num_samples=2", "--stream"],
            "cannot generate: --stream: with --num_samples, expected one sample. Drop "
            "one.",
        ),
        (
            ["--prompt=a", "--stop="],
            "cannot generate: --stop: is empty, expected some text. Leave it out.",
        ),
        (
            ["--prompt=a", "--decode=jacoby"],
            f"unknown method: 'jacoby', expected one of {', '.join(sorted(METHODS))}. "
            "Did you mean 'jacobi'?",
        ),
        (
            ["--prompt=a", "--constraint=regex:a("],
            "cannot constrain: pattern 'a(': missing ), unterminated subpattern at "
            "position 1, expected a regular expression that is matched whole. Correct "
            "the pattern.",
        ),
        (
            ["--prompt=a", "--constraint=yes"],
            "unknown constraint: 'yes', expected one of json:..., lark:..., "
            "regex:.... Choose one of these.",
        ),
        (
            ["--prompt=a", "--decode=autoregressive:query_width=x"],
            "bad value: autoregressive.query_width: 'x', expected int. Write a value "
            "of that type.",
        ),
        (
            ["--prompt=a", "--shared_prefix=on"],
            "cannot read a prefix: on: No such file or directory, expected auto, off "
            "or a text file. Correct --shared_prefix.",
        ),
        (
            ["--prompt=a", "--kv_dtype=float8"],
            "cannot set dtype: 'float8' is unknown, expected one of float32, f32, "
            "bfloat16, bf16, float16, f16. Choose one of these.",
        ),
        (
            ["--prompt=a", "--mesh=tensor=2"],
            "cannot make mesh: {'tensor': 2} needs 2 devices, expected at most 1, "
            "which is what there is. Choose smaller sizes.",
        ),
        (
            ["--prompt=" + "a" * 90, *SHORT],
            "cannot generate: the prompt has 90 tokens, expected at most 88 (the "
            "model's 96 positions less 8 new ones). Shorten it, lower "
            "--max_new_tokens or pass --truncate=left.",
        ),
    ],
)
def test_a_mistake_is_one_line(flags, message, generate):
    assert_refused(generate(*flags), message)


def test_a_model_that_is_not_there(jaxllm):
    found = jaxllm("generate", "--model=dmeo", "--prompt=a")
    assert found.code == 2 and found.out == ""
    assert found.err.startswith(
        "jaxllm generate: cannot find model: 'dmeo': no such directory or shipped model"
    )
    assert found.err.count("\n") == 1


def test_a_pickle_is_refused_unread(generate, tmp_path):
    directory = write_checkpoint(tmp_path / "pickled")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    found = generate("--prompt=a", model=directory)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("jaxllm generate: refusing to load 'pytorch_model.bin'")
    assert found.err.count("\n") == 1


def test_truncation_runs_what_is_left(generate):
    cut = generate("--prompt=" + "b" * 30 + "a" * 88, *SHORT, "--truncate=left")
    assert cut.out == generate("--prompt=" + "a" * 88, *SHORT).out


def test_an_empty_file_is_a_mistake(generate, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    assert_refused(
        generate("--prompts", path),
        f"cannot read prompts: {path}: holds no rows, expected at least one. Write one "
        "JSON object a line.",
    )


def test_the_output_is_not_the_input(generate, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    before = path.read_bytes()
    assert_refused(
        generate("--prompts", path, "--output", path),
        "cannot generate: --output: is the file of --prompts, expected another. Choose "
        "another.",
    )
    assert path.read_bytes() == before


def test_an_output_has_its_flags_beside_it(generate, tmp_path):
    path = tmp_path / "out.jsonl"
    found = generate("--prompt=Hello", *SHORT, "--stop=x", "--output", path)
    assert (found.code, found.out) == (0, "")
    [row] = read_rows(path)
    assert row["id"] == 1 and row["new_tokens"] == 8
    beside = json.loads((tmp_path / "out.jsonl.config.json").read_text())
    assert beside["command"] == "generate"
    assert beside["flags"]["prompt"] == "Hello"
    assert beside["flags"]["stop"] == ["x"]
    assert beside["flags"]["max_new_tokens"] == 8
    assert beside["flags"]["verify"] == "match"
    assert beside["flags"]["constraint"] is None
    assert {"jaxllm", "jax", "jaxlib", "flax"} <= set(beside["versions"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl",
        "out.jsonl.config.json",
    ]


def test_a_model_without_a_tokenizer_gives_ids(generate, tmp_path):
    directory = write_checkpoint(tmp_path / "bare")
    (directory / "tokenizer.json").unlink()
    path = write_rows(tmp_path / "rows.jsonl", [{"token_ids": [5, 6]}])
    found = generate("--prompts", path, *SHORT, model=directory)
    assert found.rows[0]["text"] == "" and len(found.rows[0]["token_ids"]) == 8


def test_a_bar_is_shown_on_terminals_only(generate, monkeypatch, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hello"}, {"prompt": "Hi"}])
    assert "tokens/s" not in generate("--prompts", path, *SHORT).err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = generate("--prompts", path, *SHORT).err
    cost, *drawn = shown.splitlines()
    assert cost.startswith("jaxllm generate: parameters ")
    assert "2/2" in drawn[-1] and "tokens/s" in drawn[-1]

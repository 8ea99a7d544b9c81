"""A tiny random checkpoint, and the command line called in this process."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models

from jaxllm.cli.main import main

POSITIONS = 96
_CHARACTERS = [chr(code) for code in range(32, 127)]
_SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = len(_SPECIAL) + len(_CHARACTERS)
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _tensors(random, layers, width, hidden, vocabulary):
    def draw(*shape):
        return random.normal(0, 0.5, shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (16, width)),
            ("self_attn.k_proj", (8, width)),
            ("self_attn.v_proj", (8, width)),
            ("self_attn.o_proj", (width, 16)),
            ("mlp.gate_proj", (hidden, width)),
            ("mlp.up_proj", (hidden, width)),
            ("mlp.down_proj", (width, hidden)),
        ):
            tensors[f"{prefix}{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(width, np.float32)
    tensors["model.norm.weight"] = np.ones(width, np.float32)
    return tensors


def write_checkpoint(directory, config=CONFIG, template=TEMPLATE):
    """Writes a model of random weights that reads and writes single characters."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    tensors = _tensors(random, *(config[name] for name in sizes))
    save_file(tensors, directory / "model.safetensors")
    vocabulary = {token: i for i, token in enumerate(_SPECIAL + _CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home folder, so that compiled programs of tests stay out of the user's."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


class Finished:
    """What a command left behind."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def rows(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def jaxllm(capsys, monkeypatch, home):
    """A function that runs the command line in this process."""
    monkeypatch.setenv("HOME", str(home))

    def run(*arguments, stdin=b"", terminal=False):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture
def generate(jaxllm, checkpoint):
    """`jaxllm generate` with the tiny model, in float32."""

    def run(*arguments, model=checkpoint, **keywords):
        flags = ("--model", model, "--dtype", "float32")
        return jaxllm("generate", *flags, *arguments, **keywords)

    return run


@pytest.fixture
def child(home, checkpoint):
    """A function that starts `jaxllm generate` as a process of its own."""

    def start(*arguments, home=home, model=checkpoint, **keywords):
        command = [sys.executable, "-m", "jaxllm.cli.main", "generate"]
        command += ["--model", str(model), "--dtype", "float32"]
        root = pathlib.Path(__file__).resolve().parents[2]
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            env=os.environ | {"HOME": str(home), "JAX_PLATFORMS": "cpu"},
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **keywords,
        )

    return start


def write_rows(path, rows):
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path, timeless=True):
    """Reads an output; without its times, which no two runs share."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if timeless:
        for row in rows:
            row.pop("seconds")
    return rows

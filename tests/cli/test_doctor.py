"""`jaxllm doctor`: what it says, and that its self-tests can fail."""

import dataclasses

import pytest

from jaxllm.cli import self_tests
from jaxllm.cli.self_tests import SELF_TESTS
from tests.cli.conftest import CONFIG, write_checkpoint


@pytest.fixture
def without_tests(monkeypatch):
    for name in list(SELF_TESTS):
        monkeypatch.delitem(SELF_TESTS, name)
    return monkeypatch


def test_a_sound_machine(jaxllm):
    found = jaxllm("doctor")
    assert (found.code, found.err) == (0, "")
    titles = [line for line in found.out.splitlines() if not line.startswith(" ")]
    assert titles == [
        "versions",
        "devices",
        "compile cache",
        "environment",
        "kernels",
        "self-tests",
    ]
    for name in SELF_TESTS:
        assert f"  ok      {name}\n" in found.out
    assert "\n  decode_attention reference: there is no cpu kernel\n" in found.out
    for word in ("\n  jax 0.", "\n  flax 0.", "\n  cpu:0 ", "\n  python 3."):
        assert word in found.out


def test_a_self_test_that_fails_is_shown(jaxllm, without_tests):
    def broken():
        raise ArithmeticError("results\ndiffer")

    without_tests.setitem(SELF_TESTS, "bad", broken)
    without_tests.setitem(SELF_TESTS, "good", lambda: None)
    found = jaxllm("doctor")
    assert (found.code, found.err) == (1, "")
    assert (
        "  FAILED  bad: ArithmeticError: results differ\n  ok      good\n" in found.out
    )


def test_a_model_is_described(jaxllm, without_tests, tmp_path):
    model = write_checkpoint(tmp_path / "two", CONFIG | {"num_hidden_layers": 2})
    found = jaxllm("doctor", "--model", model, "--dtype", "float32")
    assert (found.code, found.err) == (0, "")
    for line in (
        "  vocabulary: 98\n",
        "  num_layers: 2\n",
        "  dtype of params: float32\n",
        "  end tokens: (2,)\n",
        "  tokenizer: 98 ids, with a chat template\n",
        "  embedder/table: float32[98, 16], 6272 bytes\n",
        "  stacks/0..1, each\n",
        "    attention/query/kernel: float32[1, 16, 16], 1024 bytes\n",
    ):
        assert line in found.out, line
    lines = found.out[found.out.index("\nparameters\n") :].splitlines()
    sizes = [int(line.split()[-2]) for line in lines if line.endswith(" bytes")]
    # Those of the two equal stacks are indented further, and count twice.
    inner = [line for line in lines if line.startswith("    ")]
    total = sum(sizes) + sum(int(line.split()[-2]) for line in inner)
    assert lines[-1] == f"  {total} bytes in all"


def test_a_model_that_is_not_there(jaxllm, without_tests):
    found = jaxllm("doctor", "--model=/no/such/model")
    assert found.code == 2
    assert found.err.startswith("jaxllm doctor: cannot find model: '/no/such/model'")


def test_a_machine_without_devices(jaxllm, without_tests):
    def devices():
        raise RuntimeError("Unable to\ninitialize")

    without_tests.setattr("jax.devices", devices)
    found = jaxllm("doctor")
    assert found.code == 0
    assert "devices\n  none: Unable to initialize\n" in found.out


def test_wrong_generation_is_noticed(monkeypatch):
    real = self_tests.decode

    def wrong(*arguments, **options):
        first, *others = real(*arguments, **options)
        ids = first.token_ids
        changed = dataclasses.replace(first, token_ids=[*ids[:-1], (ids[-1] + 1) % 97])
        return [changed, *others]

    monkeypatch.setattr(self_tests, "decode", wrong)
    with pytest.raises(ArithmeticError, match="not the likeliest"):
        self_tests.generation()


@pytest.mark.parametrize("method", ["dequantize", "einsum"])
def test_wrong_weights_are_noticed(method, monkeypatch):
    from jaxllm.quantization import IntTensor

    real = getattr(IntTensor, method)
    monkeypatch.setattr(
        IntTensor, method, lambda self, *arguments: 1.05 * real(self, *arguments)
    )
    with pytest.raises(ArithmeticError, match="results differ by"):
        self_tests.int8_weights()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: dataclasses.replace(c, length_B=c.length_B + 1), "lengths are"),
        (lambda c: dataclasses.replace(c, k=(c.k[0] + 1,)), "keys of row 0"),
        (lambda c: dataclasses.replace(c, v=c.k), "values of row 0"),
        (
            lambda c: dataclasses.replace(c, k=(c.k[0].at[:, 1, :, 1].set(1.0),)),
            "row 1 holds keys that it did not accept",
        ),
    ],
)
def test_a_wrong_cache_is_noticed(change, reason, monkeypatch):
    from jaxllm.attention import DenseCache

    real = DenseCache.append
    monkeypatch.setattr(
        DenseCache,
        "append",
        lambda self, *arguments, **options: change(real(self, *arguments, **options)),
    )
    with pytest.raises(ArithmeticError, match=reason):
        self_tests.cache()

"""Predicted bytes against the compiler's, and plans that fit their budget."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxllm.attention import RopeConfig
from jaxllm.core import DTypePolicy
from jaxllm.core.errors import CapacityError, ConfigError
from jaxllm.decoding import Request, decode, make_sampler
from jaxllm.decoding.buckets import shapes_for
from jaxllm.decoding.memory import (
    Choice,
    Program,
    Workload,
    footprint,
    generation_bytes,
    plan_memory,
)
from jaxllm.decoding.payoff import DEFAULT_COSTS, expected_tokens
from jaxllm.drafting import Autoregressive, Jacobi, Lookahead
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig, make_model
from tests.decoding.test_engine import prompts_of, request_of, run
from tests.decoding.toys import toy_model

COSTS = DEFAULT_COSTS["cpu"]


def shapes_of(vocabulary, width, layers, heads, mlp, policy=None):
    """Returns a model as shapes; a quarter of its heads have keys of their own."""
    config = DecoderConfig(
        vocabulary=vocabulary,
        width=width,
        num_layers=layers,
        max_positions=2048,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=2, head_dim=32),
        mlp=MlpConfig(hidden=mlp),
        ropes=(RopeConfig(rotary_dim=32),),
        tied_head=True,
    )
    return make_model(config, policy=policy or DTypePolicy.of("float32"))


NARROW = dataclasses.replace(DTypePolicy.of("bfloat16"), cache=jnp.dtype(jnp.float32))
TREE = Lookahead(window=2, ngram=3, pool=2, slots=16)
WARM = {"temperature": 1.0}
PENALTY = {"repetition_penalty": 1.1}
SETTINGS = {
    # Where most bytes are: the cache, logits, noise, a sort, scores, the mlp, copies.
    "plain": ((512, 64, 2, 4, 128), Autoregressive(), 4, 512, {}),
    "logits": ((8192, 64, 2, 4, 128), Jacobi(window=16), 2, 128, {}),
    "noise": ((8192, 64, 2, 4, 128), Jacobi(window=16), 2, 128, WARM),
    "sort": ((8192, 64, 2, 4, 128), Jacobi(window=8), 2, 128, WARM | {"top_p": 0.9}),
    "penalty": ((8192, 64, 2, 4, 128), Jacobi(window=8), 2, 128, PENALTY),
    "scores": ((512, 64, 2, 16, 128), Autoregressive(query_width=32), 2, 512, {}),
    "mlp": ((512, 64, 2, 4, 4096), Jacobi(window=16), 4, 128, {}),
    "tree": ((8192, 64, 2, 4, 128), TREE, 4, 128, {}),
    "copies": ((8192, 64, 2, 4, 128), Jacobi(window=16), 2, 128, {"policy": NARROW}),
}


def program_of(name):
    shape, drafter, rows, capacity, options = SETTINGS[name]
    options = dict(options)
    model, target = shapes_of(*shape, policy=options.pop("policy", None))
    return Program(
        model=model,
        target=target,
        drafter=drafter,
        rows=rows,
        capacity=capacity,
        sampler=make_sampler(rows, **options) if options else None,
    )


@pytest.fixture(scope="module")
def compiled():
    """The compiler's bytes of every setting, under its own flags, not the tests'."""
    code = (
        "import json\n"
        "from jaxllm.decoding.memory import compiled_bytes\n"
        "from tests.decoding.test_memory import SETTINGS, program_of\n"
        "print(json.dumps({n: compiled_bytes(program_of(n)) for n in SETTINGS}))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_bytes_are_those_of_the_compiled_program(name, compiled) -> None:
    parts, real = footprint(program_of(name)), compiled[name]
    assert sum(parts.values()) == pytest.approx(real, rel=0.05)
    weights = parts["weights"] + parts["draft_weights"]
    assert generation_bytes(parts) == sum(parts.values()) - weights
    # Weights are easy; what is left is the prediction's own.
    assert generation_bytes(parts) == pytest.approx(real - weights, rel=0.1)


def test_the_parts_are_counted_where_they_stand() -> None:
    model, params = toy_model()
    program = Program(
        model=model, target=params, drafter=Jacobi(window=4), rows=4, capacity=128
    )
    parts, state = footprint(program), program.state()
    assert parts["weights"] == sum(x.nbytes for x in jax.tree.leaves(params))
    # Two layers, keys and values, 2 heads of 8 numbers, and a length for each row.
    assert parts["cache"] == 2 * 2 * 4 * 2 * 128 * 8 * 4 + 4 * 4
    # Three guesses and two numbers.
    assert parts["draft_state"] == 4 * 5 * 4
    assert parts["tokens"] > 4 * 128 * (4 + 4)
    assert state.committed.tokens_BS.shape == (4, 128)
    # Shapes do as well as arrays.
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert footprint(dataclasses.replace(program, target=abstract)) == parts


def chains(*windows, acceptance=0.7):
    return [
        Choice(drafter=Jacobi(window=w), tokens=expected_tokens(acceptance, w - 1))
        for w in windows
    ]


def workload_of(new=200, lengths=(5, 9)):
    model, params = toy_model()
    return Workload(
        model=model, target=params, prompt_lengths=lengths, max_new_tokens=new
    )


def test_a_smaller_budget_gives_a_narrower_draft_and_at_last_an_error() -> None:
    workload, choices = workload_of(), chains(1, 2, 4, 8, 16)
    rich = plan_memory(workload, choices, 10**9, costs=COSTS)
    assert rich.choice.drafter.window == 8
    assert rich.speedup == pytest.approx(expected_tokens(0.7, 7) / 1.71)
    widths, previous, budget = [], rich, rich.peak_bytes
    while True:
        try:
            plan = plan_memory(workload, choices, budget, costs=COSTS)
        except CapacityError as error:
            least = int(str(error).split("at least ")[1].split(".")[0])
            break
        assert plan.peak_bytes <= budget
        assert plan.speedup <= previous.speedup
        widths.append(plan.choice.drafter.window)
        previous, budget = plan, plan.peak_bytes - 1
    assert widths[0] == 8 and widths[-1] == 1
    assert sorted(set(widths), reverse=True) == [8, 4, 2, 1]
    # What the message asks for is enough, and no more than enough.
    assert least == previous.peak_bytes
    assert plan_memory(workload, choices, least, costs=COSTS).peak_bytes == least


def test_slots_grow_where_the_budget_allows_the_copy() -> None:
    # Wide heads: an array of keys takes more than a step.
    model, target = shapes_of(512, 64, 2, 4, 128)
    workload = dataclasses.replace(workload_of(), model=model, target=target)
    [choice] = chains(1)
    plan = plan_memory(workload, [choice], 10**9, costs=COSTS)
    whole = shapes_for([5, 9], 200, 0).capacity
    assert plan.rungs == (64, 128, whole)
    flat = plan_memory(workload, [choice], 10**9, costs=COSTS, ladder=False)
    assert flat.rungs == (whole,)
    assert flat.first_bytes == flat.peak_bytes > plan.first_bytes
    # While it grows, one array stands beside its copy.
    program = Program(
        model=workload.model, target=workload.target, drafter=choice.drafter, rows=2
    )
    states = [
        dataclasses.replace(program, capacity=capacity).state()
        for capacity in plan.rungs[-2:]
    ]
    sizes = [
        [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)] for state in states
    ]
    growing = plan.weight_bytes + sum(sizes[1]) + max(sizes[0])
    assert plan.peak_bytes == growing > flat.peak_bytes
    tight = plan_memory(workload, [choice], growing - 1, costs=COSTS)
    assert tight.rungs == (whole,)


@pytest.mark.slow
def test_a_plan_runs_and_changes_no_token() -> None:
    model, params = toy_model()
    prompts, new = prompts_of(5, 9), 150
    workload = workload_of(new)
    plan = plan_memory(workload, chains(1, 2, 4, 8, 16), 10**9, costs=COSTS)
    assert len(plan.rungs) > 1
    plain = request_of(prompts, new)
    request = Request(**{**vars(plain), "rungs": plan.rungs})
    outputs = decode(
        model,
        {"target": params, "drafter": {}},
        request,
        drafter=plan.choice.drafter,
    )
    width = Autoregressive(query_width=plan.choice.drafter.nodes)
    for a, b in zip(outputs, run(plain, width), strict=True):
        assert a.token_ids == b.token_ids


def test_without_choices_there_is_no_plan() -> None:
    with pytest.raises(ConfigError, match="there are no choices"):
        plan_memory(workload_of(), [], 10**9, costs=COSTS)

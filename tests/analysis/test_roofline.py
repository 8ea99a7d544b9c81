"""The roofline against the compiler's counts, the trees' bytes and itself."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from jaxllm.analysis import (
    HARDWARE,
    Hardware,
    Slice,
    Workload,
    analyze,
    breakeven_T,
    find_config,
    make_target,
    parse_slice,
    payoff_roofline,
    sweep,
    verify_costs,
)
from jaxllm.analysis.operators import abstract_mesh, count
from jaxllm.attention import RopeConfig
from jaxllm.core import DTypePolicy, ShardingRules
from jaxllm.core.errors import ConfigError, ShardingError
from jaxllm.decoding.payoff import plan
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import Context, DecoderConfig, make_model

V5E = parse_slice("v5e")
NOT_PRODUCTS = ("norms", "activation", "embedding", "optimizer")


def config(kv_heads=4, gated=True, tied=False, window=None, **others):
    return DecoderConfig(
        vocabulary=2048,
        width=1024,
        num_layers=2,
        max_positions=4096,
        attention=AttentionConfig(
            num_heads=8, num_kv_heads=kv_heads, head_dim=128, qkv_bias=not gated
        ),
        mlp=MlpConfig(hidden=3072, gated=gated),
        ropes=(RopeConfig(rotary_dim=128),),
        tied_head=tied,
        layer_window=() if window is None else (2**30, window),
        **others,
    )


@functools.cache
def llama_8b():
    return make_target(find_config("llama3-8b"), name="llama3-8b")


def operators(target, workload, mesh="tensor=1", devices=1):
    found = count(target, workload, abstract_mesh(mesh, devices))
    return {operator.name: operator for operator in found}


def compiled_flops(decoder, rows, tokens, cached, gradient=False):
    """What XLA counts for one forward of an unrolled model."""
    model, params = make_model(decoder, stacks=(1,) * decoder.num_layers)

    def forward(params, tokens_BT, cache):
        start = cached * jnp.ones((rows, 1), jnp.int32)
        positions_BT = start + jnp.arange(tokens)
        context = Context(positions_BT, cache=cache, rope_length=1)
        return model(params, tokens_BT, context).logits_BTV

    def step(params, tokens_BT, cache):
        return jax.grad(lambda p: (forward(p, tokens_BT, cache) ** 2).sum())(params)

    cache = None
    if cached:
        cache = jax.eval_shape(lambda p: model.init_cache(p, rows, cached), params)
    tokens_BT = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    lowered = jax.jit(step if gradient else forward).lower(params, tokens_BT, cache)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("decoder", "rows", "tokens", "cached"),
    [
        (config(), 4, 1, 512),
        (config(gated=False, tied=True), 2, 8, 256),
        (config(kv_heads=8), 1, 256, 0),
        (config(kv_heads=1, tied=True), 3, 64, 0),
    ],
    ids=["decode", "verify", "prefill", "multi-query"],
)
def test_flops_are_those_the_compiler_counts(decoder, rows, tokens, cached):
    workload = Workload(
        phase="verify" if cached else "prefill",
        rows=rows,
        context=tokens + cached,
        nodes=tokens if cached else 1,
        masked_too=True,
        all_logits=True,
    )
    found = operators(make_target(decoder, dtype="float32"), workload)
    products = sum(o.flops for o in found.values() if o.name not in NOT_PRODUCTS)
    whole = compiled_flops(decoder, rows, tokens, cached)
    # The compiler's count has norms and softmax in it, which are small here.
    assert 0.98 * whole < products < whole


def test_flops_of_a_training_step_are_those_the_compiler_counts():
    decoder = config()
    workload = Workload(phase="train", rows=2, context=128, masked_too=True)
    found = operators(make_target(decoder, dtype="float32"), workload)
    products = sum(o.flops for o in found.values() if o.name not in NOT_PRODUCTS)
    whole = compiled_flops(decoder, 2, 128, 0, gradient=True)
    assert products == pytest.approx(whole, rel=0.02)


def test_a_target_is_the_model_that_is_built_layer_by_layer():
    decoder = config(gated=False, window=9)
    target = make_target(decoder)
    model, params = make_model(
        decoder, policy=DTypePolicy(), rules=ShardingRules(), stacks=(2,)
    )
    assert target.model == model and hash(target.model) == hash(model)
    assert target.params == params


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_are_those_of_the_tree(tied, quantize):
    target = make_target(config(tied=tied), quantize=quantize)
    arrays = jax.tree.leaves(target.params)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    report = analyze(target, Workload(rows=3, context=64), V5E)
    assert report.parameter_bytes == whole
    table = target.params["embedder"]["table"]
    row = 2 * 1024 if quantize is None else 1024 + 4
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(table)) == 2048 * row
    # Of the table only the rows of the three tokens are read, unless it is the head.
    read = whole - (0 if tied else 2048 * row) + 3 * row
    assert report.total("weight_bytes") == read


def test_what_has_no_weights_is_linear_in_the_batch():
    target = make_target(config())
    one, four = (operators(target, Workload(rows=b, context=300)) for b in (1, 4))
    for name in one:
        assert four[name].flops == 4 * one[name].flops
        assert four[name].activation_bytes == 4 * one[name].activation_bytes
        assert four[name].kv_read_bytes == 4 * one[name].kv_read_bytes
        if name != "embedding":
            assert four[name].weight_bytes == one[name].weight_bytes
    assert one["attention"].kv_read_bytes == 2 * 2 * 299 * 4 * 128 * 2


def test_a_prompt_of_one_token_is_a_decoding_step_without_a_cache():
    target = make_target(config())
    passes = [Workload(phase=p, rows=5, context=1) for p in ("decode", "prefill")]
    decode, prefill = (count(target, w, abstract_mesh(None, 1)) for w in passes)
    assert decode == prefill
    assert decode[5].name == "attention" and decode[5].kv_read_bytes == 0


def test_causal_attention_counts_half():
    target = make_target(config())
    half = operators(target, Workload(phase="prefill", context=1000))["attention"]
    whole = Workload(phase="prefill", context=1000, masked_too=True)
    assert half.flops * 2 * 1000 == operators(target, whole)["attention"].flops * 1001


def test_a_prompt_needs_the_logits_of_its_last_token_only():
    target = make_target(config())
    workloads = [
        Workload(phase="prefill", rows=3, context=50, all_logits=every)
        for every in (False, True)
    ]
    last, every = (operators(target, w)["head"] for w in workloads)
    assert last.flops == 2 * 3 * 1024 * 2048
    assert every.flops == 50 * last.flops


@pytest.mark.parametrize("phase", ["decode", "prefill", "verify"])
@pytest.mark.parametrize("window", [1, 5, 40, 1000])
def test_pairs_of_a_window_are_counted_one_by_one(window, phase):
    target = make_target(config(window=window))
    workload = Workload(phase=phase, rows=1, context=48, nodes=7)
    found = operators(target, workload)["attention"]
    pairs = sum(
        position - key < limit
        for limit in (2**30, window)
        for position in range(workload.cached, 48)
        for key in range(position + 1)
    )
    assert found.flops == 4 * pairs * 8 * 128
    # The keys that the first new token sees, itself left out.
    read = sum(min(workload.cached, limit - 1) for limit in (2**30, window))
    assert found.kv_read_bytes == read * 2 * 4 * 128 * 2


def test_time_grows_with_bits_and_halves_with_them_where_memory_binds():
    # Wide, so that scales are nothing beside weights.
    found = dataclasses.replace(config(), width=4096)
    workload = Workload(rows=1, context=2)
    float32, bfloat16, int8 = (
        analyze(make_target(found, dtype=dtype, quantize=method), workload, V5E)
        for dtype, method in (
            ("float32", None),
            ("bfloat16", None),
            ("bfloat16", "int8"),
        )
    )
    assert float32.seconds > bfloat16.seconds > int8.seconds
    assert bfloat16.bound == "memory"
    assert bfloat16.seconds / int8.seconds == pytest.approx(2, rel=0.01)


def test_kv_bytes_shrink_with_the_heads_that_share_them():
    workload = Workload(rows=2, context=777)
    full, few = (
        operators(make_target(config(kv_heads=k)), workload)["attention"]
        for k in (8, 2)
    )
    assert full.kv_read_bytes == 4 * few.kv_read_bytes
    assert full.kv_written_bytes == 4 * few.kv_written_bytes
    assert full.flops == few.flops


def test_a_shared_prefix_is_read_once_a_batch():
    target = llama_8b()
    own, shared = (
        analyze(target, Workload(rows=64, context=16640, shared_prefix=p), V5E)
        for p in (0, 16384)
    )
    ratio = own.total("kv_read_bytes") / shared.total("kv_read_bytes")
    assert ratio == 64 * 16639 / (16384 + 64 * 255)
    assert 32 < ratio < 33
    assert own.cache_bytes / shared.cache_bytes == 64 * 16640 / (16384 + 64 * 256)
    assert own.total("flops") == shared.total("flops")


def test_tensor_parallelism_splits_the_work_and_pays_two_all_reduces_a_layer():
    target = llama_8b()
    workload = Workload(rows=16, context=8192)
    one, eight = (analyze(target, workload, parse_slice(s)) for s in ("v5e", "v5e:2x4"))
    assert eight.mesh == {"tensor": 8}
    assert eight.total("kv_read_bytes") == one.total("kv_read_bytes") / 8
    assert eight.cache_bytes == one.cache_bytes / 8
    sizes = {cost.operator.name: cost.operator for cost in eight.costs}
    for cost in one.costs:
        if cost.operator.name not in NOT_PRODUCTS:
            assert sizes[cost.operator.name].flops == cost.operator.flops / 8
    # A ring sends the result seven eighths twice.
    reduced = 16 * 4096 * 2 * 2 * 7 / 8
    assert sizes["output"].sent_bytes == sizes["down"].sent_bytes == 32 * reduced
    assert one.total("sent_bytes") == 0
    assert not one.fits and eight.fits


def test_data_parallelism_splits_rows_and_keeps_weights_whole():
    target, workload = make_target(config()), Workload(rows=8, context=100)
    one, four = (
        analyze(target, workload, parse_slice(s), m)
        for s, m in (("v5e", None), ("v5e:2x2", "data=4"))
    )
    assert four.parameter_bytes == one.parameter_bytes
    assert four.cache_bytes == one.cache_bytes / 4
    assert four.total("flops") == one.total("flops") / 4


def test_sharded_weights_are_gathered():
    target, workload = make_target(config()), Workload(phase="train", rows=8, context=9)
    report = analyze(target, workload, parse_slice("v5e:2x2"), "fsdp=4")
    whole = analyze(target, workload, V5E)
    query = {c.operator.name: c.operator for c in report.costs}["query"]
    kernel = 2 * 1024 * 1024 * 2
    assert query.sent_bytes == 2 * 3 * kernel / 4
    assert query.weight_bytes == 3 * kernel
    assert report.parameter_bytes < 0.26 * whole.parameter_bytes


def test_the_peak_is_that_of_the_operands():
    hardware = Hardware(
        name="x",
        memory_bytes=1,
        bandwidth=1e30,
        peaks={"bfloat16": 1e12, "int8": 4e12},
        interconnect=0.0,
        source="",
        date="",
    )
    machine, workload = Slice(hardware, (1,)), Workload(phase="prefill", context=64)
    times = {}
    for method in ("int8", "int8:activations=8"):
        target = make_target(config(), quantize=method)
        costs = {c.operator.name: c for c in analyze(target, workload, machine).costs}
        times[method] = costs["up"].compute_seconds
        assert costs["attention"].operator.dtype == "bfloat16"
    assert times["int8"] == 4 * times["int8:activations=8"]


def test_break_even_is_the_ridge_shared_by_the_rows():
    v5e, h200 = HARDWARE["v5e"], HARDWARE["h200"]
    assert breakeven_T(v5e, 2) == pytest.approx(240, abs=1)
    assert breakeven_T(h200, 2) == pytest.approx(206, abs=1)
    assert breakeven_T(v5e, 1) == breakeven_T(v5e, 2) / 2
    assert breakeven_T(v5e, 2, rows=16) == breakeven_T(v5e, 2) / 16
    target = make_target(find_config("llama3-8b"), quantize="int8")
    line = payoff_roofline(target, V5E, rows=4)
    assert line.weight_bytes == pytest.approx(1, rel=0.01)
    assert line.ridge == pytest.approx(breakeven_T(v5e, 1), rel=0.01)


def test_a_wider_pass_is_free_up_to_break_even_and_then_costs_in_step():
    target = llama_8b()
    workload = Workload(rows=1, context=4096)
    costs = verify_costs(target, workload, V5E, (1, 8, 240, 480, 960))
    assert costs[1] == 1
    assert costs[8] < 1.02
    assert list(costs.values()) == sorted(costs.values())
    assert costs[960] / costs[480] == pytest.approx(2, rel=0.1)
    assert plan(0.8, costs=costs, lengths=(7, 239)).speculate


def test_sweep_keeps_the_order():
    reports = sweep(
        make_target(config()), [Workload(rows=b, context=64) for b in (1, 2, 4)], V5E
    )
    assert [r.workload.rows for r in reports] == [1, 2, 4]
    assert reports[0].seconds < reports[2].seconds < 4 * reports[0].seconds


def test_json_adds_up():
    machine = parse_slice("v5e:2x2")
    report = analyze(make_target(config()), Workload(rows=2, context=64), machine)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    for name in ("flops", "weight_bytes", "kv_read_bytes", "seconds"):
        total = sum(row[name] for row in found["operators"])
        assert found["total"][name] == pytest.approx(total)
    for row in found["operators"]:
        slowest = max(row["compute_seconds"], row["memory_seconds"])
        assert row["seconds"] == slowest + row["sent_seconds"]
        assert (row["sent_seconds"] > 0) == (row["sent_bytes"] > 0)
    assert found["total"]["sent_bytes"] > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"phase": "guess"}, "phase is 'guess', expected one of decode, prefill"),
        ({"rows": 0}, "rows is 0, expected 1 or more"),
        ({"phase": "verify", "nodes": 9, "context": 8}, "context is 8, expected 9"),
        ({"context": 8, "shared_prefix": 8}, "shared_prefix is 8, expected 0 to 7"),
    ],
)
def test_a_wrong_workload_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Workload(**wrong)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=4", "'tensor=4' fills 4 devices, expected 8"),
        ("tensor=3,data=-1", "fills 6 devices, expected 8"),
        ("data=1,tensor=8,fsdp=2", "fills 16 devices"),
    ],
)
def test_a_mesh_has_to_fill_the_hardware(mesh, message):
    with pytest.raises(ShardingError, match=message):
        analyze(make_target(config()), Workload(), parse_slice("v5e:2x4"), mesh)


def test_a_mesh_has_to_divide_the_model():
    with pytest.raises(ShardingError, match="'heads' has size 8, expected a multiple"):
        analyze(make_target(config()), Workload(), parse_slice("v5e:4x4"), "tensor=16")

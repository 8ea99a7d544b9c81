"""Trajectories on disk: what they are, that a kill changes nothing, what is drawn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.checkpoints.safetensors import read_safetensors, write_safetensors
from jaxllm.core.errors import CapacityError, CheckpointError, ConfigError, UserError
from jaxllm.drafting import Autoregressive
from jaxllm.training import trajectories
from jaxllm.training.objectives import Consistency, TrajectoryBatch
from jaxllm.training.trajectories import (
    TrajectoryConfig,
    TrajectoryDataset,
    longest_run,
    measure_trajectories,
    write_trajectories,
)
from tests.decoding.test_engine import request_of, run
from tests.drafting.toy_methods import toy_lm, toy_prompts

CONFIG = TrajectoryConfig(block=4, max_new=8, rows=2, seed=3)


def prompts_of_shapes() -> list[list[int]]:
    """Two shapes: three batches, the last of each not full."""
    return toy_prompts(3, 20, 5, 2)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Killed(Exception):
    """Stands for a signal in the middle of a run."""


def killed_after(count: int):
    def progress(done: int, total: int) -> None:
        if done == count:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    directory = tmp_path_factory.mktemp("collected")
    write_trajectories(toy_lm(), prompts_of_shapes(), directory, CONFIG)
    return directory


def test_a_killed_collection_ends_in_the_same_files(
    collected, tmp_path, monkeypatch
) -> None:
    lm, prompts = toy_lm(), prompts_of_shapes()
    with pytest.raises(Killed):
        write_trajectories(lm, prompts, tmp_path, CONFIG, killed_after(1))
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) == 1
    # A kill in the middle of a write leaves a part under another name.
    (tmp_path / f".{shards[0].name}.1234.tmp").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="has 1 files, expected 3"):
        TrajectoryDataset(tmp_path)
    calls = []
    collect = trajectories.collect_trajectories

    def counted(*args, **kwargs):
        calls.append(args)
        return collect(*args, **kwargs)

    monkeypatch.setattr(trajectories, "collect_trajectories", counted)
    write_trajectories(lm, prompts, tmp_path, CONFIG)
    assert len(calls) == 2, "only what was missing"
    assert contents(tmp_path) == contents(collected)
    write_trajectories(lm, prompts, tmp_path, CONFIG)
    assert len(calls) == 2


def test_they_end_in_plain_decoding(collected) -> None:
    prompts = prompts_of_shapes()
    outputs = run(request_of(prompts, 8), Autoregressive(query_width=CONFIG.block))
    seen = []
    for path in sorted(collected.glob("*.safetensors")):
        arrays = {name: x.read() for name, x in read_safetensors(path).items()}
        for at, row in enumerate(arrays["prompt_B"]):
            whole = [*prompts[row], *outputs[row].token_ids]
            assert arrays["tokens_BS"][at, : len(whole)].tolist() == whole
            fixed_CT = arrays["iterates_BCJT"][at, :, -1]
            assert fixed_CT.reshape(-1).tolist() == outputs[row].token_ids
            assert arrays["prompt_length_B"][at] == len(prompts[row])
            seen.append(int(row))
    assert sorted(seen) == [0, 1, 2, 3]


def test_something_else_is_not_mixed_in(collected, tmp_path) -> None:
    lm, prompts = toy_lm(), prompts_of_shapes()
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x + 1e-3, lm.params))
    for options, message in [
        ((other, prompts, collected, CONFIG), "made with params"),
        ((lm, prompts[:3], collected, CONFIG), "made with prompts"),
        (
            (lm, prompts, collected, dataclasses.replace(CONFIG, seed=4)),
            "made with seed 3, expected 4",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            write_trajectories(*options)
    with pytest.raises(CapacityError, match="prompt 0 has 2045 tokens"):
        write_trajectories(lm, [[1] * 2045], tmp_path, CONFIG)
    with pytest.raises(CapacityError, match="prompt 1 has 0 tokens"):
        write_trajectories(lm, [[1], []], tmp_path, CONFIG)
    with pytest.raises(CapacityError, match="prompt 1 has id 61"):
        write_trajectories(lm, [[1], [61]], tmp_path, CONFIG)
    assert not list(tmp_path.iterdir()), "refused before anything is written"
    with pytest.raises(ConfigError, match="block is 1, expected 2 or more"):
        TrajectoryConfig(block=1)
    with pytest.raises(ConfigError, match="no prompts"):
        write_trajectories(lm, [], tmp_path, CONFIG)


def leaves(item: TrajectoryBatch) -> list:
    return [np.asarray(x).tolist() for x in jax.tree.leaves(item)]


def block_of(item: TrajectoryBatch) -> tuple:
    """What tells an item's block from others, whatever iterate was drawn."""
    length = int(item.length_B)
    return (*item.prefix_BP[-length:].tolist(), *item.fixed_BT.tolist())


def test_items_are_blocks_in_an_order_that_numbers_determine(collected) -> None:
    data = TrajectoryDataset(collected, seed=1, epochs=3)
    blocks = len(data) // 3
    assert len(data) == 3 * blocks and blocks + data.left_out == 8
    shown = [[block_of(data[e * blocks + i]) for i in range(blocks)] for e in range(3)]
    assert sorted(shown[0]) == sorted(shown[1]) == sorted(shown[2])
    assert len(set(shown[0])) == blocks
    assert shown[0] != shown[1]
    again = TrajectoryDataset(collected, seed=1, epochs=3)
    backwards = [leaves(again[i]) for i in reversed(range(len(data)))]
    assert backwards[::-1] == [leaves(item) for item in data]
    other = TrajectoryDataset(collected, seed=2, epochs=3)
    assert [leaves(x) for x in other] != [leaves(x) for x in data]


def test_an_item_is_an_iterate_before_the_fixed_point(collected) -> None:
    data = TrajectoryDataset(collected, seed=1, epochs=40, augment=False)
    stored = {}
    for shard in data._shards:
        for row, block in np.argwhere(shard["valid_BC"]):
            start = int(shard["start_BC"][row, block])
            iterates = shard["iterates_BCJT"][row, block].tolist()
            name = (*shard["tokens_BS"][row, :start].tolist(), *iterates[-1])
            count = int(shard["iterations_BC"][row, block])
            stored[name] = (iterates, count, int(shard["prompt_length_B"][row]))
    drawn: dict[tuple, set] = {}
    for item in data:
        iterates, count, prompt = stored[block_of(item)]
        at = iterates.index(item.iterate_BT.tolist())
        assert at < count and item.next_BT.tolist() == iterates[at + 1]
        assert int(item.prompt_B) == prompt <= int(item.length_B)
        drawn.setdefault(block_of(item), set()).add(at)
    # In forty epochs every iterate of every block comes up.
    assert all(len(at) == stored[name][1] for name, at in drawn.items())
    batch = jax.tree.map(lambda *x: np.stack(x), *[data[i] for i in range(3)])
    weights = Consistency(eos=()).weights(batch)
    assert float(weights["ar"]) >= 3 * CONFIG.block


def made_up(directory, iterates_JT, **changes):
    """A collection of one block, whose prefix is the prompt 1 2 and the answer 3 4."""
    T = len(iterates_JT[0])
    rows = list(iterates_JT) + [iterates_JT[-1]] * (T + 1 - len(iterates_JT))
    arrays = {
        "tokens_BS": np.asarray([[1, 2, 3, 4, *rows[-1], 0]]),
        "length_B": np.asarray([4 + T]),
        "start_BC": np.asarray([[4]]),
        "iterates_BCJT": np.asarray([[rows]]),
        "iterations_BC": np.asarray([[len(iterates_JT) - 1]]),
        "prompt_B": np.asarray([0]),
        "prompt_length_B": np.asarray([2]),
        **changes,
    }
    arrays = {name: x.astype(np.int32) for name, x in arrays.items()}
    arrays["valid_BC"] = np.ones((1, 1), bool)
    path = directory / "trajectories-00000-of-00001.safetensors"
    write_safetensors(path, arrays)
    (directory / "origin.json").write_text('{"eos": [0]}')
    return directory


def test_half_of_the_later_mistakes_are_mended(tmp_path) -> None:
    right = [5, 6, 7, 8, 9, 10]
    first, last = [5, 40, 41, 42, 43, 44], [5, 6, 51, 52, 53, 54]
    data = TrajectoryDataset(made_up(tmp_path, [first, last, right]), epochs=60)
    mended = set()
    for item in data:
        iterate = item.iterate_BT.tolist()
        if iterate == last:
            continue  # The one before the fixed point stays as it is.
        assert iterate[:2] == first[:2], "the first mistake stays"
        wrong = [a for a, b in zip(iterate, right, strict=True) if a != b]
        assert set(wrong) <= set(first) and len(wrong) == 3
        mended.add(tuple(iterate))
    assert len(mended) == 6, "all pairs of four mistakes"
    assert any(item.iterate_BT.tolist() == last for item in data)


@pytest.mark.parametrize(
    ("fixed", "run", "is_kept"),
    [
        ([9, 9, 9, 5, 6, 7], 4, True),
        ([9, 9, 9, 9, 6, 7], 4, False),
        # The run began in the block before; the prompt's own tokens do not count.
        ([4, 4, 4, 5, 6, 7], 4, False),
        ([4, 4, 5, 5, 6, 7], 4, True),
        # Behind the end token, which is 0 here, nobody reads.
        ([5, 0, 9, 9, 9, 9], 4, True),
        ([0, 0, 0, 0, 0, 0], 4, True),
    ],
)
def test_texts_that_repeat_a_token_are_left_out(tmp_path, fixed, run, is_kept) -> None:
    collection = made_up(tmp_path, [[8] * 6, fixed])
    if is_kept:
        assert len(TrajectoryDataset(collection, max_run=run)) == 1
        return
    with pytest.raises(ConfigError, match="no block of 1 is left"):
        TrajectoryDataset(collection, max_run=run)


def test_a_prompt_may_repeat_a_token(tmp_path) -> None:
    tokens = np.asarray([[9, 9, 9, 9, 5, 6, 7, 0]])
    for prompt, is_kept in [(4, True), (1, False)]:
        collection = made_up(
            tmp_path,
            [[8, 8, 8], [9, 6, 7]],
            tokens_BS=tokens,
            prompt_length_B=np.asarray([prompt]),
        )
        if is_kept:
            assert len(TrajectoryDataset(collection, max_run=4)) == 1
        else:
            with pytest.raises(ConfigError, match="no block of 1 is left"):
                TrajectoryDataset(collection, max_run=4)


def test_what_teaches_nothing_or_is_too_long_is_left_out(tmp_path) -> None:
    right = [5, 6, 7]
    still = made_up(tmp_path, [right])
    with pytest.raises(ConfigError, match="no block"):
        TrajectoryDataset(still)
    moving = made_up(tmp_path, [[8, 8, 8], right])
    assert TrajectoryDataset(moving, max_prefix=4).prefix_slots == 4
    with pytest.raises(ConfigError, match="no block"):
        TrajectoryDataset(moving, max_prefix=3)
    with pytest.raises(ConfigError, match="epochs 0"):
        TrajectoryDataset(moving, epochs=0)


def test_far_positions_are_phased_in(tmp_path) -> None:
    collection = made_up(tmp_path, [[8, 8, 8, 8, 8], [5, 6, 7, 8, 9]])
    data = TrajectoryDataset(collection, epochs=12, phase_in=8)
    reach = [int(item.reach_B) for item in data]
    assert reach == [1, 1, 1, 1, 2, 2, 3, 3, 5, 5, 5, 5]
    assert {int(x.reach_B) for x in TrajectoryDataset(collection, epochs=3)} == {5}


@pytest.mark.parametrize(
    ("tokens", "run"), [([], 0), ([1], 1), ([1, 1, 2, 2, 2, 1], 3), ([4, 4, 4], 3)]
)
def test_runs_are_counted(tokens, run) -> None:
    assert longest_run(np.asarray(tokens)) == run


def test_training_draws_iterates_to_the_fixed_point(collected) -> None:
    lm = toy_lm()
    data = TrajectoryDataset(collected, epochs=200)
    objective, frozen = Consistency(positions=None, ar_weight=1.0).bind(lm)
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state, batch):
        weights = {n: jnp.maximum(w, 1.0) for n, w in objective.weights(batch).items()}

        def loss(params):
            key = jax.random.key(0)
            return objective.loss(lm.model, params, batch, weights, key, frozen)

        gradient, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, metrics

    params, state, seen = lm.params, optimizer.init(lm.params), []
    for first in range(0, 8 * 120, 8):
        items = [data[first + i] for i in range(8)]
        batch = jax.tree.map(lambda *x: np.stack(x), *items)
        params, state, metrics = step(params, state, batch)
        seen.append({name: float(x) for name, x in metrics.items()})

    def mean(name, steps):
        return np.mean([metrics[name] for metrics in steps])

    # The divergence itself may rise while the plain loss makes the teacher surer.
    assert mean("agreement", seen[:8]) < 0.3
    assert mean("agreement", seen[-8:]) > 0.8
    assert mean("ar", seen[-8:]) < 0.5 * mean("ar", seen[:8])


def test_progress_is_that_of_all_trajectories(collected) -> None:
    lm, data = toy_lm(), TrajectoryDataset(collected)
    found = data.progress()
    counts = np.concatenate([x["iterations_BC"].ravel() for x in data._shards])
    assert found["iterations"] == pytest.approx(counts.mean())
    assert found["left_out"] == data.left_out / 8
    assert 0 < found["fast_forward"] <= CONFIG.block
    now = measure_trajectories(lm, lm.params, toy_prompts(3, 5), CONFIG)
    assert set(now) == {"iterations", "fast_forward", "stationary", "repetitive"}
    assert 0 < now["iterations"] <= CONFIG.block
    assert functools.reduce(max, now.values()) <= CONFIG.block

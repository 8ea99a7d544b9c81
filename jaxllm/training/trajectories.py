"""Jacobi trajectories on disk: collected in shards, read as items to train on.

A directory holds `origin.json`, what the trajectories were made with, and a file of
`TrajectorySet` arrays for every batch of prompts. A batch is computed whole and its
file appears whole, so a collection that was killed goes on with the batches that are
missing and ends in the same files.

Letters: B rows, S slots, C blocks, J iterates (T + 1), T tokens of a block, P slots of
a prefix, I items.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.checkpoints import LanguageModel
from jaxllm.checkpoints.files import read_json_object
from jaxllm.checkpoints.safetensors import read_safetensors, write_safetensors
from jaxllm.core.errors import CapacityError, CheckpointError, ConfigError
from jaxllm.decoding.buckets import batch_bucket, batches_of, prompt_bucket
from jaxllm.decoding.decode import check_ids
from jaxllm.decoding.job import on_mesh
from jaxllm.drafting.trajectory import TrajectorySet, collect_trajectories
from jaxllm.training.objectives import TrajectoryBatch
from jaxllm.training.origin import digest_of_params, digest_of_prompts, keep_origin

__all__ = [
    "TrajectoryConfig",
    "TrajectoryDataset",
    "longest_run",
    "measure_trajectories",
    "write_trajectories",
]

Progress = Callable[[int, int], None]
"""Is told after every batch how many of how many batches are on the disk."""

# Streams of randomness: numpy takes a list of seeds and one with zeros behind for one.
_ORDER, _ITERATES = range(2)
_ORIGIN = "origin.json"
_SHARD = "trajectories-{:05d}-of-{:05d}.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """What trajectories are collected.

    Attributes:
      block: T, tokens of a block; the window that Jacobi decoding shall run with.
      max_new: New tokens of a prompt, rounded up to whole blocks.
      rows: Prompts of a batch, and of a file.
      seed: Of the first iterates.
    """

    block: int = 16
    max_new: int = 128
    rows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("block", 2), ("max_new", 1), ("rows", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(
                    f"cannot collect trajectories: {name} is {value}, expected {least} "
                    f"or more. Correct it."
                )


def write_trajectories(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    directory: str | Path,
    config: TrajectoryConfig,
    progress: Progress | None = None,
) -> None:
    """Collects the trajectories of prompts into a directory, or what is missing there.

    Prompts are batched by their padded length; a row ends behind the block that holds
    an end token of the model.

    Args:
      lm: The model whose trajectories these are, the one that will be trained.
      prompts: Ragged token ids, at least one each.
      directory: Made if it is not there.
      config: What to collect.
      progress: Called after every batch.

    Raises:
      UserError: A prompt is empty, too long or holds an id that the model lacks, or the
        directory was begun with another model, other prompts or another configuration.
    """
    directory = Path(directory)
    _check_prompts(lm, prompts, config)
    directory.mkdir(parents=True, exist_ok=True)
    origin = {
        **dataclasses.asdict(config),
        "model": lm.name,
        "params": digest_of_params(lm.params),
        "prompts": digest_of_prompts(prompts),
        "eos": list(lm.generation.eos_ids),
    }
    keep_origin(directory / _ORIGIN, origin)
    for left in directory.glob(".*.tmp"):
        left.unlink(missing_ok=True)  # What a kill left in the middle of a write.
    buckets = [prompt_bucket(len(prompt)) for prompt in prompts]
    batches = batches_of(buckets, config.rows)
    for index, batch in enumerate(batches):
        path = directory / _SHARD.format(index, len(batches))
        if not path.exists():
            _write_shard(lm, prompts, path, (index, batch), config)
        if progress is not None:
            progress(index + 1, len(batches))


def _check_prompts(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], config: TrajectoryConfig
) -> None:
    if not prompts:
        raise ConfigError(
            "cannot collect trajectories: there are no prompts, expected some. Give "
            "some."
        )
    new = -(-config.max_new // config.block) * config.block
    positions = lm.config.max_positions
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= positions - new:
            raise CapacityError(
                f"cannot collect trajectories: prompt {row} has {len(prompt)} tokens, "
                f"expected 1 to {max(positions - new, 0)} (the model's {positions} "
                f"positions less {new} new tokens). Correct it or lower max_new."
            )
        check_ids(prompt, lm.config.vocabulary, row)


def _write_shard(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    path: Path,
    numbered: tuple[int, list[int]],
    config: TrajectoryConfig,
) -> None:
    index, batch = numbered
    # A batch that is not full repeats its last prompt, so that few shapes compile.
    filled = batch + [batch[-1]] * (batch_bucket(len(batch)) - len(batch))
    with on_mesh(lm):
        found = collect_trajectories(
            lm.model,
            lm.params,
            [prompts[row] for row in filled],
            n=config.block,
            max_new=config.max_new,
            key=jax.random.fold_in(jax.random.key(config.seed), index),
            eos=lm.generation.eos_ids,
        )
        found = jax.device_get(found)
    arrays = {
        field.name: np.asarray(getattr(found, field.name))[: len(batch)]
        for field in dataclasses.fields(found)
    }
    arrays["prompt_B"] = np.asarray(batch, np.int32)
    arrays["prompt_length_B"] = np.asarray([len(prompts[i]) for i in batch], np.int32)
    write_safetensors(path, arrays)


def longest_run(tokens_T: np.ndarray) -> int:
    """Returns the length of the longest run of equal tokens."""
    if not len(tokens_T):
        return 0
    ends = np.flatnonzero(np.diff(tokens_T)) + 1
    return int(np.diff(ends, prepend=0, append=len(tokens_T)).max())


class TrajectoryDataset:
    """Items of a collection in the order of training, one iterate of a block each.

    Item i is the i-th that is shown: an epoch is a shuffle of its own of all blocks,
    and every epoch draws another iterate of each. So the same number gives the same
    item wherever a run was resumed, as long as nothing shuffles once more.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        seed: int = 0,
        epochs: int = 1,
        augment: bool = True,
        max_run: int = 10,
        max_prefix: int | None = None,
        phase_in: int = 0,
    ):
        """Opens a finished collection and leaves out what nobody should learn from.

        Args:
          directory: What `write_trajectories` has written.
          seed: Of order, iterates and augmentation.
          epochs: How often every block is shown.
          augment: Whether, except in the last iterate before the fixed point, a random
            half of the wrong tokens behind the first one are overwritten by the right
            ones.
          max_run: Blocks whose text holds so many equal tokens in a row are left out.
          max_prefix: Blocks behind more tokens are left out; none when None.
          phase_in: Items over which the logit positions that count grow from the one
            behind the first mismatch to all of the block.

        Raises:
          CheckpointError: Files are missing: the collection is not finished.
          ConfigError: A value is out of range, or no block is left.
        """
        if epochs < 1 or phase_in < 0 or max_run < 2:
            raise ConfigError(
                f"cannot read trajectories: epochs {epochs}, phase_in {phase_in}, "
                f"max_run {max_run}, expected at least 1, 0 and 2. Correct them."
            )
        self._shards = _read_shards(Path(directory))
        self._eos = _end_tokens(Path(directory))
        self._seed, self._epochs, self._augment = seed, epochs, augment
        self._phase_in = phase_in
        self.left_out = 0
        # Shard, row and block of every item.
        self._items_I3 = self._select(max_run, max_prefix)
        if not len(self._items_I3):
            raise ConfigError(
                f"cannot read trajectories: {directory}: no block of {self.left_out} "
                f"is left, expected some. Collect more, or from a model that repeats "
                f"itself less."
            )
        self.prefix_slots = max(self._start(*item) for item in self._items_I3)
        self._shuffled = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Returns how many items are shown in all epochs."""
        return len(self._items_I3) * self._epochs

    def __getitem__(self, index: int) -> TrajectoryBatch:
        """Returns an item: the leaves of a `TrajectoryBatch` without their first axis.

        Stack the leaves of several to make a batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, place = divmod(index, len(self._items_I3))
        item = int(self._order(epoch)[place])
        shard, row, block = self._items_I3[item]
        rng = np.random.default_rng([_ITERATES, self._seed, epoch, item])
        arrays = self._shards[shard]
        iterations = int(arrays["iterations_BC"][row, block])
        iterates_JT = arrays["iterates_BCJT"][row, block]
        drawn = int(rng.integers(iterations))
        iterate_T, fixed_T = iterates_JT[drawn], iterates_JT[-1]
        if self._augment and drawn < iterations - 1:
            iterate_T = _with_half_right(iterate_T, fixed_T, rng)
        start, T = self._start(shard, row, block), len(fixed_T)
        prefix_P = np.zeros(self.prefix_slots, np.int32)
        prefix_P[self.prefix_slots - start :] = arrays["tokens_BS"][row, :start]
        shown = T if index >= self._phase_in else index * (T - 1) // self._phase_in
        # numpy's, which a loader stacks; the type says what a step is given.
        leaves: dict[str, Any] = {
            "prefix_BP": prefix_P,
            "length_B": np.int32(start),
            "prompt_B": np.int32(arrays["prompt_length_B"][row]),
            "fixed_BT": np.array(fixed_T),
            "iterate_BT": np.array(iterate_T),
            "next_BT": np.array(iterates_JT[drawn + 1]),
            "reach_B": np.int32(max(1, shown)),
        }
        return TrajectoryBatch(**leaves)

    def progress(self) -> dict[str, float]:
        """Returns how fast the collected iterates converge; see `TrajectorySet`.

        Returns:
          What `TrajectorySet.progress` returns, and `left_out`, the share of blocks
          that nobody learns from.
        """
        names = ("iterates_BCJT", "iterations_BC", "valid_BC")
        joined = {
            name: np.concatenate([shard[name] for shard in self._shards])
            for name in names
        }
        blank = dict.fromkeys(("tokens_BS", "length_B", "start_BC"), np.zeros(0))
        whole = TrajectorySet(**blank, **joined)  # type: ignore[arg-type]
        blocks = self.left_out + len(self._items_I3)
        return {**whole.progress(), "left_out": self.left_out / blocks}

    def _start(self, shard: int, row: int, block: int) -> int:
        return int(self._shards[shard]["start_BC"][row, block])

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled[0] != epoch:
            rng = np.random.default_rng([_ORDER, self._seed, epoch])
            self._shuffled = (epoch, rng.permutation(len(self._items_I3)))
        return self._shuffled[1]

    def _select(self, max_run: int, max_prefix: int | None) -> np.ndarray:
        """Returns the blocks that are learned from, and counts the others."""
        kept = []
        for index, shard in enumerate(self._shards):
            for row, block in np.argwhere(shard["valid_BC"]):
                start = self._start(index, row, block)
                # What was the fixed point at once has nothing to teach.
                moved = shard["iterations_BC"][row, block] > 0
                fits = max_prefix is None or start <= max_prefix
                if moved and fits and self._run(shard, row, block, max_run) < max_run:
                    kept.append((index, row, block))
                else:
                    self.left_out += 1
        return np.asarray(kept, np.int64).reshape(-1, 3)

    def _run(
        self, shard: dict[str, np.ndarray], row: int, block: int, max_run: int
    ) -> int:
        """Returns the longest run that ends in a block's text, up to its end token."""
        start = int(shard["start_BC"][row, block])
        first = max(int(shard["prompt_length_B"][row]), start - max_run + 1)
        fixed_T = shard["iterates_BCJT"][row, block, -1]
        ends = np.flatnonzero(np.isin(fixed_T, self._eos))
        fixed_T = fixed_T[: ends[0] + 1] if len(ends) else fixed_T
        return longest_run(
            np.concatenate([shard["tokens_BS"][row, first:start], fixed_T])
        )


def _with_half_right(
    iterate_T: np.ndarray, fixed_T: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Returns an iterate with half of its wrong tokens but the first made right."""
    wrong = np.flatnonzero(iterate_T != fixed_T)[1:]
    chosen = rng.permutation(wrong)[: len(wrong) // 2]
    mended_T = np.array(iterate_T)
    mended_T[chosen] = fixed_T[chosen]
    return mended_T


def _read_shards(directory: Path) -> list[dict[str, np.ndarray]]:
    paths = sorted(directory.glob(_SHARD.split("{", 1)[0] + "*.safetensors"))
    count = int(paths[0].stem.rsplit("-", 1)[-1]) if paths else 1
    if len(paths) != count:
        raise CheckpointError(
            f"cannot read trajectories: {directory}: has {len(paths)} files, expected "
            f"{count}. Run the collection again: it goes on where it stopped."
        )
    return [
        {name: x.read() for name, x in read_safetensors(path).items()} for path in paths
    ]


def _end_tokens(directory: Path) -> np.ndarray:
    origin = read_json_object(directory / _ORIGIN, "cannot read trajectories")
    return np.asarray(origin["eos"], np.int32)


def measure_trajectories(
    lm: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    config: TrajectoryConfig,
) -> dict[str, float]:
    """Returns how fast a model's iterates converge now: a curve to plot in training.

    Args:
      lm: The model that is trained.
      params: Its parameters by now.
      prompts: Held-out prompts.
      config: As for `write_trajectories`.

    Returns:
      `iterations`, `fast_forward` and `stationary` of `TrajectorySet.progress`, and
      `repetitive`, the share of blocks that hold ten equal tokens in a row: a broken
      model converges fast too.
    """
    with on_mesh(lm):
        found = collect_trajectories(
            lm.model,
            params,
            prompts,
            n=config.block,
            max_new=config.max_new,
            key=jax.random.key(config.seed),
            eos=lm.generation.eos_ids,
        )
        found = jax.device_get(found)
    repetitive = np.asarray(found.repetitive_BC())[found.valid_BC]
    return {**found.progress(), "repetitive": float(repetitive.mean())}

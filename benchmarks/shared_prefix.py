"""A prefix that all rows share, kept once: decode throughput by batch and prefix.

    python benchmarks/shared_prefix.py --output=runs/shared_prefix.json

One run times plain decoding with the prefix in every row's own cache and with the
prefix kept once, in turns, from the same state, and checks that both give the same
tokens. Besides: prompts of two levels (a system prompt, questions, samples of each)
with one level shared and with both; and one system prompt before questions of mixed
lengths. Random weights, float32: only keys and values matter here.

A CPU spends its time on products, which sharing leaves as they are; what it saves are
the bytes. `kv_bytes` says how many a step reads by count, `accessed_bytes` what the
compiled step touches, logits and copies included.

Source: Hydragen (arXiv 2402.05099) figure 3 and section 4.4; RelayAttention (arXiv
2402.14808) table 2. Expect, on two otherwise idle cores, some ten minutes.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from typing import Any

# Started by its path, only this file's own folder is found.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.machine import available_cores, environment, use_cores
from jaxllm.attention import DenseCache, PrefixedCache, RopeConfig
from jaxllm.core import row_keys
from jaxllm.decoding import Committed, DecodeState, advance, make_sampler, prefill
from jaxllm.decoding.sharing import SharedStretch, build_prefix, plan_sharing
from jaxllm.drafting import Autoregressive
from jaxllm.layers import AttentionConfig, MlpConfig
from jaxllm.models import DecoderConfig, make_model

FLAGS = flags.FLAGS
flags.DEFINE_multi_integer("batch", [1, 16, 64], "Rows.")
flags.DEFINE_multi_integer("prefix", [1024, 2048, 4096, 16384], "Tokens shared.")
flags.DEFINE_integer("suffix", 64, "Tokens that a row has of its own.", lower_bound=2)
flags.DEFINE_integer("layers", 2, "Layers of the model.", lower_bound=1)
flags.DEFINE_integer("width", 256, "Width of the model.", lower_bound=32)
flags.DEFINE_integer("heads", 8, "Query heads, and kv heads.", lower_bound=1)
flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)
flags.DEFINE_integer("steps", 8, "Steps of a round.", lower_bound=1)
flags.DEFINE_float(
    "gigabytes", 6, "Largest cache; settings with a larger are left out."
)
flags.DEFINE_string("output", None, "JSON for the results.")

VOCABULARY = 512


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model, and what decodes with it."""

    model: Any
    params: Any

    @classmethod
    def make(cls) -> "Bench":
        head_dim = FLAGS.width // FLAGS.heads
        config = DecoderConfig(
            vocabulary=VOCABULARY,
            width=FLAGS.width,
            num_layers=FLAGS.layers,
            max_positions=2**16,
            attention=AttentionConfig(
                num_heads=FLAGS.heads, num_kv_heads=FLAGS.heads, head_dim=head_dim
            ),
            mlp=MlpConfig(hidden=3 * FLAGS.width),
            ropes=(RopeConfig(rotary_dim=head_dim),),
            tied_head=True,
        )
        return cls(*make_model(config, jax.random.key(0)))

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * 4 * FLAGS.layers * FLAGS.width

    def start(
        self, prompts: list[list[int]], plan: tuple[SharedStretch, ...], new: int
    ) -> DecodeState:
        """Returns the state after the prompts, with what the plan shares kept once."""
        rows = len(prompts)
        longest = max(map(len, prompts))
        tokens_BS = np.zeros((rows, longest + new), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : len(prompt)] = prompt
        length_B = jnp.asarray([len(p) for p in prompts], jnp.int32)
        keys = row_keys(jnp.arange(rows))
        committed = Committed(
            jnp.asarray(tokens_BS), length_B, keys, make_sampler(rows), length_B
        )
        shared = [0] * rows
        for stretch in plan:
            for row in stretch.rows:
                shared[row] = max(shared[row], stretch.stop)
        own = max(len(p) - s for p, s in zip(prompts, shared, strict=True))
        cache: Any = self.model.init_cache(self.params, rows, own + new)
        if plan:
            make = {"model": self.model, "rows": rows, "rope_length": 1}
            cache = PrefixedCache(
                build_prefix(self.params, plan, prompts, **make), cache
            )
        return prefill(
            self.arguments,
            committed,
            cache,
            jnp.full((rows,), 2**20, jnp.int32),
            jnp.zeros((rows,), bool),
            model=self.model,
            drafter=Autoregressive(),
            chunk=min(512, own),
            rope_length=1,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        return {"target": self.params, "drafter": {}}

    def loop(self, state: DecodeState) -> Any:
        """Returns the compiled loop for states like this one."""
        rows = state.done_B.shape[0]
        sampler, eos_E = make_sampler(rows), jnp.asarray([-1])
        options = {"model": self.model, "drafter": Autoregressive(), "rope_length": 1}
        compiled = advance.lower(
            self.arguments, state, sampler, eos_E, jnp.int32(1), **options
        ).compile()

        def run(state: DecodeState, steps: int) -> DecodeState:
            return compiled(self.arguments, state, sampler, eos_E, jnp.int32(steps))

        costs = compiled.cost_analysis() or {}
        return run, costs.get("bytes accessed")


def unshared(state: DecodeState) -> DecodeState:
    """Returns the state with the one shared stretch in every row's own slots."""
    prefix, own = state.cache.prefix, state.cache.suffix
    [level] = prefix.levels
    length = int(level.length_U[0])

    def join(shared: jax.Array, x: jax.Array) -> jax.Array:
        wide = (x.shape[0], x.shape[1], *shared.shape[2:])
        first = jnp.broadcast_to(shared[:, :1], wide)[:, :, :, :length]
        return jnp.concatenate([first, x], axis=3)

    def join_all(shared: Any, xs: Any) -> tuple[jax.Array, ...]:
        return tuple(join(s, x) for s, x in zip(shared, xs, strict=True))

    dense = DenseCache(
        join_all(level.k, own.k), join_all(level.v, own.v), length + own.length_B
    )
    return dataclasses.replace(state, cache=dense)


def race(bench: Bench, states: dict[str, DecodeState]) -> dict[str, dict[str, Any]]:
    """Times the loops in turns; all must give the same tokens."""
    loops = {name: bench.loop(state) for name, state in states.items()}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for turn in range(FLAGS.rounds + 1):
        for name, (run, _) in loops.items():
            begun = time.perf_counter()
            states[name] = jax.block_until_ready(run(states[name], FLAGS.steps))
            if turn:  # The first one touches all memory for the first time.
                seconds[name].append((time.perf_counter() - begun) / FLAGS.steps)
    tokens = [np.asarray(s.committed.tokens_BS) for s in states.values()]
    if not all((t == tokens[0]).all() for t in tokens):
        raise RuntimeError("a shared prefix gave other tokens than one of every row")
    return {
        name: {"seconds_samples": found, "accessed_bytes": loops[name][1]}
        for name, found in seconds.items()
    }


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def some(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(1, VOCABULARY, count).tolist()


def grid(bench: Bench) -> list[dict[str, Any]]:
    """One prefix of all rows, by batch and length."""
    rng, rows = np.random.default_rng(0), []
    new = FLAGS.steps * (FLAGS.rounds + 2)
    for prefix in FLAGS.prefix:
        for batch in FLAGS.batch:
            own = FLAGS.suffix + new
            size = batch * (prefix + own) * bench.token_bytes
            head = some(rng, prefix)
            prompts = [head + some(rng, FLAGS.suffix) for _ in range(batch)]
            plan = (SharedStretch(tuple(range(batch)), 0, prefix),)
            states = {"shared": bench.start(prompts, plan, new)}
            if size <= FLAGS.gigabytes * 1e9:
                # Before the first loop, which takes the arrays of its state.
                copy = jax.tree.map(jnp.copy, states["shared"])
                states["plain"] = unshared(copy)
            found = race(bench, dict(reversed(states.items())))
            suffix = FLAGS.suffix * batch
            counted = {"plain": prefix * batch + suffix, "shared": prefix + suffix}
            row: dict[str, Any] = {"kind": "grid", "batch": batch, "prefix": prefix}
            for name, figures in found.items():
                row |= {f"{name}_{key}": value for key, value in figures.items()}
                row[f"{name}_kv_bytes"] = counted[name] * bench.token_bytes
                step = statistics.median(figures["seconds_samples"])
                row[f"{name}_tokens_per_second"] = batch / step
            if "plain" in found:
                samples = [found[n]["seconds_samples"] for n in ("plain", "shared")]
                row["speedup"] = ratio(*samples)
            rows.append(row)
            show(row)
    return rows


def workloads(bench: Bench) -> list[dict[str, Any]]:
    """A tree of prompts, and a system prompt before questions of mixed lengths."""
    rng = np.random.default_rng(1)
    system, new = some(rng, 1024), FLAGS.steps * (FLAGS.rounds + 2)
    questions = [some(rng, 512) for _ in range(8)]
    tree = [system + q + some(rng, 2) for q in questions for _ in range(8)]
    lengths = np.linspace(16, 256, 32).astype(int)
    mixed = [system * 2 + some(rng, n) for n in lengths]
    rows = []
    for kind, prompts, levels in (("tree", tree, (1, 2)), ("mixed", mixed, (0, 1))):
        states = {}
        for most in levels:
            plan = plan_sharing(prompts, most_levels=most)
            states[f"levels {most}"] = bench.start(prompts, plan, new)
        found = race(bench, states)
        fewer, more = (found[f"levels {n}"]["seconds_samples"] for n in levels)
        row: dict[str, Any] = {"kind": kind, "batch": len(prompts)}
        row |= {"fewer_levels": levels[0], "more_levels": levels[1]}
        row |= {"fewer_seconds_samples": fewer, "more_seconds_samples": more}
        row["speedup"] = ratio(fewer, more)
        rows.append(row)
        show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    parts = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, int | float)]
    print(f"{row['kind']:6}", "  ".join(parts), flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    use_cores(available_cores())
    bench = Bench.make()
    rows = [*grid(bench), *workloads(bench)]
    if FLAGS.output is not None:
        report = {
            "format": 1,
            "claim": "a shared prefix is read once a step instead of once a row",
            "paper": "Hydragen: up to 32x; RelayAttention: up to 2.2x",
            "rows": rows,
            "environment": environment(),
        }
        path = pathlib.Path(FLAGS.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    app.run(main)

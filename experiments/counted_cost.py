"""What a setting of drafters costs, counted and not timed, and the files they leave.

The cost of a text is the parameters that were read for each of its tokens: forwards of
every model times its parameters, relative to plain decoding with the target. It is the
same on every machine, and the measure of Cascade Speculative Drafting.
"""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jaxllm
from jaxllm.decoding import BoundDrafter
from jaxllm.drafting.draft_net import DraftNet
from jaxllm.evaluation import default_prompts
from jaxllm.training.generated import prompts_from_texts
from jaxllm.training.synthetic import END_OF_TEXT
from jaxllm.version import __version__

__all__ = ["Setting", "measure", "story_beginnings", "story_prompts", "write_report"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one method did on all prompts.

    Attributes:
      method: Its string.
      tokens: That it wrote.
      target_passes: Forwards of the target.
      draft_passes: Forwards of each inner model.
      draft_tokens: Nodes that each inner model ran.
      cost: Counted cost of a token, 1 for plain decoding.
    """

    method: str
    tokens: int
    target_passes: int
    draft_passes: dict[str, int]
    draft_tokens: dict[str, int]
    cost: float

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of a forward of the target."""
        return self.tokens / self.target_passes

    def row(self) -> dict[str, Any]:
        """Returns a flat row of a report."""
        return {
            "method": self.method,
            "tokens_per_pass": round(self.tokens_per_pass, 4),
            "counted_cost": round(self.cost, 4),
            "target_passes": self.target_passes,
            **{f"passes[{k}]": v for k, v in self.draft_passes.items()},
            **{f"nodes[{k}]": v for k, v in self.draft_tokens.items()},
        }


def story_prompts() -> list[str]:
    """Returns the texts of the prompts that ship with the package."""
    return [row.prompt for row in default_prompts().rows]


def story_beginnings(
    lm: jaxllm.LanguageModel, file: Path, count: int, seed: int
) -> list[list[int]]:
    """Beginnings of the first stories of a file; it is not opened for none."""
    if not count:
        return []
    texts = file.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")[:count]
    return prompts_from_texts(lm, texts, longest=48, seed=seed)


def size(params: Any) -> int:
    """Returns how many numbers a tree of parameters holds."""
    return sum(x.size for x in jax.tree.leaves(params))


def measure(
    lm: jaxllm.LanguageModel,
    method: str | BoundDrafter,
    prompts: list[str],
    *,
    max_new_tokens: int = 96,
    **options: Any,
) -> Setting:
    """Runs a method on all prompts and counts.

    Args:
      lm: The target.
      method: Its string; or a bound drafter, which keeps what it learns.
      prompts: Texts.
      max_new_tokens: Of each.
      **options: As for `jaxllm.generate`.
    """
    bound = jaxllm.bind(lm, method) if isinstance(method, str) else method
    results = jaxllm.generate(
        lm, prompts, drafter=bound, max_new_tokens=max_new_tokens, **options
    )
    passes: dict[str, int] = {}
    nodes: dict[str, int] = {}
    for result in results:
        for found, name in ((passes, "draft_passes"), (nodes, "draft_tokens")):
            for level, count in result.stats[name].items():
                found[level] = found.get(level, 0) + count
    tokens = sum(len(r.token_ids) for r in results)
    target = sum(r.stats["target_passes"] for r in results)
    sizes = dict(model_sizes(bound.drafter, bound.params))
    own = size(lm.params)
    read = target * own + sum(passes[level] * sizes[level] for level in passes)
    name = method if isinstance(method, str) else type(bound.drafter).__name__
    return Setting(name, tokens, target, passes, nodes, read / own / tokens)


def model_sizes(drafter: Any, params: Any) -> list[tuple[str, int]]:
    """Returns name and parameters of every model in a drafter."""
    net = getattr(drafter, "net", None)
    found = []
    if isinstance(net, DraftNet):
        weights = params["model"] if "model" in params else params
        found.append((net.name, size(weights)))
    if dataclasses.is_dataclass(drafter):
        for field in dataclasses.fields(drafter):
            value = getattr(drafter, field.name)
            if field.name == "drafter":
                inner = params["inner"] if "inner" in params else params
                found += model_sizes(value, inner)
            elif field.name == "drafters":
                for i, part in enumerate(value):
                    found += model_sizes(part, params[str(i)])
            elif field.name in ("first", "second"):
                found += model_sizes(value, params[field.name])
    return found


def write_report(
    path: str | None, claim: str, paper: str, rows: list[dict[str, Any]]
) -> None:
    """Prints the rows, and writes them with their environment where a path is given."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row.get(name, "")) for name in columns))
    if path is None:
        return
    environment = {
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jaxllm": __version__,
        **{name: version(name) for name in ("jax", "jaxlib")},
    }
    report = {
        "format": 1,
        "claim": claim,
        "paper": paper,
        "rows": rows,
        "environment": environment,
    }
    Path(path).write_text(json.dumps(report, indent=2) + "\n")

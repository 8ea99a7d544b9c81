"""A Llama with random weights on disk, as every contender can read it.

Letters: V vocabulary, D width, F hidden width of the feed-forward block, N heads,
H head dim.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

__all__ = ["MODELS", "RandomLlama", "random_prompts"]

_SPECIAL = ("<unk>", "<s>", "</s>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLlama:
    """The sizes of a Llama whose head is its embedding table.

    Attributes:
      vocabulary: V.
      width: D.
      num_layers: Layers.
      num_heads: N, of queries and of keys and values alike.
      hidden: F.
      max_positions: What config.json promises.
    """

    vocabulary: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    max_positions: int = 2048

    def hf_config(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.width // self.num_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape, `[out, in]`, of every tensor by its name in the file."""
        V, D, F = self.vocabulary, self.width, self.hidden
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for name in "qkvo":
                shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (D, D)
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (F, D)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (F, D)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (D, F)
            shapes[f"{prefix}.input_layernorm.weight"] = (D,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (D,)
        shapes["model.norm.weight"] = (D,)
        return shapes

    @property
    def parameters(self) -> int:
        """How many numbers the model holds; a decode step reads each of them once.

        The embedding table counts once: a step reads all of it as the head, and one
        row of it more as the embedding.
        """
        return sum(int(np.prod(shape)) for shape in self.shapes().values())

    def write(self, directory: pathlib.Path, seed: int) -> None:
        """Writes weights (float32), configuration and a tokenizer.

        Args:
          directory: Made if absent.
          seed: Of the weights: normal with deviation 0.02, norms 1.
        """
        directory.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        tensors = {
            name: np.ones(shape, np.float32)
            if len(shape) == 1
            else rng.standard_normal(shape, np.float32) * np.float32(0.02)
            for name, shape in self.shapes().items()
        }
        # transformers refuses a file that does not say which framework wrote it.
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(self.hf_config(), indent=1))
        self._write_tokenizer(directory)

    def _write_tokenizer(self, directory: pathlib.Path) -> None:
        """Writes one made-up word for each id; CTranslate2 names tokens by text."""
        words = [*_SPECIAL, *(f"t{i}" for i in range(len(_SPECIAL), self.vocabulary))]
        model = tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(words)}, unk_token=_SPECIAL[0]
        )
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(list(_SPECIAL))
        tokenizer.save(str(directory / "tokenizer.json"))
        names = dict(
            zip(("unk_token", "bos_token", "eos_token"), _SPECIAL, strict=True)
        )
        (directory / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
        )


def random_prompts(
    vocabulary: int, rows: int, length: int, seed: int
) -> list[list[int]]:
    """Returns prompts of equal length without special tokens; row 0 comes first."""
    rng = np.random.default_rng((seed, length))
    return rng.integers(len(_SPECIAL), vocabulary, (rows, length)).tolist()


MODELS = {
    "llama-110m": RandomLlama(
        vocabulary=32000, width=768, num_layers=12, num_heads=12, hidden=2048
    ),
    # For tests of this benchmark; its times say nothing.
    "tiny": RandomLlama(
        vocabulary=256, width=64, num_layers=2, num_heads=4, hidden=128
    ),
}

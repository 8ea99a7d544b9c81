"""Running methods on the toy model, for tests of drafters."""

import numpy as np

import jaxllm
from jaxllm.checkpoints import GenerationDefaults
from jaxllm.decoding import BoundDrafter
from tests.decoding.toys import VOCABULARY, toy_model

OPTIONS = {"max_new_tokens": 24, "seed": 3}


def toy_lm(eos: tuple[int, ...] = ()) -> jaxllm.LanguageModel:
    model, params = toy_model()
    generation = GenerationDefaults(eos_ids=eos)
    return jaxllm.LanguageModel(
        model=model, params=params, generation=generation, name="toy"
    )


def toy_prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]


def run(method, lengths=(6, 2), temperature=0.0, **options) -> list[jaxllm.Result]:
    """Results of a method by its string, a drafter or a bound drafter."""
    lm = toy_lm()
    bound = method if isinstance(method, BoundDrafter) else jaxllm.bind(lm, method)
    settings = {**OPTIONS, "temperature": temperature, **options}
    return jaxllm.generate(lm, toy_prompts(*lengths), drafter=bound, **settings)


def ids(results) -> list[list[int]]:
    return [r.token_ids for r in results]


def steps(results) -> list[tuple]:
    """What has to be equal for two drafters to have drafted the same."""
    names = ("target_passes", "accepted", "tested", "drafted")
    return [tuple(str(r.stats[name]) for name in names) for r in results]

"""Who takes part, and in which batches the prompts run."""

import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.drafting import METHODS, Autoregressive
from jaxllm.evaluation import DEFAULT_METHODS, PromptRow, Settings, build_methods
from jaxllm.evaluation.entrants import Course
from tests.evaluation.drafters import tiny_lm


def test_a_batch_holds_prompts_of_one_category():
    kinds = [(3, "a"), (9, "b"), (5, "a"), (20, "b"), (4, "a")]
    rows = [
        PromptRow(id=i, prompt=np.ones(n, int).tolist(), category=category)
        for i, (n, category) in enumerate(kinds)
    ]
    settings = Settings(batch=2, max_new_tokens=6)
    course = Course.make(tiny_lm(), rows, settings)
    # Row 3 is of another bucket of lengths.
    assert [(b.rows, b.category, b.longest) for b in course.batches] == [
        ((0, 2), "a", 11),
        ((1,), "b", 15),
        ((3,), "b", 26),
        ((4,), "a", 10),
    ]
    assert course.job.seeds == [0, 1, 2, 3, 4]
    shapes = course.shapes(Autoregressive())
    assert [b.rows for b in shapes.values()] == [(0, 2), (1,), (3,)]


def test_plain_decoding_is_put_first_where_it_is_missing():
    assert list(build_methods(["autoregressive:query_width=2"])) == [
        "autoregressive:query_width=2"
    ]
    name = next(name for name in METHODS if name != "autoregressive")
    found = build_methods([name])
    assert list(found) == ["autoregressive", name]
    assert found["autoregressive"] == Autoregressive()
    assert list(build_methods([name, "autoregressive"])) == [name, "autoregressive"]


def test_a_method_is_named_once():
    with pytest.raises(ConfigError, match="'autoregressive': is there twice"):
        build_methods(["autoregressive"] * 2)
    with pytest.raises(ConfigError, match="unknown method: 'autoregresive'"):
        build_methods(["autoregresive"])


def test_the_default_methods_are_registered():
    assert DEFAULT_METHODS[0] == "autoregressive"
    assert list(build_methods(DEFAULT_METHODS)) == list(DEFAULT_METHODS)

"""Cascades: what they have to equal, and what they refuse."""

import pytest

import jaxllm
from jaxllm.core.errors import ConfigError
from tests.decoding.toys import TEMPERATURES
from tests.drafting.toy_methods import ids, run, steps, toy_lm

EARLY = "model=target,layers=1"
WHOLE = "model=target,layers=2"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_vertical_over_nothing_is_the_model_alone(temperature) -> None:
    alone = run(f"model:{EARLY},length=4", temperature=temperature)
    cascade = run(
        f"vertical:{EARLY},length=4,drafter=(autoregressive)", temperature=temperature
    )
    assert ids(alone) == ids(cascade)
    assert steps(alone) == steps(cascade)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_strict_vertical_drafts_what_its_model_would(temperature) -> None:
    alone = run(f"model:{WHOLE},length=6", temperature=temperature)
    cascade = run(
        f"vertical:{WHOLE},length=6,drafter=(model:{EARLY},length=3)",
        temperature=temperature,
    )
    assert ids(alone) == ids(cascade)
    assert steps(alone) == steps(cascade)
    for result in cascade:
        passes = result.stats["draft_passes"]
        # The inner drafter saves its model some of the forwards, at least when it is
        # right at all; and it never costs more than one forward a token.
        assert passes["target[:2]"] <= 6 * result.stats["target_passes"]


@pytest.mark.slow
def test_a_perfect_inner_drafter_saves_forwards() -> None:
    # A quantized copy of the target reviews, so that the levels count apart.
    level = "target[:2] int8"
    inner = f"(model:{WHOLE},length=2)"
    cascade = run(f"vertical:{WHOLE},quantize=int8,length=6,drafter={inner}")
    single = run(f"model:{WHOLE},quantize=int8,length=6")
    assert steps(cascade) == steps(single)
    for one, other in zip(cascade, single, strict=True):
        # Two reviews of three tokens in place of six forwards, where all are right.
        reviews = one.stats["draft_passes"][level] / one.stats["target_passes"]
        alone = other.stats["draft_passes"][level] / other.stats["target_passes"]
        assert 2 <= reviews < 0.6 * alone


@pytest.mark.slow
def test_a_horizontal_of_one_is_that_one() -> None:
    for temperature in (0.0, 1.0):
        alone = run(f"model:{EARLY},length=3", temperature=temperature)
        cascade = run(
            f"horizontal:drafters=(model:{EARLY},length=3),lengths=3",
            temperature=temperature,
        )
        assert ids(alone) == ids(cascade)
        assert steps(alone) == steps(cascade)


@pytest.mark.slow
def test_a_horizontal_goes_on_where_the_first_stopped() -> None:
    alone = run(f"model:{WHOLE},length=5")
    parts = f"(model:{WHOLE},length=3)+(model:{WHOLE},length=2)"
    cascade = run(f"horizontal:drafters={parts},lengths=3+2")
    assert ids(alone) == ids(cascade)
    assert steps(alone) == steps(cascade)


@pytest.mark.slow
def test_lenience_lets_the_inner_draft_through() -> None:
    inner = f"(model:{EARLY},length=4)"
    lenient = run(f"vertical:{WHOLE},length=4,lenience=1e9,drafter={inner}")
    alone = run(f"model:{EARLY},length=4")
    assert ids(lenient) == ids(alone)
    assert steps(lenient) == steps(alone)
    for result in lenient:
        # One review accepts all four.
        passes = result.stats["target_passes"]
        assert result.stats["draft_passes"]["target[:2]"] == passes


@pytest.mark.slow
def test_the_first_difference_is_never_the_cascades() -> None:
    methods = [
        f"vertical:{WHOLE},length=3,drafter=(tree:{EARLY})",
        f"vertical:{EARLY},length=3,drafter=(max_gram:length=3)",
    ]
    for method in methods:
        found = run(method, temperature=1.0)
        assert ids(found) == ids(run("autoregressive:query_width=4", temperature=1.0))


def test_refusals() -> None:
    lm = toy_lm()
    wrong = {
        "horizontal:drafters=(model),lengths=2+2": "1 drafters and 2 lengths",
        "horizontal:drafters=(tree),lengths=2": "a drafter of trees, expected chains",
        "horizontal:drafters=(model:length=2),lengths=3": "length 3 for a drafter of 2",
        "vertical:length=0,drafter=(model)": "length 0 and lenience 1",
        "vertical:lenience=2,drafter=(tree)": "lenience above 1 and an inner",
        "vertical:drafter=(heads)": "HeadsDrafter, which reads the target's hidden",
    }
    for method, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            jaxllm.bind(lm, method)
    lenient = jaxllm.bind(lm, f"vertical:{EARLY},lenience=2,drafter=(autoregressive)")
    with pytest.raises(ConfigError, match="above 1 under the rejection rule"):
        run(lenient, temperature=1.0, verify="reject")


@pytest.mark.parametrize("window", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_first_part_of_a_horizontal_learns_as_if_alone(window) -> None:
    # Of a window that is wider than the part's share, the rest stays as guessed.
    alone = run(f"jacobi:window={window}")
    cascade = run(f"horizontal:drafters=(jacobi:window={window}),lengths={window - 1}")
    assert steps(alone) == steps(cascade)
    run(f"horizontal:drafters=(jacobi:window={window})+(max_gram),lengths=2+1")

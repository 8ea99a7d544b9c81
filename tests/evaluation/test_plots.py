"""The picture of a comparison."""

import io
import itertools

import pytest
from hypothesis import given, strategies
from matplotlib import image

from jaxllm.evaluation import (
    Comparison,
    Figures,
    MethodResult,
    PromptSet,
    Settings,
)
from jaxllm.evaluation.plots import draw_comparison, make_figure, wrap_name
from tests.evaluation.drafters import tiny_lm

LONG = (
    "horizontal:drafters=(model:model=demo-draft,length=4)+(prompt_lookup),lengths=3+8"
)


def result(name, tokens_per_pass, speedup, lossless=True):
    figures = Figures(
        tokens=100,
        target_passes=50,
        tokens_per_pass=tokens_per_pass,
        seconds=[1.0],
        tokens_per_second=100.0,
        speedup=speedup,
        spread=[0.9 * speedup, 1.2 * speedup],
        speedups=[speedup],
    )
    return MethodResult(
        name=name,
        lossless=lossless,
        first_divergence=None,
        divergences=0,
        near_ties=0,
        overall=figures,
        by_category={},
        draft_passes={},
        draft_tokens={},
        acceptance_by_depth=[],
        peak_bytes=None,
    )


def comparison(*methods):
    return Comparison(
        lm=tiny_lm(),
        prompts=PromptSet.of([[1]]),
        settings=Settings(),
        methods=methods,
    )


def test_bars_are_as_long_as_the_figures():
    methods = [
        result("autoregressive", 1.0, 1.0),
        result(LONG, 2.5, 1.7),
        result("broken", 3.0, 0.4, lossless=False),
    ]
    passes, speeds = make_figure(comparison(*methods)).axes
    assert [bar.get_width() for bar in passes.patches] == [1.0, 2.5, 3.0]
    assert [bar.get_width() for bar in speeds.patches] == [1.0, 1.7, 0.4]
    assert [text.get_text() for text in speeds.texts] == ["1.00", "1.70", "0.40"]
    for axes in (passes, speeds):
        [line] = [x for x in axes.lines if list(x.get_xdata()) == [1.0, 1.0]]
        assert line.get_visible()
    labels = [text.get_text() for text in passes.get_yticklabels()]
    assert labels[0] == "autoregressive"
    assert labels[1].replace("\n", "") == LONG
    assert labels[2] == "broken\n(not lossless)"
    # The first is at the top, and one that is not lossless has a colour of its own.
    assert passes.get_ylim()[0] > passes.get_ylim()[1]
    assert len({bar.get_facecolor() for bar in passes.patches}) == 3
    lows, highs = zip(*(s.overall.spread for s in methods), strict=True)
    [bars] = speeds.containers[1].lines[2]
    drawn = [segment[:, 0] for segment in bars.get_segments()]
    assert [x[0] for x in drawn] == pytest.approx(lows)
    assert [x[1] for x in drawn] == pytest.approx(highs)


def test_nothing_is_cut_off_or_overlaps_with_many_long_names():
    methods = [result("autoregressive", 1.0, 1.0)]
    methods += [result(f"{LONG[:-1]}{i}", 2.0, 1.5) for i in range(14)]
    figure = make_figure(comparison(*methods))
    figure.draw_without_rendering()
    passes, speeds = figure.axes
    boxes = [text.get_window_extent() for text in passes.get_yticklabels()]
    for upper, lower in itertools.pairwise(boxes):
        assert upper.y0 > lower.y1
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= passes.bbox.x0
    for axes in (passes, speeds):
        for text in axes.texts:
            assert text.get_window_extent().x1 <= figure.bbox.x1
    assert figure.get_size_inches()[1] < 15


@pytest.mark.parametrize("count", [1, 2, 15])
def test_a_png_is_written(count):
    methods = [result(f"method {i}", 1.0 + i, 1.0 + i / 7) for i in range(count)]
    file = io.BytesIO()
    draw_comparison(comparison(*methods), file)
    file.seek(0)
    height, width, _ = image.imread(file, format="png").shape
    assert width == 1500
    assert height > 150 * (1.5 + 0.4 * count)


@given(strategies.text("ab=:,+()1", min_size=1, max_size=200))
def test_a_name_is_broken_into_lines(name):
    lines = wrap_name(name, 20).split("\n")
    assert "".join(lines) == name
    assert all(1 <= len(line) <= 20 for line in lines)


def test_a_name_is_broken_behind_its_signs():
    assert wrap_name("model:model=demo-draft,length=4", 24) == (
        "model:model=demo-draft,\nlength=4"
    )

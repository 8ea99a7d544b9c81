"""The second drafter where the first has nothing, row by row."""

import pytest

from tests.drafting.toy_methods import ids, run, steps

WHOLE = "model:model=target,layers=2,length=3"
SILENT = "(model:model=target,layers=2,length=2,confidence=0.9999999)"


@pytest.mark.slow
def test_a_silent_first_leaves_everything_to_the_second() -> None:
    second = run(WHOLE)
    both = run(f"fallback:first=(autoregressive:query_width=2),second=({WHOLE})")
    assert ids(both) == ids(second)
    assert steps(both) == steps(second)


@pytest.mark.slow
def test_a_first_that_always_speaks_leaves_the_second_alone() -> None:
    both = run(f"fallback:first=({WHOLE}),second=(model:model=target,layers=1)")
    assert [r.stats["draft_passes"]["target[:1]"] for r in both] == [0, 0]
    assert ids(both) == ids(run("autoregressive:query_width=5"))


@pytest.mark.slow
def test_trees_and_chains_mix_and_the_second_catches_up() -> None:
    tree = "(tree:model=target,layers=2,depth=3,nodes=6)"
    both = run(f"fallback:first={SILENT},second={tree}", temperature=1.0)
    assert ids(both) == ids(run("autoregressive:query_width=6", temperature=1.0))
    for result in both:
        # The tree's model is the target: whenever it was asked, its path was accepted.
        assert result.stats["tokens_per_pass"] > 2

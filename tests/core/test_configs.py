import dataclasses
import re
from typing import Protocol

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxllm.core.configs import apply_overrides
from jaxllm.core.errors import ConfigError


class Drafter(Protocol):
    pass


@dataclasses.dataclass(frozen=True)
class Lookup:
    ngram: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    rate: float = 1e-3
    decay: float | None = None
    boundaries: tuple[int, ...] = ()

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError(f"bad value: rate: {self.rate}, expected at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 10
    prompt: str = "once"
    optimizer: Optimizer = Optimizer()
    spare: Optimizer | None = Optimizer()
    missing: Optimizer | None = None
    drafter: Drafter = Lookup()


REGISTRIES = {Drafter: {"lookup": Lookup}}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Config()),
        (["steps=3"], Config(steps=3)),
        (["optimizer.rate=1e-2"], Config(optimizer=Optimizer(rate=0.01))),
        (
            ["optimizer.rate=2", "optimizer.boundaries=3+8", "steps=1"],
            Config(steps=1, optimizer=Optimizer(rate=2.0, boundaries=(3, 8))),
        ),
        (["steps=1", "steps=2"], Config(steps=2)),
        (["optimizer.decay=none"], Config()),
        (["prompt=a=b, (c)+d"], Config(prompt="a=b, (c)+d")),
        (["prompt="], Config(prompt="")),
        (["spare=none"], Config(spare=None)),
        (["drafter=(lookup:ngram=5)"], Config(drafter=Lookup(5))),
        (["drafter.ngram=6"], Config(drafter=Lookup(6))),
    ],
)
def test_overrides_replace_fields(overrides, expected):
    before = Config()
    assert apply_overrides(before, overrides, REGISTRIES) == expected
    assert before == Config()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "steps",
            "cannot read override: 'steps': no '=', expected field=value. "
            "Write --set a.b=value.",
        ),
        (
            "stps=3",
            "unknown field: Config: 'stps', expected one of drafter, missing, "
            "optimizer, prompt, spare, steps. Did you mean 'steps'?",
        ),
        (
            "optimizer.rat=3",
            "unknown field: optimizer: 'rat', expected one of boundaries, decay, "
            "rate. Did you mean 'rate'?",
        ),
        (
            "optimizer=3",
            "bad value: optimizer: '3', expected one of its fields: rate, decay, "
            "boundaries. Write optimizer.FIELD=value.",
        ),
        (
            "steps.more=3",
            "unknown field: 'steps.more': 'steps' is int, expected a section with "
            "fields. Set 'steps' itself.",
        ),
        (
            "missing.rate=3",
            "unknown field: 'missing.rate': 'missing' is NoneType, expected a section "
            "with fields. Set 'missing' itself.",
        ),
        (
            "optimizer.rate=fast",
            "bad value: optimizer.rate: 'fast', expected float. "
            "Write a value of that type.",
        ),
        (
            "optimizer.boundaries=3+",
            "cannot read value: '3+': the text ends, expected a value. "
            "The form is item+item.",
        ),
        ("optimizer.rate=-1", "bad value: rate: -1.0, expected at least 0."),
        (
            "drafter=lookup",
            "bad value: drafter: 'lookup', expected Drafter. "
            "Put a method in parentheses: (lookup).",
        ),
    ],
)
def test_a_mistake_is_named(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), [override], REGISTRIES)
    assert str(caught.value) == message


paths = st.lists(
    st.sampled_from(["steps", "optimizer", "rate", "boundaries", "prompt", "", "x"]),
    max_size=3,
).map(".".join)


@hypothesis.given(st.one_of(st.text(), st.builds("{}={}".format, paths, st.text())))
@hypothesis.settings(max_examples=300)
def test_any_override_is_applied_or_a_config_error(override):
    try:
        assert isinstance(apply_overrides(Config(), [override]), Config)
    except ConfigError as error:
        assert re.match(r"^[a-z].+: .+", str(error))
        assert "\n" not in str(error)

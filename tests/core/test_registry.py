import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxllm.core import registry
from jaxllm.core.errors import ConfigError
from jaxllm.core.registry import MethodSpec, build, parse_method, parse_value


class Drafter(Protocol):
    nodes: int


@dataclasses.dataclass(frozen=True)
class Plain:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    ngram: int = 3
    scale: float = 1.0
    tree: bool = False
    file: str = "none.txt"
    limit: int | None = None
    lengths: tuple[int, ...] = ()
    span: tuple[int, float] = (1, 2.0)
    order: Literal["first", "last"] = "first"
    depth: Annotated[int, "levels"] = 2
    either: int | str = 0
    many: Sequence[float] = ()
    anything: Any = None
    nodes: int = dataclasses.field(init=False, default=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    model: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Horizontal:
    drafters: tuple[Drafter, ...] = ()
    last: Drafter | None = None
    lengths: tuple[int, ...] = ()


METHODS = {"plain": Plain, "lookup": Lookup, "model": Model, "horizontal": Horizontal}
REGISTRIES = {Drafter: METHODS}


def test_the_example_of_the_design_is_read():
    text = "horizontal:drafters=(model:model=demo-draft)+(lookup),lengths=3+8"
    spec = parse_method(text)
    draft = MethodSpec("model", (("model", "demo-draft"),))
    assert spec == MethodSpec(
        "horizontal",
        (("drafters", (draft, MethodSpec("lookup"))), ("lengths", ("3", "8"))),
    )
    assert str(spec) == text
    assert build(spec, METHODS, REGISTRIES) == Horizontal(
        drafters=(Model(model="demo-draft"), Lookup()), lengths=(3, 8)
    )


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("lookup:ngram=5", "ngram", 5),
        ("lookup:ngram=-5", "ngram", -5),
        ("lookup:scale=1e+5", "scale", 1e5),
        ("lookup:scale=1e-5", "scale", 1e-5),
        ("lookup:scale=3", "scale", 3.0),
        ("lookup:tree=True", "tree", True),
        ("lookup:tree=false", "tree", False),
        ("lookup:file=007", "file", "007"),
        ("lookup:file=3.5b", "file", "3.5b"),
        ("lookup:file=hf:org/name=x y", "file", "hf:org/name=x y"),
        ('lookup:file="a,b+(c)"', "file", "a,b+(c)"),
        ("lookup:limit=None", "limit", None),
        ("lookup:limit=4", "limit", 4),
        ("lookup:lengths=3", "lengths", (3,)),
        ("lookup:lengths=3 + 8 ", "lengths", (3, 8)),
        ("lookup:span=3+1e+2", "span", (3, 100.0)),
        ("lookup:order=last", "order", "last"),
        ("lookup:depth=7", "depth", 7),
        ("lookup:either=7", "either", 7),
        ("lookup:either=x7", "either", "x7"),
        ("lookup:many=1+2.5", "many", (1.0, 2.5)),
        ("lookup:anything=none", "anything", None),
        ("lookup:anything=2.5", "anything", 2.5),
        ("lookup:anything=word", "anything", "word"),
        (" lookup : ngram = 5 , tree = true ", "ngram", 5),
        ("horizontal:drafters=(plain)", "drafters", (Plain(),)),
        ("horizontal:last=(lookup:ngram=9)", "last", Lookup(ngram=9)),
        ("horizontal:last=none", "last", None),
    ],
)
def test_values_take_the_declared_type(text, field, value):
    found = getattr(build(text, METHODS, REGISTRIES), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "cannot read method: '': the text ends, expected the name of a method. "
            "The form is name:field=value,field=value.",
        ),
        (
            "lookup:ngram",
            "cannot read method: 'lookup:ngram': the text ends, expected '=' after "
            "'ngram'. The form is name:field=value,field=value.",
        ),
        (
            "lookup:ngram=",
            "cannot read method: 'lookup:ngram=': the text ends, expected a value. "
            "The form is name:field=value,field=value.",
        ),
        (
            "horizontal:last=(plain",
            "cannot read method: 'horizontal:last=(plain': the text ends, expected "
            "')'. The form is name:field=value,field=value.",
        ),
        (
            "lookup:ngram=3)",
            "cannot read method: 'lookup:ngram=3)': ')' at character 15, expected the "
            "end or one of ',', '+', ')' in its place. "
            "The form is name:field=value,field=value.",
        ),
        (
            "lookup:ngram=3,ngram=4",
            "cannot read method: 'ngram': is given twice, expected each field once. "
            "The form is name:field=value,field=value.",
        ),
        (
            'lookup:file="a',
            "cannot read method: 'lookup:file=\"a': '\"a' at character 13, expected a "
            "closing quote. The form is name:field=value,field=value.",
        ),
        (
            "lokup",
            "unknown method: 'lokup', expected one of horizontal, lookup, model, "
            "plain. Did you mean 'lookup'?",
        ),
        (
            "zzz",
            "unknown method: 'zzz', expected one of horizontal, lookup, model, plain. "
            "Choose one of these.",
        ),
        (
            "horizontal:lengts=3",
            "unknown field: horizontal: 'lengts', expected one of drafters, last, "
            "lengths. Did you mean 'lengths'?",
        ),
        (
            "lookup:nodes=3",
            "unknown field: lookup: 'nodes', expected one of anything, depth, either, "
            "file, lengths, limit, many, ngram, order, scale, span, tree. "
            "Choose one of these.",
        ),
        (
            "plain:x=3",
            "unknown field: plain: 'x', expected none. Leave this field out.",
        ),
        (
            "lookup:ngram=three",
            "bad value: lookup.ngram: 'three', expected int. "
            "Write a value of that type.",
        ),
        (
            "lookup:limit=x",
            "bad value: lookup.limit: 'x', expected int or None. "
            "Write a value of that type.",
        ),
        (
            "lookup:ngram=1+2",
            "bad value: lookup.ngram: '1+2', expected int. "
            "Give one value, without '+'.",
        ),
        (
            "lookup:ngram=(plain)",
            "bad value: lookup.ngram: '(plain)', expected int. "
            "Give a plain value, without parentheses.",
        ),
        (
            "lookup:span=1",
            "bad value: lookup.span: 1 items, expected 2. Join them by '+'.",
        ),
        (
            "lookup:order=frist",
            "unknown value: lookup.order: 'frist', expected one of first, last. "
            "Did you mean 'first'?",
        ),
        (
            "horizontal:drafters=plain",
            "bad value: horizontal.drafters[0]: 'plain', expected Drafter. "
            "Put a method in parentheses: (plain).",
        ),
        (
            "horizontal:last=(lokup)",
            "unknown method: 'lokup', expected one of horizontal, lookup, model, "
            "plain. Did you mean 'lookup'?",
        ),
        (
            "model",
            "incomplete method: 'model': no value for model, expected one. "
            "Write 'model:model=...'.",
        ),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(ConfigError) as caught:
        build(text, METHODS, REGISTRIES)
    assert str(caught.value) == message
    assert re.match(r"^[a-z].+: .+", message)


def test_methods_inside_methods_have_an_end():
    text = "horizontal:last=(" * 5000
    with pytest.raises(ConfigError, match="at most 32 methods inside each other"):
        parse_method(text)
    deep = "horizontal:last=(" * 30 + "plain" + ")" * 30
    assert str(parse_method(deep)) == deep
    beside = "horizontal:drafters=" + "+".join(["(plain)"] * 100)
    assert str(parse_method(beside)) == beside


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", ()),
        ("two words", ()),
        ("plain", (("1", "x"),)),
        ("plain", (("a", "1"), ("a", "2"))),
        ("plain", (("a", ("1",)),)),
    ],
)
def test_a_spec_that_no_string_can_say_is_refused(name, options):
    with pytest.raises(ConfigError, match="cannot read method"):
        MethodSpec(name, options)


@pytest.mark.parametrize("limit", ["9" * 5000, "nan", "1.0", "0x10"])
def test_an_int_is_an_int(limit):
    with pytest.raises(ConfigError) as caught:
        build(f"lookup:ngram={limit}", METHODS)
    assert len(str(caught.value)) < 300


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]*", fullmatch=True)
fields = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)
numbers = st.one_of(st.integers(), st.floats(allow_nan=False)).map(str)
scalars = st.one_of(st.text(), numbers, st.text(alphabet='e1+,()=:" \\'))


def specs_of(inner):
    items = st.one_of(scalars, inner)
    values = st.one_of(items, st.lists(items, min_size=2, max_size=3).map(tuple))
    options = st.dictionaries(fields, values, max_size=3)
    return st.builds(
        lambda name, options: MethodSpec(name, tuple(options.items())), names, options
    )


specs = st.recursive(names.map(MethodSpec), specs_of, max_leaves=6)
near_grammar = st.text(alphabet="ab1.e-+,:=() \"\\'\n\x00é", max_size=40)


@hypothesis.given(specs)
@hypothesis.example(MethodSpec("plain", (("a", " 1 "), ("b", ""), ("c", "1e+5"))))
@hypothesis.example(MethodSpec("plain", (("a", '"'), ("b", "1+5"), ("c", "(x)"))))
def test_what_a_spec_writes_reads_back_as_itself(spec):
    again = parse_method(str(spec))
    assert again == spec
    assert str(again) == str(spec)


@hypothesis.given(st.one_of(st.text(), near_grammar))
@hypothesis.settings(max_examples=500)
def test_any_text_is_a_spec_or_a_config_error(text):
    for parse, kind in ((parse_method, MethodSpec), (parse_value, object)):
        try:
            result = parse(text)
        except ConfigError as error:
            assert re.match(r"^[a-z].+: .+", str(error))
            assert "\n" not in str(error)
            continue
        assert isinstance(result, kind)
        if parse is parse_method:
            assert parse_method(str(result)) == result


@hypothesis.given(
    st.sampled_from(sorted(registry.field_types(Lookup))), st.one_of(scalars, names)
)
@hypothesis.settings(max_examples=500)
def test_any_value_is_taken_or_a_config_error(field, text):
    spec = MethodSpec("lookup", ((field, text),))
    try:
        assert isinstance(build(spec, METHODS), Lookup)
    except ConfigError as error:
        assert re.match(r"^[a-z].+: .+", str(error))

import datetime
import json
import logging

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxllm.checkpoints import load_tokenizer
from jaxllm.core.errors import CheckpointError, UserError

BRACKETS = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set head = messages[0]['content'] | trim + '\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set head = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if turn['role'] == 'user' %}
        {{- '[ASK] ' + (head if loop.first else '') + turn['content'] + ' [/ASK]' }}
    {%- else %}
        {%- generation %}{{- ' ' + turn['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

HEADERS = """\
{% set space = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% set space.count = space.count + 1 %}
<|{{ message.role }}|>
  {{ message['content'] }} {{ message | tojson }}{{ message.items() | list | length }}
<|end|>
{% endfor %}
{{ space.count }} {{ strftime_now('%Y-%m') }} {{ tools is none }} {{ '<&é>' | tojson }}
{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": " Be <kind> & brief. "},
        {"role": "user", "content": "Hi\nthere", "name": None},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "日本語 'quoted' \"twice\""},
    ],
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "x", "score": 1.5},
    ],
]


@pytest.fixture
def directory(tmp_path):
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    write_settings(tmp_path)
    return tmp_path


def write_settings(directory, **fields):
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(settings | fields))


@pytest.mark.parametrize("template", [BRACKETS, HEADERS], ids=["brackets", "headers"])
@pytest.mark.parametrize("place", ["settings", "file", "list"])
def test_a_template_renders_as_in_transformers(directory, template, place):
    if place == "file":
        (directory / "chat_template.jinja").write_text(template)
        # The file wins over the settings.
        write_settings(directory, chat_template="wrong")
    elif place == "list":
        named = [
            {"name": "tool_use", "template": "wrong"},
            {"name": "default", "template": template},
        ]
        write_settings(directory, chat_template=named)
    else:
        write_settings(directory, chat_template=template)
    logging.disable(logging.WARNING)  # it says that torch is absent
    try:
        from transformers import AutoTokenizer
    finally:
        logging.disable(logging.NOTSET)
    ours = load_tokenizer(directory)
    theirs = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    if place == "list":
        theirs.chat_template = template  # this version reads no lists
    month = datetime.datetime.now().strftime("%Y-%m")
    for chat in CHATS:
        for prompt in (True, False):
            text = ours.apply_chat_template(chat, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(
                chat, add_generation_prompt=prompt, tokenize=False
            )
            assert template == BRACKETS or month in text
    assert "[ASK] Hi [/ASK]" in text or template == HEADERS or len(text) > 10


def test_a_rendered_chat(directory):
    write_settings(directory, chat_template=BRACKETS)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.apply_chat_template(CHATS[1]) == (
        "<s>[ASK] Be <kind> & brief.\nHi\nthere [/ASK] Hello</s>"
        "[ASK] 日本語 'quoted' \"twice\" [/ASK]"
    )


def test_no_template(directory):
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(directory).apply_chat_template(CHATS[0])
    assert str(caught.value) == (
        f"cannot apply chat template: {directory / 'tokenizer_config.json'}: has no "
        "'chat_template' and there is no chat_template.jinja beside it, expected one "
        "of them. Use a chat checkpoint or a plain prompt."
    )


def test_a_template_that_refuses_the_messages(directory):
    write_settings(directory, chat_template=BRACKETS)
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory).apply_chat_template(CHATS[0] * 2)
    assert str(caught.value) == (
        f"cannot apply chat template: {directory}: TemplateError: user and assistant "
        "must take turns, expected messages that the template takes. Correct the order "
        "or the fields of the messages."
    )


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (
            [],
            "the list is empty, expected at least one message. Add one.",
        ),
        (
            [{"content": {1, 2}}],
            "Object of type set is not JSON serializable, expected a list of objects of"
            " JSON data, such as {'role': 'user', 'content': 'Hi'}. Correct them.",
        ),
        (
            ["Hi"],
            "dictionary update sequence element #0 has length 1; 2 is required, "
            "expected a list of objects of JSON data, such as {'role': 'user', "
            "'content': 'Hi'}. Correct them.",
        ),
    ],
)
def test_messages_that_are_none(directory, messages, fault):
    write_settings(directory, chat_template=HEADERS)
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory).apply_chat_template(messages)
    assert str(caught.value) == f"cannot apply chat template: messages: {fault}"


def test_a_template_with_a_syntax_error_names_the_line(directory):
    write_settings(directory, chat_template="one\n{% if %}")
    with pytest.raises(CheckpointError, match=r": line 2: .*, expected a Jinja templ"):
        load_tokenizer(directory).apply_chat_template(CHATS[0])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('marker') }}",
        "{{ messages[0].__class__.__init__.__globals__ }}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
        "{% include 'tokenizer.json' %}",
    ],
)
def test_a_template_cannot_reach_out(directory, attack, monkeypatch):
    monkeypatch.chdir(directory)
    write_settings(directory, chat_template=attack)
    before = sorted(directory.iterdir())
    with pytest.raises(UserError):
        load_tokenizer(directory).apply_chat_template(CHATS[0])
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize("template", [3, {"default": "x"}])
def test_a_template_that_is_no_text(directory, template):
    write_settings(directory, chat_template=template)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(directory)
    assert str(caught.value) == (
        f"cannot load tokenizer: {directory / 'tokenizer_config.json'}: "
        f"'chat_template' is {template!r}, expected text or a list of named templates."
        " Correct the file."
    )


def test_a_template_file_that_is_not_text(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(
        CheckpointError, match=r"jinja: .*utf-8.*, expected text in UTF"
    ):
        load_tokenizer(directory)

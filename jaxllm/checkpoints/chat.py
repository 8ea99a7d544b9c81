"""Chat templates: messages to the text that a model was trained to see.

Templates come with checkpoints, so they run in a sandbox and see plain JSON data only.
"""

import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.checkpoints.files import first_line, quote
from jaxllm.core.errors import CheckpointError, UserError

__all__ = ["read_chat_template", "render_chat"]

TEMPLATE_NAME = "chat_template.jinja"
SETTINGS_NAME = "tokenizer_config.json"

_APPLY = "cannot apply chat template"


def read_chat_template(
    directory: str | os.PathLike[str], settings: Mapping[str, Any]
) -> str | None:
    """Finds the chat template of a checkpoint.

    Args:
        directory: a directory in Hugging Face layout.
        settings: the content of its `tokenizer_config.json`.

    Returns:
        The text of `chat_template.jinja`, else the `chat_template` of the settings (of
        several, the one named `default`), else None.

    Raises:
        CheckpointError: a template is there and is not text.
    """
    path = Path(directory) / TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise CheckpointError(
                f"cannot load tokenizer: {path}: {cause}, expected text in UTF-8. "
                "Download it again."
            ) from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {
            item.get("name"): item.get("template")
            for item in template
            if isinstance(item, dict)
        }
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"cannot load tokenizer: {Path(directory) / SETTINGS_NAME}: 'chat_template'"
            f" is {quote(template)}, expected text or a list of named templates. "
            "Correct the file."
        )
    return template


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    where: str,
) -> str:
    """Renders messages as transformers does, in a sandbox.

    Args:
        template: the text of a Jinja template.
        messages: dicts with `role` and `content`, of JSON data only; fields that are
            None are left out.
        variables: what the template sees beside `messages`: `add_generation_prompt`,
            `bos_token` and the like.
        where: the file of the template, for messages.

    Returns:
        The text, with its special tokens written out.

    Raises:
        CheckpointError: the template is not valid Jinja.
        UserError: the messages are not JSON data, or the template refuses them.
    """
    import jinja2

    try:
        plain = json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as cause:
        raise UserError(
            f"{_APPLY}: messages: {first_line(cause)}, expected a list of objects of "
            "JSON data, such as {'role': 'user', 'content': 'Hi'}. Correct them."
        ) from None
    if not plain:
        raise UserError(
            f"{_APPLY}: messages: the list is empty, expected at least one message. "
            "Add one."
        )
    try:
        compiled = _compile(template)
    except jinja2.TemplateSyntaxError as cause:
        raise CheckpointError(
            f"{_APPLY}: {where}: line {cause.lineno}: {first_line(cause)}, expected a "
            "Jinja template. Correct the file or download it again."
        ) from None
    chat = [
        {key: value for key, value in message.items() if value is not None}
        for message in plain
    ]
    try:
        return compiled.render(
            messages=chat, **{"tools": None, "documents": None, **variables}
        )
    except Exception as cause:
        # A template is a program of the checkpoint's: any error can come out of it.
        raise UserError(
            f"{_APPLY}: {where}: {type(cause).__name__}: {first_line(cause)}, expected "
            "messages that the template takes. Correct the order or the fields of the "
            "messages."
        ) from None


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Lets `{% generation %}`, which marks text to train on, through unchanged."""

        tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 wants

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # jinja2's own filter writes HTML entities.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)

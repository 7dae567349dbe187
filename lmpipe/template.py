"""The prompt template: one renderer for inference and for fine-tuning rows, and the parser of completions.

A prompt is a chat: a system message (instruction and reply form), a user and an assistant message per
demonstration, and a user message with the inputs. A field is a line ``name: value``; it goes on until the next
line that begins with a field's name. A value line that would itself look like the beginning of a field is written
with a leading backslash, so every text has one reading and ``parse(completion(outputs)) == outputs``.

Knows nothing of tokens or engines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, final, get_args

from pydantic import TypeAdapter

from lmpipe.errors import ParseError
from lmpipe.lm import Message
from lmpipe.signature import Field, Signature
from lmpipe.state import PromptState
from lmpipe.values import is_choice, is_one_line, parse_value, render_input, render_output


@final
class Template:
    """Renders chats and reads completions; stateless, so one object serves every thread."""

    def messages(self, signature: Signature, prompt: PromptState, inputs: Mapping[str, Any]) -> tuple[Message, ...]:
        """The conversation up to the completion: what the LM reads, and the context of a fine-tuning row.

        Args:
            signature: Decides the fields and the reply form.
            prompt: Decides the instruction and the demonstrations.
            inputs: A value for each input field.
        """
        return (*_opening(signature, prompt), Message("user", self.question(signature, inputs)))

    def question(self, signature: Signature, inputs: Mapping[str, Any]) -> str:
        """The user message that gives these inputs; fields that they lack are left out."""
        return "\n".join(
            f"{field.name}: {_quote(signature, render_input(inputs[field.name]))}"
            for field in signature.inputs
            if field.name in inputs
        )

    def completion(self, signature: Signature, outputs: Mapping[str, Any]) -> str:
        """The assistant message that gives these outputs; absent or empty optional fields are left out."""
        return "\n".join(
            f"{field.name}: {_quote(signature, render_output(field, outputs[field.name]))}"
            for field in signature.outputs
            if not (field.optional and outputs.get(field.name) in (None, ""))
        )

    def parse(self, signature: Signature, text: str) -> dict[str, Any]:
        """Reads the output fields of a completion.

        Field names are found whatever their case and Markdown around them, in any order; the first of a name
        counts. Text before the first field belongs to the first output if that has no line of its own. Fields with
        a single-line type (choices, numbers, truth values) are read from the first line that holds anything.

        Returns:
            A value of the declared type for every output field.

        Raises:
            ParseError: If a field is absent or cannot be read; it names the field and shows the text.
        """
        sections = _sections(signature, text)
        values: dict[str, Any] = {}
        for field in signature.outputs:
            section = sections.get(field.name)
            if section is None and not field.optional:
                raise ParseError(field.name, "is absent", text)
            values[field.name] = "" if section is None else _value(field, section, text)
        return values


@lru_cache(maxsize=4096)
def _opening(signature: Signature, prompt: PromptState) -> tuple[Message, ...]:
    """System message and demonstrations, which the calls of a module under one state share."""
    template = Template()
    messages = [Message("system", _system(signature, prompt.instructions))]
    for demo in prompt.demos:
        messages.append(Message("user", template.question(signature, demo.inputs)))
        messages.append(Message("assistant", template.completion(signature, demo.outputs)))
    return tuple(messages)


def _system(signature: Signature, instructions: str) -> str:
    described = [f"{field.name}: {field.desc}" for field in signature.inputs if field.desc]
    parts = [instructions]
    if described:
        parts.append("\n".join(["You are given:", *described]))
    parts.append("\n".join(["Reply with these lines:", *(f"{f.name}: {_hint(f)}".rstrip() for f in signature.outputs)]))
    return "\n\n".join(parts)


def _hint(field: Field) -> str:
    if is_choice(field):
        kind = "one of: " + ", ".join(map(str, get_args(field.type)))
    elif field.type is str:
        return field.desc  # nothing in its place: a small LM would copy what stands there
    elif field.type in (int, float, bool):
        kind = {int: "a whole number", float: "a number", bool: "true or false"}[field.type]
    else:
        kind = f"JSON of the schema {TypeAdapter(field.type).json_schema()}"
    return f"{field.desc}, {kind}" if field.desc else kind


@lru_cache(maxsize=1024)
def _header(signature: Signature) -> re.Pattern[str]:
    """Matches the beginning of a line that opens a field; group 1 holds the backslashes that quote it."""
    names = sorted((field.name for field in signature.inputs + signature.outputs), key=len, reverse=True)
    words = "|".join(re.escape(name).replace("_", "[_ ]") for name in names)
    pattern = rf"^(\\*)[ \t>#-]*(\*\*)?({words})(?:\*\*)?[ \t]*:(?(2)(?:\*\*)?)[ \t]*"
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE | re.ASCII)


@lru_cache(maxsize=1024)
def _canonical(signature: Signature) -> dict[str, str]:
    """Field name in lower case → field name."""
    return {field.name.lower(): field.name for field in signature.inputs + signature.outputs}


def _quote(signature: Signature, text: str) -> str:
    """Puts a backslash before each line that looks like the beginning of a field."""
    if ":" not in text:
        return text
    return _header(signature).sub(lambda match: "\\" + match.group(0), text)


def _sections(signature: Signature, text: str) -> dict[str, str]:
    headers = [match for match in _header(signature).finditer(text) if not match.group(1)]
    canonical = _canonical(signature)
    sections: dict[str, str] = {}
    for number, header in enumerate(headers):
        end = headers[number + 1].start() if number + 1 < len(headers) else len(text)
        name = canonical[header.group(3).lower().replace(" ", "_")]
        sections.setdefault(name, _unquote(signature, text[header.end() : end]))
    before = text[: headers[0].start()] if headers else text
    first = signature.outputs[0]
    if before.strip() and first.name not in sections and (headers or len(signature.outputs) == 1):
        sections[first.name] = _unquote(signature, before)
    return sections


def _unquote(signature: Signature, text: str) -> str:
    if "\\" not in text:
        return text.strip()
    return _header(signature).sub(lambda match: match.group(0)[1:] if match.group(1) else match.group(0), text).strip()


def _value(field: Field, section: str, text: str) -> Any:
    value = section.partition("\n")[0] if is_one_line(field) else section
    if not value and not field.optional and field.type is not str:
        raise ParseError(field.name, "is empty", text)
    try:
        return parse_value(field, value)
    except ParseError as error:
        raise ParseError(error.field, error.problem, text) from None

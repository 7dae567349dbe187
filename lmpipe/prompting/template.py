"""The prompt template: one renderer for inference and for fine-tuning rows, and the parser of completions.

A prompt is a chat: a system message (instruction and reply form), a user and an assistant message per
demonstration, and a user message with the inputs. A field is a line ``name: value``; it goes on until the next
line that begins with a field's name. In a completion, what would itself look like the beginning of a field or like the
tag of a thought is written with a backslash before it, so every text has one reading and
``parse(completion(outputs)) == outputs``.

Knows nothing of tokens or engines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, final

from lmpipe.errors import ParseError
from lmpipe.lm import Message
from lmpipe.prompting.choices import choices_of
from lmpipe.prompting.signature import Field, Signature, schema_of
from lmpipe.prompting.thoughts import quote_tags, split_thoughts, unquote_tags
from lmpipe.prompting.values import parse_value, render_input, render_output, strip_fence
from lmpipe.state import PromptState
from lmpipe.text.cleaning import clean_text

_OPENING = re.compile(r"[ \t>]*(`{3,}|~{3,})[^`~]*")


@final
class Template:
    """Renders chats and reads completions; stateless, so one object serves every thread."""

    def messages(self, signature: Signature, prompt: PromptState, inputs: Mapping[str, Any]) -> tuple[Message, ...]:
        """The conversation up to the completion: what the LM reads, and the context of a fine-tuning row.

        It is text throughout: characters that are no text, which an object among the inputs may render, are replaced.

        Args:
            signature: Decides the fields and the reply form.
            prompt: Decides the instruction and the demonstrations.
            inputs: A value for each input field.
        """
        return (*_opening(signature, prompt), Message("user", clean_text(self.user_message(signature, inputs))))

    def user_message(self, signature: Signature, inputs: Mapping[str, Any]) -> str:
        """The user message that gives these inputs; fields that they lack are left out."""
        return "\n".join(
            f"{field.name}: {_quote(signature, render_input(inputs[field.name]))}"
            for field in signature.inputs
            if field.name in inputs
        )

    def completion(self, signature: Signature, outputs: Mapping[str, Any]) -> str:
        """The assistant message that gives these outputs; absent or empty optional fields are left out."""
        return "\n".join(
            f"{field.name}: {quote_tags(_quote(signature, render_output(field, outputs[field.name])))}"
            for field in signature.outputs
            if not (field.optional and outputs.get(field.name) in (None, ""))
        )

    def parse(self, signature: Signature, text: str) -> dict[str, Any]:
        """Reads the output fields of a completion.

        Thoughts are left out (see `lmpipe.prompting.thoughts.split_thoughts`), and so is a code fence around the
        fields, with the text outside of it. Field names are found in any order, whatever their case and the Markdown
        around them; the first of a name counts. Text before the first field belongs to the first output if that has no
        line of its own. Fields with a single-line type (choices, numbers, truth values) are read from the first line
        that holds anything.

        Returns:
            A value of the declared type for every output field.

        Raises:
            ParseError: If a field is absent or cannot be read, or if the completion ends within a thought; it names the
                field and shows the text.
        """
        reply = split_thoughts(text, _header(signature))
        if reply.unfinished:
            wanted = next((field for field in signature.outputs if not field.optional), signature.outputs[0])
            raise ParseError(wanted.name, "is absent: the completion was cut off while the LM was thinking", text)
        sections = _sections(signature, reply.said)
        values: dict[str, Any] = {}
        for field in signature.outputs:
            section = sections.get(field.name)
            if section is None and not field.optional:
                raise ParseError(field.name, "is absent", text)
            values[field.name] = _value(field, section or "", text)
        return values


@lru_cache(maxsize=4096)
def _opening(signature: Signature, prompt: PromptState) -> tuple[Message, ...]:
    """System message and demonstrations, which the calls of a module under one state share."""
    template = Template()
    messages = [Message("system", clean_text(_system(signature, prompt.instructions)))]
    for demo in prompt.demos:
        messages.append(Message("user", clean_text(template.user_message(signature, demo.inputs))))
        messages.append(Message("assistant", clean_text(template.completion(signature, demo.outputs))))
    return tuple(messages)


def _system(signature: Signature, instructions: str) -> str:
    described = [f"{field.name}: {field.desc}" for field in signature.inputs if field.desc]
    parts = [instructions]
    if described:
        parts.append("\n".join(["You are given:", *described]))
    parts.append("\n".join(["Reply with these lines:", *(f"{f.name}: {_hint(f)}".rstrip() for f in signature.outputs)]))
    return "\n\n".join(parts)


def _hint(field: Field) -> str:
    known = choices_of(field.type)
    if known is not None:
        kind = "one of: " + ", ".join(choice.text for choice in known.choices)
    elif field.type is str:
        return field.desc  # nothing in its place: a small LM would copy what stands there
    elif field.type in (int, float, bool):
        kind = {int: "a whole number", float: "a number", bool: "true or false"}[field.type]
    else:
        kind = f"JSON of the schema {schema_of(field.type)}"
    return f"{field.desc}, {kind}" if field.desc else kind


@lru_cache(maxsize=1024)
def _header(signature: Signature) -> re.Pattern[str]:
    """Matches the beginning of a line that opens a field; group 1 holds the backslashes that quote it."""
    names = sorted((field.name for field in signature.inputs + signature.outputs), key=len, reverse=True)
    words = "|".join(re.escape(name).replace("_", "[_ ]") for name in names)
    bullet = r"(?:[*•][ \t]+|\d{1,3}[.)][ \t]+)?"
    name = rf"([*_`]{{1,3}})?({words})[*_`]{{0,3}}[ \t\xa0]*[:：](?(2)[*_`]{{0,3}})[ \t\xa0]*"
    pattern = rf"^(\\*)[ \t\xa0\u200b\ufeff>#-]*{bullet}{name}"
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE | re.ASCII)


@lru_cache(maxsize=1024)
def _canonical(signature: Signature) -> dict[str, str]:
    """Field name in lower case → field name."""
    return {field.name.lower(): field.name for field in signature.inputs + signature.outputs}


def _quote(signature: Signature, text: str) -> str:
    """Puts a backslash before each line that looks like the beginning of a field."""
    if ":" not in text and "：" not in text:
        return text
    return _header(signature).sub(lambda match: "\\" + match.group(0), text)


def _sections(signature: Signature, text: str) -> dict[str, str]:
    """Field name → its text."""
    text = _without_fence(signature, text)
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


def _without_fence(signature: Signature, text: str) -> str:
    """The text without a code fence around the fields.

    The fence is opened by the line before the first field. It is closed by the last line of the text, or else by the
    first line that closes it; what comes after is left out up to the next field.
    """
    if "```" not in text and "~~~" not in text:
        return text
    header = _header(signature)
    first = header.search(text)
    if first is None:
        return strip_fence(text)
    before, _, opening = text[: first.start()].rstrip().rpartition("\n")
    mark = _OPENING.fullmatch(opening)
    if mark is None:
        return text
    fields, rest = _until_fence(text[first.start() :].rstrip(), mark[1])
    further = header.search(rest)
    return "\n".join([before, fields, rest[further.start() :] if further else ""])


def _until_fence(text: str, mark: str) -> tuple[str, str]:
    """The text before and after the line that closes a fence."""
    lines = text.split("\n")
    inner = 0  # how many fences of a language are open within
    closing = []
    for number, line in enumerate(map(str.strip, lines)):
        if line.startswith(mark):
            if line.strip(mark[0]):
                inner += 1
            elif inner:
                inner -= 1
            else:
                closing.append(number)
    if not closing:
        return text.removesuffix(mark), ""
    end = closing[-1] if closing[-1] == len(lines) - 1 else closing[0]
    return "\n".join(lines[:end]), "\n".join(lines[end + 1 :])


def _unquote(signature: Signature, text: str) -> str:
    if "\\" not in text:
        return text.strip()
    text = _header(signature).sub(lambda match: match.group(0)[1:] if match.group(1) else match.group(0), text)
    return unquote_tags(text).strip()


def _value(field: Field, section: str, text: str) -> Any:
    if not section and field.optional:
        return ""
    try:
        return parse_value(field, section)
    except ParseError as error:
        raise ParseError(error.field, error.problem, text) from None

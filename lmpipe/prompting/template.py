"""The prompt template: one renderer for inference and for fine-tuning rows, and the parser of completions.

A prompt is a chat: a system message (instructions and the form of the reply), a user and an assistant message for each
demonstration, and a user message with the inputs. A field begins with a line ``name: value`` and ends before the next
line that begins with the name of a field. Text in a value that looks like the beginning of a field or like a tag of a
thought is written with a backslash before it, so that every text is unambiguous and
``parse(completion(outputs)) == outputs``.

Knows nothing about tokens or engines.
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
    """Renders chats and parses completions; it has no state, so all threads can share one object."""

    def messages(self, signature: Signature, prompt: PromptState, inputs: Mapping[str, Any]) -> tuple[Message, ...]:
        """Returns the messages before the completion: the prompt of an LM call and the context of a fine-tuning row.

        Characters that are not valid text, which the rendering of an input may contain, are replaced.

        Args:
            signature: Signature of the module.
            prompt: Prompt with instructions and demonstrations.
            inputs: Value of each input field.
        """
        return (*_opening(signature, prompt), Message("user", clean_text(self.user_message(signature, inputs))))

    def user_message(self, signature: Signature, inputs: Mapping[str, Any]) -> str:
        """Returns the user message for some inputs; missing fields are left out."""
        return "\n".join(
            [
                f"{field.name}: {_quote(signature, render_input(inputs[field.name]))}"
                for field in signature.inputs
                if field.name in inputs
            ]
        )

    def completion(self, signature: Signature, outputs: Mapping[str, Any]) -> str:
        """Returns the assistant message for some outputs; missing or empty optional fields are left out."""
        return "\n".join(
            f"{field.name}: {quote_tags(_quote(signature, render_output(field, outputs[field.name])))}"
            for field in signature.outputs
            if not (field.optional and outputs.get(field.name) in (None, ""))
        )

    def parse(self, signature: Signature, text: str) -> dict[str, Any]:
        """Parses the output fields of a completion.

        Thoughts are removed (see `lmpipe.prompting.thoughts.split_thoughts`); so are a code fence around the fields and
        the text outside of it. Fields may be in any order, their names in upper or lower case and with Markdown around
        them; of repeated fields, the first counts. Text before the first field is the value of the first output if that
        has no line of its own. Fields with a single-line type (choices, numbers, booleans) are parsed from the first
        line that is not empty.

        Returns:
            Name of each output field → value of the declared type.

        Raises:
            ParseError: If a field is missing or cannot be parsed, or if the completion ends within a thought; the
                message names the field and shows the text.
        """
        header = _header(signature)
        split = split_thoughts(text, header)
        if split.unfinished:
            missing = next((field for field in signature.outputs if not field.optional), signature.outputs[0])
            raise ParseError(missing.name, "is absent: the completion was cut off while the LM was thinking", text)
        sections = _sections(signature, header, split.answer)
        values: dict[str, Any] = {}
        for field in signature.outputs:
            section = sections.get(field.name)
            if section is None and not field.optional:
                raise ParseError(field.name, "is absent", text)
            values[field.name] = _value(field, section or "", text)
        return values


@lru_cache(maxsize=4096)
def _opening(signature: Signature, prompt: PromptState) -> tuple[Message, ...]:
    """The system message and the demonstrations; all calls of a module in one state share them."""
    template = Template()
    messages = [Message("system", clean_text(_system(signature, prompt.instructions)))]
    for demo in prompt.demos:
        messages.append(Message("user", clean_text(template.user_message(signature, demo.inputs))))
        messages.append(Message("assistant", clean_text(template.completion(signature, demo.outputs))))
    return tuple(messages)


def _system(signature: Signature, instructions: str) -> str:
    descriptions = [f"{field.name}: {field.desc}" for field in signature.inputs if field.desc]
    parts = [instructions]
    if descriptions:
        parts.append("\n".join(["You are given:", *descriptions]))
    parts.append("\n".join(["Reply with these lines:", *(f"{f.name}: {_hint(f)}".rstrip() for f in signature.outputs)]))
    return "\n\n".join(parts)


def _hint(field: Field) -> str:
    choices = choices_of(field.type)
    if choices is not None:
        kind = "one of: " + ", ".join(choice.text for choice in choices.choices)
    elif field.type is str:
        return field.desc  # without a description, no hint: a small LM would copy a placeholder
    elif field.type in (int, float, bool):
        kind = {int: "a whole number", float: "a number", bool: "true or false"}[field.type]
    else:
        kind = f"JSON of the schema {schema_of(field.type)}"
    return f"{field.desc}, {kind}" if field.desc else kind


@lru_cache(maxsize=1024)
def _header(signature: Signature) -> re.Pattern[str]:
    """The pattern of the beginning of a line that opens a field; group 1 contains the backslashes that quote it."""
    names = sorted((field.name for field in signature.inputs + signature.outputs), key=len, reverse=True)
    words = "|".join(re.escape(name).replace("_", "[_ ]") for name in names)
    bullet = r"(?:[*•][ \t]+|\d{1,3}[.)][ \t]+)?"
    name = rf"([*_`]{{1,3}})?({words})[*_`]{{0,3}}[ \t\xa0]*[:：](?(2)[*_`]{{0,3}})[ \t\xa0]*"
    pattern = rf"^(\\*)[ \t\xa0\u200b\ufeff>#-]*{bullet}{name}"
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE | re.ASCII)


@lru_cache(maxsize=1024)
def _canonical(signature: Signature) -> dict[str, str]:
    """Lower-case field name → field name."""
    return {field.name.lower(): field.name for field in signature.inputs + signature.outputs}


def _quote(signature: Signature, text: str) -> str:
    """Puts a backslash before each line that looks like the beginning of a field."""
    if ":" not in text and "：" not in text:
        return text
    return _header(signature).sub(lambda match: "\\" + match.group(0), text)


def _sections(signature: Signature, header: re.Pattern[str], text: str) -> dict[str, str]:
    """Field name → text of the field."""
    text = _without_fence(header, text)
    headers = _find_headers(header, text)
    canonical = _canonical(signature)
    sections: dict[str, str] = {}
    end = len(text)
    for match in reversed(headers):
        name = canonical[match[3].lower().replace(" ", "_")]
        sections[name] = _unquote(header, text[match.end() : end])  # of repeated fields, the first counts
        end = match.start()
    before, first = text[:end], signature.outputs[0]
    if before.strip() and first.name not in sections and (headers or len(signature.outputs) == 1):
        sections[first.name] = _unquote(header, before)
    return sections


def _find_headers(header: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The headers of a text, in order, without quoted ones.

    Matching at the beginning of each line is several times faster than `re.Pattern.finditer`.
    """
    headers, start = [], 0
    while True:
        match = header.match(text, start)
        if match is not None and not match[1]:
            headers.append(match)
        start = text.find("\n", start) + 1
        if not start:
            return headers


def _without_fence(header: re.Pattern[str], text: str) -> str:
    """Removes a code fence around the fields.

    The line before the first field opens the fence. The last line of the text closes it or, if that is not a fence, the
    first line that is; the text after the fence is left out up to the next field.
    """
    if "```" not in text and "~~~" not in text:
        return text
    first = header.search(text)
    if first is None:
        return strip_fence(text)
    before, _, opening = text[: first.start()].rstrip().rpartition("\n")
    mark = _OPENING.fullmatch(opening)
    if mark is None:
        return text
    fields, rest = _until_fence(text[first.start() :].rstrip(), mark[1])
    next_field = header.search(rest)
    return "\n".join([before, fields, rest[next_field.start() :] if next_field else ""])


def _until_fence(text: str, mark: str) -> tuple[str, str]:
    """Returns the text before and after the line that closes a fence."""
    lines = text.split("\n")
    inner = 0  # number of open fences within this one; they name a language
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


def _unquote(header: re.Pattern[str], text: str) -> str:
    if "\\" not in text:
        return text.strip()
    text = header.sub(lambda match: match.group(0)[1:] if match.group(1) else match.group(0), text)
    return unquote_tags(text).strip()


def _value(field: Field, section: str, text: str) -> Any:
    if not section and field.optional:
        return ""
    try:
        return parse_value(field, section)
    except ParseError as error:
        raise ParseError(error.field, error.problem, text) from None

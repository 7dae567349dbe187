"""What the reference pages show beyond the docstrings as they stand: inherited settings, fields of values, and links.

A griffe extension (https://mkdocstrings.github.io/griffe/guide/users/extending/), named in `mkdocs.yml`. A setting that
no docstring describes is a warning, and `make docs` then fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
PAGES = {
    "lmpipe": ROOT / "lmpipe" / "__init__.py",
    "lmpipe.extend": ROOT / "lmpipe" / "extend.py",
    "optimizers": ROOT / "optimizers" / "__init__.py",
}
"""Modules that have a page in docs/reference/, and their files."""

logger = griffe.get_logger("site_reference")


class Reference(griffe.Extension):
    """Completes the signatures and docstrings of a package when it has been loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Gives classes the fields and settings that they inherit, and names in docstrings their links."""
        links = {name: f"{module}.{name}" for module, file in reversed(PAGES.items()) for name in exported(file)}
        objects = list(members(pkg))
        classes = [thing for thing in objects if isinstance(thing, griffe.Class)]
        for cls in classes:
            show_fields(cls)
        described = {cls.path: descriptions(cls) for cls in classes}
        for cls in classes:
            describe_inherited(cls, described)
            if cls.name in links:
                warn_of_undescribed(cls)
        for thing in objects:
            if thing.docstring:
                thing.docstring.value = linked(thing.docstring.value, thing.name, links)


def exported(file: Path) -> list[str]:
    """Returns the names in the ``__all__`` of a file."""
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    return []


def members(parent: griffe.Object) -> Iterator[griffe.Object]:
    """Yields everything that is defined in a module or class, and in what it contains."""
    for member in list(parent.members.values()):
        if isinstance(member, griffe.Object):
            yield member
            yield from members(member)


def show_fields(cls: griffe.Class) -> None:
    """Hides private and refused arguments of a class, and gives a state class the signature of its fields."""
    if is_state(cls):
        fields = [
            griffe.Parameter(
                field.name, annotation=plain_type(field), kind=griffe.ParameterKind.keyword_only, default=field.value
            )
            for field in cls.members.values()
            if isinstance(field, griffe.Attribute) and "property" not in field.labels
        ]
        cls.set_member("__init__", griffe.Function("__init__", parent=cls, parameters=griffe.Parameters(*fields)))
        cls.bases = []  # private
    elif "__init__" in cls.members:
        init = cls["__init__"]
        shown = [each for each in init.parameters if not each.name.startswith("_") and str(each.annotation) != "Never"]
        for argument in shown:
            if str(argument.default).startswith("_"):
                argument.default = cls[argument.name].value  # that of the field
        init.parameters = griffe.Parameters(*shown)


def is_state(cls: griffe.Class) -> bool:
    """Whether a class is one of the frozen pydantic models of `lmpipe.state`."""
    return any(base.path == "lmpipe.state._Value" for base in cls.mro())


def plain_type(field: griffe.Attribute) -> str:
    """Returns the type of a field without the validators that `lmpipe.state` adds."""
    text = re.sub(r"^Annotated\[(\w+), .*\]$", r"\1", str(field.annotation))
    return text.replace("_FrozenJson", "Mapping[str, Any]").replace("_FrozenMapping[", "Mapping[str, ")


def descriptions(cls: griffe.Class) -> dict[str, str]:
    """Returns argument → description from the docstring of a class itself, whether as arguments or as attributes."""
    sections = cls.docstring.parse("google", warnings=False) if cls.docstring else []
    return {
        argument.name: argument.description
        for section in sections
        if isinstance(section, griffe.DocstringSectionParameters | griffe.DocstringSectionAttributes)
        for argument in section.value
    }


def describe_inherited(cls: griffe.Class, described: Mapping[str, Mapping[str, str]]) -> None:
    """Adds the descriptions of inherited settings to the docstring of a class, before those of its own.

    Args:
        cls: The class.
        described: Path of a class → argument → description.
    """
    own = described[cls.path]
    inherited = {
        name: text
        for base in reversed(cls.mro())
        for name, text in described.get(base.path, {}).items()
        if name in cls.parameters and name not in own
    }
    if not inherited or cls.docstring is None:
        return
    entries = ["    " + f"{name}: {text}".replace("\n", "\n" + 8 * " ") for name, text in inherited.items()]
    before, heading, after = cls.docstring.value.partition("\nArgs:\n")
    if not heading:
        before, raises, after = cls.docstring.value.partition("\nRaises:\n")
        after = raises + after
    cls.docstring.value = "\n".join([before, *([] if heading else [""]), "Args:", *entries, after])


def warn_of_undescribed(cls: griffe.Class) -> None:
    """Warns of arguments of a dataclass or a state class that its page would show without a description."""
    if "dataclass" in cls.labels or is_state(cls):
        for name in [each.name for each in cls.parameters if each.name not in {"self", *descriptions(cls)}]:
            logger.warning(f"{cls.path}: no docstring describes the argument {name!r}")


def linked(docstring: str, name: str, links: Mapping[str, str]) -> str:
    """Returns a docstring in which public names in backticks lead to their entry in the reference.

    Args:
        docstring: The text.
        name: Name of what the docstring belongs to, which is not linked to itself.
        links: Public name → its path.
    """

    def link(match: re.Match[str]) -> str:
        shown, target = match[1], match[1].rpartition(".")[2]
        is_name = shown == links.get(target) or (shown == target and shown[0].isupper())  # `optimize` is also a method
        known = target in links and target != name and is_name
        return f"[`{shown}`][{links[target]}]" if known else match[0]

    return re.sub(r"(?<![`\[\w])`([\w.]+)`(?![`\]])", link, docstring)

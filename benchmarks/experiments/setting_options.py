"""Options of the command line for every field of `Settings`: ``--num-train 50``, ``--tuning.rank 16``.

The value of an option is text, which pydantic converts when the settings are changed, so that the command line and a
``--config`` file have one validation. Fields that are true or false become flags, as ``--structured`` and
``--no-structured``.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from benchmarks.experiments.settings import Settings
from lmpipe.errors import ConfigError

_NESTED = "__"  # stands for the dot of an option's name in the name of a parameter
_OFF = "__off"  # ends the name of the parameter whose flag turns a setting off


def add_setting_options(function: Callable[..., None], paper: Settings, bundled: Settings) -> None:
    """Adds an option for each setting to a command.

    Args:
        function: The command; it receives the options as ``**`` keyword arguments.
        paper: Settings that ``--help`` shows as defaults.
        bundled: Settings for the bundled LM, which ``--help`` shows where they differ.
    """
    signature = inspect.signature(function, eval_str=True)
    explicit = [option for option in signature.parameters.values() if option.kind is not inspect.Parameter.VAR_KEYWORD]
    options = list(_options(paper, bundled))
    function.__signature__ = signature.replace(parameters=[*explicit, *options])  # type: ignore[attr-defined]
    function.__annotations__ = {option.name: option.annotation for option in (*explicit, *options)}


def settings_of_options(options: Mapping[str, object]) -> dict[str, object]:
    """Returns the settings of the options that were set, as `Settings.changed` accepts them.

    Raises:
        ConfigError: If a list is not valid JSON.
    """
    settings: dict[str, Any] = {}
    for name, value in options.items():
        if value is not None:
            *path, last = name.removesuffix(_OFF).split(_NESTED)
            table = settings
            for part in path:
                table = table.setdefault(part, {})
            table[last] = value != name.endswith(_OFF) if isinstance(value, bool) else _parsed(name, value)
    return settings


def check_flags(context: typer.Context) -> None:
    """Refuses flags that the command line both turns on and off.

    Raises:
        ConfigError: If there is such a flag.
    """
    for name, is_off in context.params.items():
        flag = name.removesuffix(_OFF)
        source = context.get_parameter_source(flag) if is_off and flag != name else None
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"{_option_name(flag)} and {_off_name(flag)} contradict each other; leave one out")


def _parsed(name: str, value: object) -> object:
    """Returns the list that a value writes as JSON, or the value itself if it is none, such as ``[qk]_proj``."""
    if not (isinstance(value, str) and re.match(r"""\[\s*(["'\]]|$)""", value)):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{_option_name(name)} {value!r} is not a valid JSON list: {error}") from error


def _options(paper: Settings, bundled: Settings) -> Iterator[inspect.Parameter]:
    for name, field in Settings.model_fields.items():
        default, for_bundled, extra = getattr(paper, name), getattr(bundled, name), field.json_schema_extra
        panel = str(extra["panel"]) if isinstance(extra, dict) else None
        if is_dataclass(default):
            types, texts = get_type_hints(type(default)), _argument_docs(type(default))
            for part in fields(default):
                shown = _shown_defaults(getattr(default, part.name), getattr(for_bundled, part.name))
                text = f"{texts.get(part.name, '')} {shown}"
                yield from _option(f"{name}{_NESTED}{part.name}", types[part.name], text, panel)
        else:
            text = f"{field.description}. {_shown_defaults(default, for_bundled)}"
            yield from _option(name, field.annotation, text, panel)


def _option(name: str, kind: Any, text: str, panel: str | None) -> Iterator[inspect.Parameter]:
    option, is_flag = _option_name(name), kind is bool
    if choices := [str(choice) for choice in get_args(kind) if get_origin(kind) is Literal]:
        text += f" One of {', '.join(choices)}."
    info = typer.Option(
        option,
        help=text,
        metavar="flag" if is_flag else _metavar(kind),
        rich_help_panel=panel,
    )
    yield _parameter(name, bool if is_flag else str, info)
    if is_flag:
        yield _parameter(f"{name}{_OFF}", bool, typer.Option(_off_name(name), hidden=True))


def _parameter(name: str, kind: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _option_name(name: str) -> str:
    return "--" + name.replace(_NESTED, ".").replace("_", "-")


def _off_name(name: str) -> str:
    return re.sub(r"(--|\.)([^.]*)$", r"\1no-\2", _option_name(name))


def _metavar(kind: Any) -> str:
    """Returns the name of a setting's type in ``--help``: ``int``, ``float``, ``text`` or ``list``."""
    if get_origin(kind) in (Union, UnionType):
        return _metavar([part for part in get_args(kind) if part is not NoneType][-1])
    if get_origin(kind) is Literal:
        return "text"
    return {str: "text", tuple: "list"}.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def _shown_defaults(paper: object, bundled: object) -> str:
    """Returns the defaults in brackets: that of the paper and, if it differs, that for the bundled LM."""
    other = "" if bundled == paper else f"; bundled LM: {_shown_default(bundled)}"
    return f"[default: {_shown_default(paper)}{other}]"


def _shown_default(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return json.dumps(value)
    return "none" if value is None else str(value)


def _argument_docs(kind: type) -> dict[str, str]:
    """Returns argument → its description in the Google-style docstring of a class, as Markdown without citations."""
    listed = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", listed, re.MULTILINE)
    texts = {name: re.sub(r"`+", "`", " ".join(text.split())) for name, text in entries}
    return {name: re.sub(r" \([^()]*arXiv[^()]*\)", "", text) for name, text in texts.items()}

"""The explicit state of a program: its prompts Π and its weights Θ as one frozen, hashable JSON value.

An update returns a new state. Prompts are keyed by module path; weights are keyed by LM role, or by LM role and module
path (``"lm"`` or ``"lm/hops.0.query"``). Knows nothing about modules or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, final

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PositiveInt,
    ValidationError,
    WrapSerializer,
)
from typing_extensions import Never, Self

from lmpipe.errors import ConfigError, ModuleError, SessionError
from lmpipe.storage.hashing import digest, jsonable
from lmpipe.text.cleaning import clean_text, clean_value
from lmpipe.text.display import did_you_mean, shown
from lmpipe.text.reprs import short_repr
from lmpipe.text.rules import state_rule
from lmpipe.text.tables import Table

V = TypeVar("V")


def _freeze(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a read-only mapping sorted by key, so that equal mappings also have equal JSON."""
    return MappingProxyType(dict(sorted(values.items())))


def _freeze_json(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a read-only, cleaned copy as plain JSON values, sorted by key."""
    replaced: list[int] = []
    cleaned = clean_value(jsonable(dict(values)), replaced.append)
    return _freeze(jsonable(cleaned) if replaced else cleaned)  # replaced characters change the order of keys


def _thaw(values: Mapping[str, Any], serialize: Callable[[dict[str, Any]], Any]) -> Any:
    return serialize(dict(values))


_FrozenJson = Annotated[Mapping[str, Any], AfterValidator(_freeze_json), WrapSerializer(_thaw)]
_FrozenMapping = Annotated[Mapping[str, V], AfterValidator(_freeze), WrapSerializer(_thaw)]


class _Value(BaseModel):
    """A frozen value; two values with the same content are equal and have the same hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, *unnamed: Never, **values: Any) -> None:
        if unnamed:
            name, first = next(iter(type(self).model_fields)), shown(unnamed[0], 100)
            raise ConfigError(f"the fields of {type(self).__name__} have names; write {name}={first}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _invalid(type(self), error) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validates an object as pydantic's method does.

        Raises:
            ConfigError: If the object is invalid.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _invalid(cls, error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Validates JSON as pydantic's method does.

        Raises:
            ConfigError: If the JSON is invalid.
        """
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _invalid(cls, error) from None

    @cached_property
    def digest(self) -> str:
        """Digest of the content (32 hex characters), computed from the digests of nested values.

        Nested values that several values share are digested once: a state that differs from another in one module
        costs the digest of one module.
        """
        return digest({name: _identity(getattr(self, name)) for name in type(self).model_fields})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Returns a new, validated value; pydantic's method would copy the cached digest of the old value."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(update or {}))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self  # neither the value nor anything in it can change

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), self.model_dump(mode="json"))

    def __str__(self) -> str:
        return repr(self)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Value) and type(other) is type(self) and other.digest == self.digest


def _invalid(kind: type[_Value], error: ValidationError) -> ConfigError:
    """The error for an invalid value; it names all invalid parts."""
    problems = []
    for detail in error.errors(include_url=False):
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError) and not detail["loc"]:
            return inner  # raised when the same value was created
        place = ".".join(map(str, detail["loc"]))
        if isinstance(inner, ConfigError):
            problems.append(f"{place}: {str(inner).removeprefix('invalid ')}")
        elif not place:
            problems.append(state_rule(detail))
        else:
            value = "" if detail["type"] in _ABOUT_NAMES else f"is {shown(detail['input'], 100)}; it "
            problems.append(f"{place} {value}{state_rule(detail, kind.model_fields)}")
    return ConfigError(f"invalid {kind.__name__}: {'. '.join(problems).replace('?. ', '? ')}")


_ABOUT_NAMES = ("missing", "extra_forbidden")
"""Types of pydantic's errors that are about the name of a field, and not about its value."""


def _unpickle(kind: type[_Value], values: Mapping[str, Any]) -> _Value:
    """Restores a pickled value."""
    return kind.model_validate(values)


def _identity(part: Any) -> Any:
    """A part of a value as JSON, with nested values replaced by their digests."""
    if isinstance(part, _Value):
        return part.digest
    if isinstance(part, Mapping):
        return {name: _identity(item) for name, item in part.items()}
    return [_identity(item) for item in part] if isinstance(part, tuple) else part


@final
class Demo(_Value):
    """One demonstration of a module: inputs and outputs as plain JSON values.

    Args:
        inputs: Values of the input fields.
        outputs: Values of the output fields. Optional ones may be missing: a demonstration from a label has no
            reasoning.
    """

    inputs: _FrozenJson
    outputs: _FrozenJson

    def __repr__(self) -> str:
        return short_repr(self, inputs=dict(self.inputs), outputs=dict(self.outputs))


@final
class DemoSelection(_Value):
    """Selection of the demonstrations that are nearest to the input; see `lmpipe.prompting.demo_selection`.

    Args:
        k: Number of demonstrations that are shown.
        embedder: Name of the embedder whose vectors decide which demonstrations are near.
    """

    k: PositiveInt
    embedder: str


@final
class PromptState(_Value):
    """The prompt π of one module.

    Args:
        instructions: Instructions for the LM. Characters that are not valid text are replaced by U+FFFD.
        demos: Demonstrations that the prompt shows; with `nearest`, the pool that they are selected from.
        nearest: How to select the demonstrations for an input; None shows all.
    """

    instructions: Annotated[str, AfterValidator(clean_text)]
    demos: tuple[Demo, ...] = ()
    nearest: DemoSelection | None = None

    def __repr__(self) -> str:
        return short_repr(self, self.instructions, demos=len(self.demos), nearest=self.nearest)


@final
class WeightState(_Value):
    """The weights θ of one LM role.

    Args:
        base: Name of the base LM.
        adapter: Digest of the LoRA adapter in the run store; None for the base LM alone.
    """

    base: str
    adapter: str | None = None

    def __repr__(self) -> str:
        return short_repr(self, self.base, adapter=self.adapter and self.adapter[:8])


@final
class ProgramState(_Value):
    """The state ⟨Π, Θ⟩ of a whole program.

    Args:
        prompts: Module path → prompt.
        weights: LM role → weights; a key ``"role/path"`` overrides the weights of the role for one module.
    """

    prompts: _FrozenMapping[PromptState]
    weights: _FrozenMapping[WeightState]

    def __repr__(self) -> str:
        weights = {key: (value.adapter or value.base)[-24:] for key, value in self.weights.items()}
        return short_repr(self, self.digest[:8], prompts=list(self.prompts), weights=weights)

    def _repr_html_(self) -> str:
        """The prompts and weights as a table, for notebooks."""
        rows = [(path, prompt.instructions, str(len(prompt.demos))) for path, prompt in self.prompts.items()]
        weights = [
            f"weights of {key}: {value.base}" + (f" with adapter {value.adapter}" if value.adapter else "")
            for key, value in self.weights.items()
        ]
        return Table(("module", "instructions", "demos"), rows, f"state {self.digest[:8]}", weights).html()

    def with_prompt(self, path: str, prompt: PromptState) -> ProgramState:
        """Returns a new state in which one module has another prompt.

        Raises:
            ModuleError: If the program has no module with this path.
        """
        return self.with_prompts({path: prompt})

    def with_prompts(self, prompts: Mapping[str, PromptState]) -> ProgramState:
        """Returns a new state in which several modules have other prompts.

        Raises:
            ModuleError: If the program has no module with one of the paths.
        """
        for path in prompts.keys() - self.prompts.keys():
            raise ModuleError(
                f"no predictor at {path!r}; this state has {', '.join(self.prompts)}{did_you_mean(path, self.prompts)}"
            )
        return ProgramState(prompts={**self.prompts, **prompts}, weights=self.weights)

    def with_prompts_of(self, other: ProgramState) -> ProgramState:
        """Returns a new state with the prompts of another state and the weights of this one."""
        return ProgramState(prompts=other.prompts, weights=self.weights)

    def with_weights(self, key: str, weights: WeightState) -> ProgramState:
        """Returns a new state with other weights.

        Args:
            key: LM role, whose weights are replaced for all modules, or ``"role/path"`` for one module.
            weights: New weights.
        """
        others = {name: value for name, value in self.weights.items() if not name.startswith(f"{key}/")}
        return ProgramState(prompts=self.prompts, weights={**others, key: weights})

    def with_renamed_modules(self, paths: Mapping[str, str]) -> ProgramState:
        """Returns a new state for a program whose modules were renamed.

        Args:
            paths: Old path → new path, of a module or of a module with submodules: ``{"hops": "steps"}`` turns
                ``"hops.0.query"`` into ``"steps.0.query"``. The longest path that matches is used.

        Raises:
            ConfigError: If the state has no module with an old path, or two modules would get the same path.
        """
        state_paths = [*self.prompts, *(key.partition("/")[2] for key in self.weights)]
        for old in paths:
            if not any(_is_within(path, old) for path in state_paths):
                raise ConfigError(
                    f"no module at {old!r}; this state has {', '.join(self.prompts)}{did_you_mean(old, state_paths)}"
                )
        prompts = {_renamed(path, paths): prompt for path, prompt in self.prompts.items()}
        weights = {_renamed_key(key, paths): value for key, value in self.weights.items()}
        if len(prompts) < len(self.prompts) or len(weights) < len(self.weights):
            raise ConfigError(f"{dict(paths)} gives two modules the same path; rename each to a path of its own")
        return ProgramState(prompts=prompts, weights=weights)

    def weights_of(self, role: str, path: str) -> WeightState:
        """Returns the weights on which the calls of a module run.

        Args:
            role: LM role of the module.
            path: Path of the module.

        Raises:
            SessionError: If the state has no weights for the role.
        """
        weights = self.weights.get(f"{role}/{path}") or self.weights.get(role)
        if weights is None:
            known = ", ".join(self.weights)
            raise SessionError(
                f"{path!r} needs an LM of role {role!r}; this state has {known}; write "
                f"Session(lm={{…, {role!r}: lm}}), and make the state in that session"
            )
        return weights


def _is_within(path: str, module: str) -> bool:
    """Whether a path is that of a module or of one of its submodules."""
    return path == module or path.startswith(f"{module}.")


def _renamed(path: str, paths: Mapping[str, str]) -> str:
    old = max((old for old in paths if _is_within(path, old)), key=len, default=None)
    return path if old is None else paths[old] + path[len(old) :]


def _renamed_key(key: str, paths: Mapping[str, str]) -> str:
    role, slash, path = key.partition("/")
    return role + slash + (_renamed(path, paths) if path else "")

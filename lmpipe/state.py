"""The explicit state of a program: its prompts Π and its weights Θ as one frozen, hashable JSON value.

Updating a state gives a new one. Knows nothing of modules or engines: prompts are keyed by a module's path,
weights by an LM role, optionally narrowed to one module (``"lm"`` or ``"lm/hops.0.query"``).
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
from typing_extensions import Self

from lmpipe.errors import ConfigError, ModuleError, SessionError
from lmpipe.storage.hashing import digest, jsonable
from lmpipe.text.cleaning import clean_text, clean_value

V = TypeVar("V")


def _freeze(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read-only and in the order of the keys, so that equal values are alike in every respect."""
    return MappingProxyType(dict(sorted(values.items())))


def _freeze_json(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same for values of one's own: plain JSON, which nobody else holds."""
    replaced: list[int] = []
    made = clean_value(jsonable(dict(values)), replaced.append)
    return _freeze(jsonable(made) if replaced else made)  # keys that were replaced stand in another order


def _thaw(values: Mapping[str, Any], serialize: Callable[[dict[str, Any]], Any]) -> Any:
    return serialize(dict(values))


FrozenJson = Annotated[Mapping[str, Any], AfterValidator(_freeze_json), WrapSerializer(_thaw)]
FrozenMapping = Annotated[Mapping[str, V], AfterValidator(_freeze), WrapSerializer(_thaw)]


class _Value(BaseModel):
    """A frozen value that is equal to, and hashes like, every other with the same content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), error) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's own.

        Raises:
            ConfigError: If the object is no such value.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _refusal(cls, error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's own.

        Raises:
            ConfigError: If the text is no JSON of such a value.
        """
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _refusal(cls, error) from None

    @cached_property
    def digest(self) -> str:
        """Identity by content (32 hex characters), made of the digests of the values within.

        So what two values share is digested once: a state that differs from another in one module costs one module.
        """
        return digest({name: _identity(getattr(self, name)) for name in type(self).model_fields})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A new value, validated; pydantic's own would carry the old digest along."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(update or {}))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self  # it cannot change, and nothing in it can

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (type(self), self.model_dump(mode="json"))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Value) and type(other) is type(self) and other.digest == self.digest


def _refusal(kind: type[_Value], error: ValidationError) -> ConfigError:
    """Which part of a value cannot be used, in words of ours."""
    first = error.errors(include_url=False)[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError) and not first["loc"]:
        return inner  # of the same value, when it was made
    problem = str(inner) if isinstance(inner, ConfigError) else first["msg"]
    return ConfigError(": ".join([f"this is no {kind.__name__}", *map(str, first["loc"]), problem]))


def _read(kind: type[_Value], values: Mapping[str, Any]) -> _Value:
    """A value that was pickled."""
    return kind.model_validate(values)


def _identity(part: Any) -> Any:
    """A part of a value as JSON, the values in it by their digests."""
    if isinstance(part, _Value):
        return part.digest
    if isinstance(part, Mapping):
        return {name: _identity(item) for name, item in part.items()}
    return [_identity(item) for item in part] if isinstance(part, tuple) else part


@final
class Demo(_Value):
    """One demonstration of a module: inputs and the outputs to imitate, both as plain JSON values.

    Outputs may lack optional fields: a labelled demo of a chain of thought has no reasoning.
    """

    inputs: FrozenJson
    outputs: FrozenJson


@final
class DemoSelection(_Value):
    """Of the demonstrations of a prompt, those nearest to the input are shown; see `lmpipe.prompting.demo_selection`.

    Attributes:
        k: How many.
        embedder: Name of the embedder that says what is near.
    """

    k: PositiveInt
    embedder: str


@final
class PromptState(_Value):
    """π of one module.

    Attributes:
        instructions: What to do. Characters that are no text are replaced by U+FFFD.
        demos: The demonstrations that are shown; with `nearest`, the pool that they are taken from.
        nearest: Which of them are shown for an input; none shows all.
    """

    instructions: Annotated[str, AfterValidator(clean_text)]
    demos: tuple[Demo, ...] = ()
    nearest: DemoSelection | None = None


@final
class WeightState(_Value):
    """θ of one LM role.

    Attributes:
        base: Name of the LM that the adapter belongs to.
        adapter: Content digest of the adapter in the run store, or none for the base alone.
    """

    base: str
    adapter: str | None = None


@final
class ProgramState(_Value):
    """⟨Π, Θ⟩ of a whole program.

    Attributes:
        prompts: Module path → its prompt.
        weights: LM role → its weights; a key ``"role/path"`` overrides the role for one module.
    """

    prompts: FrozenMapping[PromptState]
    weights: FrozenMapping[WeightState]

    def with_prompt(self, path: str, prompt: PromptState) -> ProgramState:
        """A new state in which one module has another prompt.

        Raises:
            ModuleError: If the program has no module of that path.
        """
        return self.with_prompts({path: prompt})

    def with_prompts(self, prompts: Mapping[str, PromptState]) -> ProgramState:
        """A new state in which several modules have other prompts.

        Raises:
            ModuleError: If the program has no module of one of the paths.
        """
        for path in prompts.keys() - self.prompts.keys():
            raise ModuleError(f"no predictor at {path!r}; this state has {', '.join(self.prompts)}")
        return ProgramState(prompts={**self.prompts, **prompts}, weights=self.weights)

    def with_prompts_of(self, other: ProgramState) -> ProgramState:
        """A new state with the prompts of another one and these weights."""
        return ProgramState(prompts=other.prompts, weights=self.weights)

    def with_weights(self, key: str, weights: WeightState) -> ProgramState:
        """A new state in which one role, with all its modules, or one module (``"role/path"``) has other weights."""
        others = {name: own for name, own in self.weights.items() if not name.startswith(f"{key}/")}
        return ProgramState(prompts=self.prompts, weights={**others, key: weights})

    def with_renamed_modules(self, paths: Mapping[str, str]) -> ProgramState:
        """A new state for a program whose modules were renamed.

        Args:
            paths: Old path → new path, of a module or of a module with parts: ``{"hops": "steps"}`` turns
                ``"hops.0.query"`` into ``"steps.0.query"``. The longest path that fits counts.

        Raises:
            ConfigError: If the state has no module of an old path, or two modules would get one path.
        """
        known = [*self.prompts, *(key.partition("/")[2] for key in self.weights)]
        for old in paths:
            if not any(_is_within(path, old) for path in known):
                raise ConfigError(f"no module at {old!r}; this state has {', '.join(self.prompts)}")
        prompts = {_renamed(path, paths): prompt for path, prompt in self.prompts.items()}
        weights = {_renamed_key(key, paths): own for key, own in self.weights.items()}
        if len(prompts) < len(self.prompts) or len(weights) < len(self.weights):
            raise ConfigError(f"two modules would get one path by {dict(paths)}; give each a path of its own")
        return ProgramState(prompts=prompts, weights=weights)

    def weights_of(self, role: str, path: str) -> WeightState:
        """The weights that a call of the module at `path` runs on.

        Raises:
            SessionError: If there are none for the role.
        """
        own = self.weights.get(f"{role}/{path}") or self.weights.get(role)
        if own is None:
            raise SessionError(f"{path!r} asks for an LM of role {role!r}; there is one for {', '.join(self.weights)}")
        return own


def _is_within(path: str, module: str) -> bool:
    """Whether a path is that of a module, or of a part of it."""
    return path == module or path.startswith(f"{module}.")


def _renamed(path: str, paths: Mapping[str, str]) -> str:
    old = max((old for old in paths if _is_within(path, old)), key=len, default=None)
    return path if old is None else paths[old] + path[len(old) :]


def _renamed_key(key: str, paths: Mapping[str, str]) -> str:
    role, slash, path = key.partition("/")
    return role + slash + (_renamed(path, paths) if path else "")

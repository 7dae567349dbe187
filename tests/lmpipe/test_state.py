"""States are frozen values that survive JSON."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmpipe import Demo, ProgramState, PromptState, WeightState
from lmpipe.errors import ConfigError, ModuleError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.text(), JSON, max_size=3)
DEMOS = st.builds(Demo, inputs=FIELDS, outputs=FIELDS)
PROMPTS = st.builds(PromptState, instructions=st.text(), demos=st.lists(DEMOS, max_size=2).map(tuple))
WEIGHTS = st.builds(WeightState, base=st.text(), adapter=st.none() | st.text())
STATES = st.builds(
    ProgramState,
    prompts=st.dictionaries(st.text(), PROMPTS, max_size=3),
    weights=st.dictionaries(st.text(), WEIGHTS, max_size=2),
)
SMALL = ProgramState(prompts={"a": PromptState(instructions="Do.")}, weights={"lm": WeightState(base="tiny")})


@given(STATES)
def test_a_state_survives_json_and_is_found_again_by_its_hash(state: ProgramState) -> None:
    again = ProgramState.model_validate_json(state.model_dump_json())
    assert again == state
    assert again.digest == state.digest
    assert {state: 1}[again] == 1


def test_an_update_gives_a_new_state_and_leaves_the_old_one() -> None:
    tuned = SMALL.with_weights("lm", WeightState(base="tiny", adapter="abc"))
    prompted = tuned.with_prompt("a", PromptState(instructions="Do better."))
    assert SMALL.weights["lm"].adapter is None
    assert prompted.weights["lm"].adapter == "abc"
    assert prompted.with_prompts_of(SMALL) == tuned
    assert len({SMALL, tuned, prompted}) == 3


def test_a_changed_copy_has_an_identity_of_its_own() -> None:
    prompt = SMALL.prompts["a"]
    assert prompt.digest
    demo = Demo(inputs={"x": 1}, outputs={"y": 2})
    copy = prompt.model_copy(update={"demos": (demo,)})
    assert copy.digest == PromptState(instructions="Do.", demos=(demo,)).digest != prompt.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompts": {"a": {"instructions": 3}}, "weights": {}}',
            "invalid ProgramState: prompts.a: PromptState: instructions is 3; it must be text",
        ),
        (
            '{"prompts": {}, "weights": {}, "more": 1}',
            "invalid ProgramState: more does not exist; there are prompts, weights",
        ),
        ("{", "invalid ProgramState: Invalid JSON"),
        ("[" * 100_000, "invalid ProgramState: Invalid JSON: recursion limit exceeded"),
    ],
)
def test_invalid_states_are_refused_with_a_config_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProgramState.model_validate_json(text)


@given(STATES)
def test_states_can_be_copied_and_pickled(state: ProgramState) -> None:
    for copied in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert copied == state
        assert copied.model_dump_json() == state.model_dump_json()


DEEP = ProgramState(
    prompts={path: PromptState(instructions=path) for path in ("hops.0.query", "hops.1.query", "answer")},
    weights={"lm": WeightState(base="tiny"), "lm/hops.0.query": WeightState(base="tiny", adapter="a")},
)


def test_a_state_follows_modules_that_were_renamed() -> None:
    renamed = DEEP.with_renamed_modules({"hops": "steps", "hops.1": "last", "answer": "respond"})
    assert {path: prompt.instructions for path, prompt in renamed.prompts.items()} == {
        "steps.0.query": "hops.0.query",
        "last.query": "hops.1.query",
        "respond": "answer",
    }
    assert renamed.weights["lm/steps.0.query"].adapter == "a"
    assert renamed.with_renamed_modules({"steps": "hops", "last": "hops.1", "respond": "answer"}) == DEEP


def test_paths_may_be_swapped_but_not_merged() -> None:
    swapped = DEEP.with_renamed_modules({"hops.0": "hops.1", "hops.1": "hops.0"})
    assert swapped.prompts["hops.1.query"].instructions == "hops.0.query"
    with pytest.raises(ConfigError, match="gives two modules the same path"):
        DEEP.with_renamed_modules({"hops.0": "hops.1"})
    with pytest.raises(ConfigError, match=r"no module at 'hop'; this state has answer, hops.0.query"):
        DEEP.with_renamed_modules({"hop": "steps"})


def test_nothing_in_a_state_can_be_changed() -> None:
    with pytest.raises(ValidationError):
        SMALL.prompts = {}
    with pytest.raises(TypeError):
        SMALL.prompts["a"] = PromptState(instructions="x")  # type: ignore[index]


def test_weights_of_a_role_can_be_overridden_for_one_module() -> None:
    state = SMALL.with_weights("lm/hops.0", WeightState(base="tiny", adapter="own"))
    assert state.weights_of("lm", "hops.0").adapter == "own"
    assert state.weights_of("lm", "hops.1").adapter is None
    whole = state.with_weights("lm", WeightState(base="tiny", adapter="whole"))
    assert whole.weights_of("lm", "hops.0").adapter == "whole"


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(ModuleError, match="no predictor at 'b'; this state has a"):
        SMALL.with_prompt("b", PromptState(instructions="x"))

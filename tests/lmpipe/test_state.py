"""States are frozen values that survive JSON."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmpipe import Demo, ProgramState, PromptState, WeightState
from lmpipe.errors import ModuleError

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

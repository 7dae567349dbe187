"""Prompt optimizers choose demonstrations from successful rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmpipe import ChainOfThought, Example, Predict, Request, ScriptedLM, Session, exact_match, initial_state
from optimizers import BootstrapFewShot, BootstrapFewShotRandomSearch, KNNFewShot, LabeledFewShot
from tests.scripted import Colour, NumberLine, examples, scripted


def test_bootstrapped_demos_are_the_calls_of_successful_runs() -> None:
    """With labelled demos in the prompt the LM is right on even numbers, so only those rollouts become demos."""
    program = ChainOfThought("number: int -> answer")
    lm = ScriptedLM(lambda request: f"reasoning: I see\nanswer: {even(request)}")
    session = Session(lm=lm)
    train = [Example({"number": n}, {"answer": "even"}, id=str(n)) for n in range(6)]
    optimizer = BootstrapFewShot(exact_match, max_bootstrapped_demos=2, max_labeled_demos=2)
    result = optimizer.optimize(program, initial_state(program, session), train, [], session)
    demos = result.state.prompts["predict"].demos
    assert [(demo.inputs["number"], dict(demo.outputs)) for demo in demos] == [
        (0, {"reasoning": "I see", "answer": "even"}),
        (2, {"reasoning": "I see", "answer": "even"}),
        (1, {"answer": "even"}),
        (3, {"answer": "even"}),
    ]
    assert (result.details["tried"], result.details["kept_by_module"]) == (6, {"predict": 3})


def even(request: Request) -> str:
    return "odd" if int(request.messages[-1].content.partition(": ")[2]) % 2 else "even"


def test_partial_labels_make_demos_without_the_unlabelled_inputs() -> None:
    """The last module also has unlabelled hints as input; the outputs of the first module are not labelled."""
    program, lm = Colour(), scripted()
    session = Session(lm=lm)
    train = [Example({"number": n}, {"answer": "red"}) for n in range(3)]
    state = initial_state(program, session)
    plain = BootstrapFewShot(exact_match, max_labeled_demos=2)
    assert not any(prompt.demos for prompt in plain.optimize(program, state, train, [], session).state.prompts.values())
    prompts = replace(plain, partial_labels=True).optimize(program, state, train, [], session).state.prompts
    assert [(dict(demo.inputs), dict(demo.outputs)) for demo in prompts["answer"].demos] == [
        ({"number": 0}, {"answer": "red"}),
        ({"number": 1}, {"answer": "red"}),
    ]
    assert prompts["hint"].demos == ()
    shown = [request.messages[1].content for request in lm.requests if len(request.messages) > 2]
    assert set(shown) <= {"number: 0", "number: 1", "number: 2"}
    assert shown


def test_an_example_is_never_prompted_with_its_own_label() -> None:
    program = ChainOfThought("number: int -> answer")
    lm = ScriptedLM(lambda request: "answer: even")
    session = Session(lm=lm)
    train = [Example({"number": n}, {"answer": "even"}) for n in range(4)]
    BootstrapFewShot(exact_match, max_labeled_demos=4).optimize(
        program, initial_state(program, session), train, [], session
    )
    for request in lm.requests:
        assert len(request.messages) == 2 + 2 * 3
        assert request.messages[-1].content not in [message.content for message in request.messages[:-1]]


def test_a_failed_example_is_tried_again_at_a_temperature() -> None:
    program = ChainOfThought("number: int -> answer")
    lm = ScriptedLM(lambda request: "answer: even" if request.sampling.temperature else "no")
    session = Session(lm=lm)
    train = [Example({"number": n}, {"answer": "even"}) for n in range(3)]
    state = initial_state(program, session)
    once = BootstrapFewShot(exact_match).optimize(program, state, train, [], session)
    twice = BootstrapFewShot(exact_match, max_rounds=2).optimize(program, state, train, [], session)
    assert (once.details["kept"], twice.details["kept"], twice.details["tried"]) == (0, 3, 6)


def even_labels(*keys: str) -> list[Example]:
    """The same two examples several times under different ids."""
    return [Example({"number": int(key[-1])}, {"answer": "even"}, id=key) for key in keys]


@pytest.mark.parametrize("sample", [False, True])
def test_a_repeated_example_is_shown_once_whatever_its_id(sample: bool) -> None:
    program, session = ChainOfThought("number: int -> answer"), Session(lm=scripted())
    train = even_labels("a0", "b0", "c0", "a2", "b2")
    optimizer = LabeledFewShot(k=4, sample=sample)
    result = optimizer.optimize(program, initial_state(program, session), train, [], session)
    assert sorted(demo.inputs["number"] for demo in result.state.prompts["predict"].demos) == [0, 2]
    assert result.details["labelled"] == {"predict": 2}


def test_no_prompt_shows_a_demonstration_twice_nor_an_example_its_own_label_under_another_id() -> None:
    program, lm = Predict("number: int -> answer"), ScriptedLM(lambda request: "answer: even")
    session = Session(lm=lm, embedder=NumberLine())
    train = even_labels("a0", "b0", "a2", "b2", "c2", "a4")
    state = initial_state(program, session)
    for optimizer in (
        BootstrapFewShot(exact_match, max_bootstrapped_demos=2, max_labeled_demos=4),
        BootstrapFewShotRandomSearch(exact_match, max_bootstrapped_demos=2, max_labeled_demos=4),
        KNNFewShot(exact_match, max_labeled_demos=4),
        KNNFewShot(exact_match, max_bootstrapped_demos=0, max_labeled_demos=4),
    ):
        result = optimizer.optimize(program, state, train, even_labels("d6"), session)
        for prompt in result.state.prompts.values():
            shown = [demo.inputs["number"] for demo in prompt.demos]
            assert len(set(shown)) == len(shown)
    for request in lm.requests:
        shown = [message.content for message in request.messages[1:-1:2]]
        assert len(set(shown)) == len(shown)
        assert request.messages[-1].content not in shown


def test_different_calls_of_one_example_are_all_drawn() -> None:
    """With three distinct examples every draw contains all three."""
    program, session = Predict("number: int -> answer"), Session(lm=ScriptedLM(lambda request: "answer: even"))
    train = even_labels("a0", "a2", "a4")
    optimizer = BootstrapFewShot(exact_match, max_bootstrapped_demos=2, max_labeled_demos=4)
    result = optimizer.optimize(program, initial_state(program, session), train, [], session)
    assert [demo.inputs["number"] for demo in result.state.prompts["self"].demos] == [0, 2, 4]


def test_random_search_keeps_the_candidate_with_the_best_validation_score() -> None:
    program, lm = Colour(), scripted()
    session = Session(lm=lm)
    start = initial_state(program, session)
    optimizer = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=4, num_train=None, num_val=10)
    result = optimizer.optimize(program, start, examples(20), examples(20, start=100), session)
    assert [candidate.name for candidate in result.candidates] == [
        "zero-shot",
        "labelled",
        "bootstrapped",
        "shuffled 1",
        "shuffled 2",
        "shuffled 3",
        "shuffled 4",
    ]
    assert result.candidates[0].mean == 0
    assert result.evaluation is not None
    assert result.evaluation.mean == max(candidate.mean for candidate in result.candidates)
    assert {candidate.n for candidate in result.candidates} == {10}
    assert start == initial_state(program, session)


def test_all_candidates_run_in_one_wavefront() -> None:
    program, lm = ChainOfThought("number: int -> answer"), ScriptedLM(lambda request: f"answer: {even(request)}")
    session = Session(lm=lm, max_concurrency=1000)
    train, val = ([Example({"number": n}, {"answer": "even"}) for n in range(start, start + 10)] for start in (0, 50))
    optimizer = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=6)
    result = optimizer.optimize(program, initial_state(program, session), train, val, session)
    assert lm.batch_sizes == [10, 10 * len({candidate.state for candidate in result.candidates})]

"""Invalid settings, examples, states, trainers and labels are refused before any LM call."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lmpipe import (
    Example,
    Module,
    Optimizer,
    Predict,
    Prediction,
    RunStore,
    Session,
    exact_match,
    initial_state,
)
from lmpipe.errors import ConfigError, SessionError
from optimizers import (
    GEPA,
    GRPO,
    BetterTogether,
    BootstrapFewShot,
    BootstrapFewShotRandomSearch,
    BootstrapFinetune,
    KNNFewShot,
    LabeledFewShot,
    MIPROv2,
    PreferenceFinetune,
)
from tests.scripted import Colour, KeepingTrainer, NumberLine, examples, scheduler, scripted

TRAINER = KeepingTrainer()
CHOOSING: dict[str, Optimizer] = {
    "random search": BootstrapFewShotRandomSearch(exact_match),
    "racing": BootstrapFewShotRandomSearch(exact_match, racing=True),
    "MIPROv2": MIPROv2(exact_match),
    "GEPA": GEPA(exact_match),
    "GRPO": GRPO(exact_match, TRAINER),
    "BetterTogether": scheduler(TRAINER, select="best"),
    "the last of BetterTogether": scheduler(TRAINER),
    "vanilla": scheduler(TRAINER, "vanilla"),
}
LEARNING: dict[str, Optimizer] = {
    **{name: optimizer for name, optimizer in CHOOSING.items() if name != "vanilla"},
    "labelled": LabeledFewShot(),
    "bootstrap": BootstrapFewShot(exact_match),
    "neighbours": KNNFewShot(exact_match),
    "finetune": BootstrapFinetune(exact_match, TRAINER),
    "preference": PreferenceFinetune(exact_match, TRAINER),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_optimizers_that_need_validation_examples_refuse_to_run_without(name: str) -> None:
    lm, program = scripted(), Colour()
    session = Session(lm=lm)
    with pytest.raises(ConfigError, match="there are no validation examples to choose by"):
        CHOOSING[name].optimize(program, initial_state(program, session), examples(4), [], session)
    assert not lm.requests


@pytest.mark.parametrize("name", LEARNING)
def test_optimizers_that_need_training_examples_refuse_to_run_without(name: str) -> None:
    lm, program = scripted(), Colour()
    session = Session(lm=lm, embedder=NumberLine())
    with pytest.raises(ConfigError, match="there are no training examples to learn from"):
        LEARNING[name].optimize(program, initial_state(program, session), [], examples(4), session)
    assert not lm.requests


def test_grpo_keeps_the_last_state_without_validation_examples_if_num_val_is_0(store: RunStore) -> None:
    program, session = Colour(), Session(lm=scripted(), store=store)
    last = GRPO(exact_match, TRAINER, steps=1, num_val=0)
    assert last.optimize(program, initial_state(program, session), examples(2), [], session).evaluation is None


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("wrong", ["text", None, [1], [{"number": 1}]])
def test_anything_but_a_collection_of_examples_is_refused(name: str, wrong: Any) -> None:
    lm, program = scripted(), Colour()
    session = Session(lm=lm, embedder=NumberLine())
    state = initial_state(program, session)
    with pytest.raises(ConfigError, match=r"^train.* is "):
        LEARNING[name].optimize(program, state, wrong, examples(4), session)
    with pytest.raises(ConfigError, match=r"^val.* is "):
        LEARNING[name].optimize(program, state, examples(4), wrong, session)
    assert not lm.requests


def test_iterators_of_examples_are_accepted(store: RunStore) -> None:
    program, session = Colour(), Session(lm=scripted(), store=store)
    better, state = scheduler(KeepingTrainer(), "p -> w"), initial_state(Colour(), session)
    whole = better.optimize(program, state, examples(12), examples(8, 50), session)
    train: Any = iter(examples(12))
    val: Any = iter(examples(8, 50))
    assert better.optimize_all(["p", "p -> w"], program, state, train, val, session)["p -> w"] == whole


def test_strategies_are_a_list() -> None:
    program, session = Colour(), Session(lm=scripted())
    with pytest.raises(ConfigError, match="strategies is the text 'p'"):
        scheduler(TRAINER).optimize_all("p", program, initial_state(program, session), [], [], session)


def test_different_examples_with_one_id_are_refused_and_a_repeated_one_counts_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    program, session = Predict("number: int -> answer"), Session(lm=scripted())
    state = initial_state(program, session)
    one, other = (Example({"number": number}, {"answer": "red"}, id="a") for number in (1, 2))
    with pytest.raises(ConfigError, match="train: 1 example ids are not unique, such as 'a'"):
        LabeledFewShot().optimize(program, state, [one, other], [], session)
    with pytest.raises(ConfigError, match="val: 1 example ids are not unique"):
        LabeledFewShot().optimize(program, state, [one], [other, other], session)
    with caplog.at_level(logging.WARNING):
        result = LabeledFewShot().optimize(program, state, [one, one], [one], session)
    assert len(result.state.prompts["self"].demos) == 1
    assert "train: 1 of 2 examples are repeated" in caplog.text
    assert "1 of 1 validation examples are also training examples" in caplog.text


@pytest.mark.parametrize("name", LEARNING)
def test_a_state_of_another_program_is_refused(name: str) -> None:
    lm, program = scripted(), Colour()
    session = Session(lm=lm, embedder=NumberLine())
    other = initial_state(Predict("number: int -> answer"), session)
    with pytest.raises(ConfigError, match="the state does not fit the program: it is for 'self'"):
        LEARNING[name].optimize(program, other, examples(4), examples(4, 9), session)
    assert not lm.requests


class Judged(Module):
    """Answers, and lets another LM judge the answer."""

    def __init__(self) -> None:
        self.answer = Predict("number: int -> answer")
        self.judge = Predict("answer -> verdict", role="judge")

    def forward(self, number: int) -> Prediction:
        return self.judge(answer=self.answer(number=number).answer)


@pytest.mark.parametrize("kind", [BootstrapFinetune, PreferenceFinetune, GRPO])
def test_a_role_without_a_trainer_is_refused_before_any_run(kind: Any, store: RunStore) -> None:
    lm, program = scripted(), Judged()
    session = Session(lm={"lm": lm, "judge": lm}, store=store)
    state = initial_state(program, session)
    with pytest.raises(ConfigError, match="no trainer for role 'judge'; the program's roles are lm, judge"):
        kind(exact_match, {"lm": TRAINER}).optimize(program, state, examples(3), examples(3, 9), session)
    assert not lm.requests


@pytest.mark.parametrize("kind", [BootstrapFinetune, PreferenceFinetune, GRPO])
def test_a_session_without_a_store_is_refused_before_any_run(kind: Any) -> None:
    lm, program = scripted(), Colour()
    session = Session(lm=lm)
    with pytest.raises(SessionError, match=r"store=RunStore\("):
        kind(exact_match, TRAINER).optimize(program, initial_state(program, session), examples(3), examples(3), session)
    assert not lm.requests


@pytest.mark.parametrize(
    "optimizer",
    [
        BootstrapFinetune(exact_match, TRAINER, balance_by="colour"),
        BootstrapFewShotRandomSearch(exact_match, stratify_by="colour"),
        KNNFewShot(exact_match, stratify_by="colour"),
        MIPROv2(exact_match, stratify_by="colour"),
        GEPA(exact_match, stratify_by="colour"),
    ],
)
def test_a_missing_label_is_refused_before_any_run(optimizer: Optimizer) -> None:
    lm, program = scripted(), Colour()
    session = Session(lm=lm, embedder=NumberLine())
    with pytest.raises(ConfigError, match=r"has no label 'colour' to (balance|stratify) by"):
        optimizer.optimize(program, initial_state(program, session), examples(4), examples(4, 9), session)
    assert not lm.requests


NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(BootstrapFewShot, {name: value}) for name, value in (("max_rounds", 0), ("temperature", -0.1))],
        *[(BootstrapFewShot, {"metric_threshold": value}) for value in (NAN, -0.1, 1.1, "1", float("inf"))],
        *[(BootstrapFewShot, {name: -1}) for name in ("max_bootstrapped_demos", "max_labeled_demos")],
        (BootstrapFewShot, {"metric": None}),
        (BootstrapFewShot, {"teacher": "gpt"}),
        *[(BootstrapFewShotRandomSearch, {name: 0}) for name in ("num_train", "num_val")],
        (BootstrapFewShotRandomSearch, {"num_candidate_programs": -1}),
        *[(MIPROv2, {name: 0}) for name in ("num_val", "num_candidates", "num_trials", "minibatch_size")],
        *[(MIPROv2, {name: 0}) for name in ("minibatch_full_eval_steps", "num_parallel_trials", "num_train")],
        *[(GEPA, {name: 0}) for name in ("num_val", "num_train", "max_metric_calls", "reflection_minibatch_size")],
        (GEPA, {"perfect_score": NAN}),
        (GEPA, {"candidate_selection_strategy": "best"}),
        (GEPA, {"acceptance_criterion": "any"}),
        *[(KNNFewShot, {name: 0}) for name in ("k", "num_train")],
        *[(BootstrapFinetune, {name: 0}) for name in ("rollouts_per_example", "max_idle_rounds")],
        *[(BootstrapFinetune, {name: 0}) for name in ("max_kept_per_example", "max_rollouts_per_example")],
        (BootstrapFinetune, {"rollouts_per_example": 4, "max_rollouts_per_example": 3}),
        *[(BootstrapFinetune, {"min_yield": value}) for value in (-0.1, 1.1, NAN)],
        (BootstrapFinetune, {"temperature": -1.0}),
        (BootstrapFinetune, {"init": "best"}),
        (BootstrapFinetune, {"adapters": "both"}),
        (BootstrapFinetune, {"trainer": "local"}),
        (BootstrapFinetune, {"trainer": {"lm": "local"}}),
        *[(PreferenceFinetune, {name: 0}) for name in ("rollouts_per_example", "max_pairs_per_prompt", "beta")],
        *[(GRPO, {name: 0}) for name in ("steps", "examples_per_step", "eval_every", "temperature", "clip")],
        (GRPO, {"group_size": 1}),
        (GRPO, {"num_val": -1}),
        (GRPO, {"format_score": NAN}),
        (BetterTogether, {"prompts_from": "first"}),
        (BetterTogether, {"select": "first"}),
        (BetterTogether, {"optimizers": {"p": "search"}}),
        (BetterTogether, {"optimizers": [LabeledFewShot()]}),
        (BetterTogether, {"num_train_scored": -1}),
        (BetterTogether, {"budget": 30}),
    ],
)
def test_invalid_settings_are_refused_by_name(kind: Any, settings: dict[str, Any]) -> None:
    needed: dict[str, Any] = {"metric": exact_match}
    if kind in (BootstrapFinetune, PreferenceFinetune, GRPO):
        needed["trainer"] = TRAINER
    if kind is BetterTogether:
        needed |= {"optimizers": {"p": LabeledFewShot()}, "strategy": "p"}
    kind(**needed)
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: .*{list(settings)[-1]}(\[.*\])? is "):
        kind(**{**needed, **settings})


def test_labelled_few_shot_shows_at_least_one_demo() -> None:
    with pytest.raises(ConfigError, match="k is 0"):
        LabeledFewShot(k=0)

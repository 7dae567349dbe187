"""A state that was found is saved and loaded again: with its adapters, its LMs and its settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lmpipe
from lmpipe import (
    LM,
    Budget,
    Example,
    LocalTrainer,
    OptimizeResult,
    Prediction,
    ProgramState,
    RunStore,
    Sampling,
    ScriptedLM,
    Session,
    TuningConfig,
    exact_match,
    load_lm,
)
from lmpipe.errors import ConfigError, CorruptBlob, SessionError, StoreError
from lmpipe.lm import LMSource
from lmpipe.results.saved import SavedLM
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune, KNNFewShot
from tests.scripted import Colour, KeepingTrainer, NumberLine, colour_script, examples, scheduler, scripted
from tests.test_docs import run, snippets

ROOT = Path(__file__).parents[2]
TUNING = TuningConfig(rank=4, learning_rate=0.05, epochs=2)


def always(example: Example, prediction: Prediction) -> float:
    """Counts every answer as correct, so that a random LM has rollouts to train on."""
    return 1.0


def finetune(session: Session, trained: LM, **settings: object) -> OptimizeResult:
    assert session.store is not None
    optimizer = BootstrapFinetune(always, LocalTrainer(trained, TUNING), **settings)  # type: ignore[arg-type]
    return optimizer.optimize(Colour(), None, examples(4), [], session)


def tiny_session(folder: Path, store: RunStore) -> Session:
    return Session(load_lm(f"hf:{folder}"), seed=3, sampling=Sampling(max_tokens=12), store=store, structured=True)


def completions(session: Session) -> list[str | None]:
    """What the LM writes in some calls of the program."""
    with session:
        for number in range(3):
            Colour()(number=number)
    return [step.text for step in session.history(9)]


COMPLETIONS = """
import json, sys
import lmpipe
from tests.results.test_saving import completions
print(json.dumps(completions(lmpipe.load(sys.argv[1]))))
"""


def in_another_process(folder: Path, cwd: Path) -> list[str | None]:
    script = cwd / "script.py"
    script.write_text(COMPLETIONS)
    written: list[str | None] = json.loads(run(script, cwd, str(folder)))
    return written


@pytest.fixture(scope="module")
def saved(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved session with an adapter; its run directory is gone."""
    folder = tmp_path_factory.mktemp("saved")
    with RunStore(folder / "run") as store:
        session = tiny_session(tiny_folder, store)
        result = finetune(session, session.lm_of("lm"))
        result.save(folder / "classifier")
        (folder / "completions.json").write_text(json.dumps(completions(result.session)))
        (folder / "untuned.json").write_text(json.dumps(completions(session)))
    shutil.rmtree(folder / "run")
    return folder / "classifier"


def test_a_saved_result_answers_as_before_in_another_process(saved: Path, tmp_path: Path) -> None:
    before = json.loads((saved.parent / "completions.json").read_text())
    assert before != json.loads((saved.parent / "untuned.json").read_text()), "the adapter decides what is written"
    assert in_another_process(saved, tmp_path) == before
    session = lmpipe.load(saved)
    assert (session.seed, session.sampling, session.structured) == (3, Sampling(max_tokens=12), True)
    assert session.store is None


def test_a_folder_can_be_moved(saved: Path, tmp_path: Path) -> None:
    before = json.loads((saved.parent / "completions.json").read_text())
    moved = shutil.copytree(saved, tmp_path / "moved")
    assert completions(lmpipe.load(moved)) == before


def test_a_folder_that_holds_the_same_result_stays_as_it_is(tmp_path: Path) -> None:
    """So a script or a cell that saves its result can be run again."""
    session = Session(scripted())
    search = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=2)
    result = search.optimize(Colour(), None, examples(8), examples(8, 8), session)
    folder = result.save(tmp_path / "best")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert result.save(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    other = search.optimize(Colour(), None, examples(6), examples(8, 8), session)
    with pytest.raises(ConfigError, match="already exists and holds something else"):
        other.save(folder)
    with pytest.raises(ConfigError, match="already exists and holds something else"):
        result.save(tmp_path)


def test_a_result_without_a_session_is_refused(tmp_path: Path) -> None:
    state = ProgramState(prompts={}, weights={})
    with pytest.raises(SessionError, match="belongs to no session"):
        OptimizeResult(state=state).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_every_module_has_its_adapter_and_every_role_its_lm(tiny_folder: Path, store: RunStore, tmp_path: Path) -> None:
    session = tiny_session(tiny_folder, store)
    judged = replace(session, lm={"lm": session.lm_of("lm"), "judge": load_lm(f"hf:{tiny_folder}")})
    result = finetune(judged, session.lm_of("lm"), adapters="module")
    folder = result.save(tmp_path / "saved")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"adapter-lm-hint", "adapter-lm-answer"}
    loaded = lmpipe.load(folder)
    assert loaded.roles.keys() == {"lm", "judge"}
    assert loaded.lm_of("lm") is loaded.lm_of("judge"), "the same model is loaded once"
    assert completions(loaded) == completions(result.session)
    with pytest.raises(ConfigError, match="has the roles lm, judge; pass their LMs by role"):
        lmpipe.load(folder, loaded.lm_of("lm"))
    with pytest.raises(ConfigError, match="has no role 'critic'; its roles are lm, judge"):
        lmpipe.load(folder, {"critic": loaded.lm_of("lm")})
    judge = ScriptedLM(colour_script)
    assert lmpipe.load(folder, {"judge": judge}).lm_of("judge") is judge


def test_a_loaded_session_can_be_optimized_further_and_saved_again(saved: Path, tmp_path: Path) -> None:
    loaded = lmpipe.load(saved)
    with RunStore(tmp_path / "run") as store:
        session = replace(loaded, store=store)
        lm = session.lm_of("lm")
        stages = {"w": BootstrapFinetune(always, LocalTrainer(lm, TUNING), init="current", adapters="module")}
        result = BetterTogether(always, stages, "w").optimize(Colour(), None, examples(4), examples(2, 4), session)
        again = result.save(tmp_path / "again")
        # one module with its new adapter, which is in the store, and one with the old one, which is in the saved folder
        hint = result.state.weights["lm/hint"]
        mixed = session.using(loaded.state.with_weights("lm/hint", hint))  # type: ignore[union-attr]
        limited = mixed.limited(Budget(max_lm_calls=0))
        both = BootstrapFinetune(always, LocalTrainer(lm, TUNING)).optimize(Colour(), None, examples(4), [], limited)
        both.save(tmp_path / "both")
        expected, expected_of_both = completions(result.session), completions(mixed)
    shutil.rmtree(tmp_path / "run")
    assert completions(lmpipe.load(again)) == expected
    assert completions(lmpipe.load(tmp_path / "both")) == expected_of_both


def test_an_lm_that_weights_were_not_tuned_on_is_refused(saved: Path, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"were tuned on '{tiny_folder}', and this LM is 'scripted'"):
        lmpipe.load(saved, scripted())
    same = load_lm(f"hf:{tiny_folder}", name=str(tiny_folder))
    assert lmpipe.load(saved, same).lm_of("lm") is same
    assert lmpipe.load(saved, f"hf:{tiny_folder}").lm_of("lm").name == same.name
    with pytest.raises(ConfigError, match="the LM of role 'lm' is 3"):
        lmpipe.load(saved, 3)  # type: ignore[arg-type]


def test_prompts_run_on_any_lm_but_only_in_their_program(tmp_path: Path) -> None:
    program, session = Colour(), Session(scripted())
    result = BootstrapFewShotRandomSearch(exact_match).optimize(program, None, examples(8), examples(8, 8), session)
    folder = result.save(tmp_path / "prompts")
    with pytest.raises(ConfigError, match=r"how to load the LM 'scripted' .* lmpipe\.load\('.*prompts', lm=\.\.\.\)"):
        lmpipe.load(folder)
    loaded = lmpipe.load(folder, ScriptedLM(colour_script, name="another"))
    with result.session as first, loaded as second:
        assert program(number=20) is not None
        assert second.history()[0].text == (program(number=20) and second.history()[0].text)
        assert first.state is not None
    assert loaded.state is not None
    assert loaded.state.prompts == result.state.prompts
    assert loaded.state.weights["lm"].base == "another"
    with loaded, pytest.raises(ConfigError, match="the state does not fit the program: it is for 'answer', 'hint'"):
        lmpipe.Predict("question -> reply")(question="?")


def test_what_a_session_needs_besides_its_lm_is_asked_for(store: RunStore, tmp_path: Path) -> None:
    session = Session(scripted(), embedder=NumberLine())
    result = KNNFewShot(exact_match).optimize(Colour(), None, examples(8), [], session)
    folder = result.save(tmp_path / "nearest")
    with pytest.raises(ConfigError, match="with the embedder 'number line', and none was passed"):
        lmpipe.load(folder, scripted())
    with pytest.raises(ConfigError, match="with the embedder 'number line', and this one is 'other'"):
        lmpipe.load(folder, scripted(), embedder=NumberLine("other"))
    loaded = lmpipe.load(folder, scripted(), embedder=NumberLine())
    assert completions(loaded) == completions(result.session)


def damaged(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "damaged")


def test_damaged_and_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    for number, (name, error) in enumerate(
        {
            "session.json": r"session\.json is damaged or was edited",
            "state.json": r"state\.json is damaged or was edited",
            "adapter/adapter_config.json": "the adapter in .* is missing or damaged",
            "adapter/adapter_model.safetensors": "the adapter in .* is missing or damaged",
        }.items()
    ):
        copy = shutil.copytree(saved, tmp_path / f"edited-{number}")
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(re.sub(rb"(\w)(?=[^\w]*$)", b"x", content.replace(b"Given", b"Gives")))
        with pytest.raises(CorruptBlob, match=error):
            lmpipe.load(copy)
        if name != "session.json":
            (copy / name).unlink()
            with pytest.raises(CorruptBlob, match=name.partition("/")[0]):
                lmpipe.load(copy)
    shutil.rmtree(copy / "adapter")
    with pytest.raises(CorruptBlob, match="the adapter in .* is missing or damaged"):
        lmpipe.load(copy)


def test_other_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing does not exist; pass a folder that result\.save"):
        lmpipe.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"has no session\.json; pass a folder that result\.save"):
        lmpipe.load(tmp_path)
    with pytest.raises(ConfigError, match="holds one saved state, not a run; leave out strategy and seed"):
        lmpipe.load(saved, seed=0)


KILLED = """
import os, signal, sys
from pathlib import Path
from lmpipe.errors import LmpipeError
import lmpipe
from lmpipe.storage import files
from tests.results.test_saving import resaved
resaved(Path(sys.argv[1]), Path(sys.argv[2]), kill_at=sys.argv[3])
"""


def test_a_save_that_fails_or_is_killed_leaves_no_folder(saved: Path, tmp_path: Path) -> None:
    with RunStore(tmp_path / "run") as store:
        session = replace(lmpipe.load(saved), store=store)
        assert session.state is not None
        result = OptimizeResult(state=session.state).with_session(session)
        with pytest.raises(StoreError, match="cannot be written"):
            result.save(saved / "state.json" / "folder")
        broken = replace(session.with_adapters({str(session.state.weights["lm"].adapter): tmp_path}), store=store)
        with pytest.raises(CorruptBlob, match="is missing or damaged"):
            result.with_session(broken).save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

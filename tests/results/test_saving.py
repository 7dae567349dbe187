"""A state that was found is saved and loaded again: with its adapters, its LMs and its settings."""

from __future__ import annotations

import json
import random
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lmpipe
from lmpipe import (
    LM,
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
from lmpipe.cli import app
from lmpipe.errors import ConfigError, CorruptBlob, LmpipeError, SessionError, StoreError
from lmpipe.lm import LMSource
from lmpipe.results.saved import SavedLM
from lmpipe.run_directory import open_run
from lmpipe.storage.checksummed_json import read_checksummed, write_checksummed
from lmpipe.storage.files import delete
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune, KNNFewShot
from tests.damage import DAMAGES
from tests.rivers import EXAMPLES, ToTheSea, WordOverlap, reader
from tests.scripted import Colour, NumberLine, colour_script, examples, scripted
from tests.test_docs import run, snippets

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


def completions(session: Session, runs: int = 3) -> list[str | None]:
    """What the LM writes in some runs of the program, each of which calls it three times."""
    with session:
        for number in range(runs):
            Colour()(number=number)
    return [step.text for step in session.history(3 * runs)]


def load_lm_of(saved: Path) -> LM:
    return lmpipe.load(saved).lm_of("lm")


def script(folder: Path, code: str, *arguments: str | Path) -> str:
    """What a script prints that runs in a process of its own, in a folder."""
    path = folder.parent / "script.py"
    path.write_text(code)
    return run(path, folder, *map(str, arguments))


LOADING = """
import json, sys
import lmpipe
from tests.results.test_saving import completions
print(json.dumps(completions(lmpipe.load(sys.argv[1]))))
"""


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
    assert json.loads(script(tmp_path, LOADING, saved)) == before
    session = lmpipe.load(saved)
    assert (session.seed, session.sampling, session.structured) == (3, Sampling(max_tokens=12), True)
    assert session.store is None


def test_a_folder_can_be_moved(saved: Path, tmp_path: Path) -> None:
    before = json.loads((saved.parent / "completions.json").read_text())
    moved = shutil.copytree(saved, tmp_path / "moved")
    assert completions(lmpipe.load(moved)) == before


def test_a_relative_path_stays_valid_when_the_working_directory_changes(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((saved.parent / "completions.json").read_text())
    monkeypatch.chdir(saved.parent)
    session = lmpipe.load(saved.name)
    monkeypatch.chdir(tmp_path)
    assert completions(session) == before


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
        trainer = LocalTrainer(session.lm_of("lm"), TUNING)  # type: ignore[arg-type]
        stages = {"w": BootstrapFinetune(always, trainer, init="current", adapters="module")}
        result = BetterTogether(always, stages, "w").optimize(Colour(), None, examples(4), examples(2, 4), session)
        again = result.save(tmp_path / "again")
        # one module with its new adapter, which is in the store, and one with the old one, which is in the saved folder
        hint = result.state.weights["lm/hint"]
        mixed = session.using(loaded.state.with_weights("lm/hint", hint))  # type: ignore[union-attr]
        assert mixed.state is not None
        OptimizeResult(state=mixed.state).with_session(mixed).save(tmp_path / "both")
        expected, expected_of_both = completions(result.session), completions(mixed)
    shutil.rmtree(tmp_path / "run")
    assert completions(lmpipe.load(again)) == expected
    assert completions(lmpipe.load(tmp_path / "both")) == expected_of_both


def test_a_state_is_loaded_from_the_run_directory_of_a_script(tiny_folder: Path, tmp_path: Path) -> None:
    with RunStore(tmp_path / "run") as store:
        session = tiny_session(tiny_folder, store)
        trainer = LocalTrainer(session.lm_of("lm"), TUNING)  # type: ignore[arg-type]
        better = BetterTogether(always, {"w": BootstrapFinetune(always, trainer)}, "w")
        result = better.optimize(Colour(), None, examples(4), examples(2, 4), session)
        loaded = lmpipe.load(tmp_path / "run", strategy="w", seed=3)  # while the run has it open
        assert (loaded.state, loaded.sampling, loaded.structured) == (result.state, session.sampling, True)
        assert completions(loaded) == completions(result.session)
    run_cli = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "exported")])
    assert run_cli.exit_code == 0
    assert completions(lmpipe.load(tmp_path / "exported")) == completions(loaded)


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
    with loaded:
        assert program(number=20).answer == "blue"
    assert loaded.state is not None
    assert loaded.state.prompts == result.state.prompts
    assert loaded.state.weights["lm"].base == "another"
    with loaded, pytest.raises(ConfigError, match="the state does not fit the program: it is for 'answer', 'hint'"):
        lmpipe.Predict("question -> reply")(question="?")


def test_an_embedder_or_a_retriever_is_asked_for(tmp_path: Path) -> None:
    session = Session(scripted(), embedder=NumberLine())
    result = KNNFewShot(exact_match).optimize(Colour(), None, examples(8), [], session)
    folder = result.save(tmp_path / "nearest")
    with pytest.raises(ConfigError, match="with the embedder 'number line', and none was passed"):
        lmpipe.load(folder, scripted())
    with pytest.raises(ConfigError, match="with the embedder 'number line', and this one is 'other'"):
        lmpipe.load(folder, scripted(), embedder=NumberLine("other"))
    assert lmpipe.load(folder, scripted(), embedder=NumberLine()).state == result.state
    assert "`embedder=...`: `number line`" in (folder / "README.md").read_text()
    rivers = Session(ScriptedLM(reader), retriever=WordOverlap())
    found = BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=1).optimize(
        ToTheSea(), None, EXAMPLES[:2], EXAMPLES[2:], rivers
    )
    folder = found.save(tmp_path / "rivers")
    with pytest.raises(ConfigError, match=r"searches with the retriever .*; pass it: lmpipe\.load"):
        lmpipe.load(folder, ScriptedLM(reader))
    with lmpipe.load(folder, ScriptedLM(reader), retriever=WordOverlap()):
        assert ToTheSea()(city="Rome").answer == "Tyrrhenian Sea"


def test_keys_and_passwords_are_not_saved(tmp_path: Path) -> None:
    """The LM is loaded again with the key in the environment."""
    lm = load_lm("openai:m@https://me:pass@host/v1?api_key=abc, https://host2/v1", api_key="sk-1", timeout=9.0)
    assert not any(secret in repr(lm.loaded_from) for secret in ("pass", "abc", "sk-1"))
    session = Session(lm)
    state = lmpipe.initial_state(Colour(), session)
    folder = OptimizeResult(state=state).with_session(session).save(tmp_path / "saved")
    for path in folder.iterdir():
        assert not re.search("pass@|abc|sk-1", path.read_text()), path.name
    assert lmpipe.load(folder).lm_of("lm").loaded_from == LMSource(
        "openai:m@https://host/v1,https://host2/v1", {"timeout": 9.0}
    )


def test_options_are_saved_if_json_can_hold_them(tmp_path: Path) -> None:
    import torch

    described = SavedLM.create("m", LMSource("hf:m", {"dtype": torch.bfloat16, "tokenizer": Path("t")}))
    assert described == SavedLM(name="m", spec="hf:m", options={"dtype": "bfloat16", "tokenizer": "t"})
    assert SavedLM.create("m", LMSource("vllm:m", {"compilation": object()})) == SavedLM(name="m")
    assert SavedLM.create("m", LMSource("openai:m", {})) == SavedLM(name="m"), "no server is named"


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the Python snippets of a model card in its folder, and returns them."""
    card = snippets(folder / "README.md")
    (folder.parent / "card.py").write_text(card)
    monkeypatch.chdir(folder)
    runpy.run_path(str(folder.parent / "card.py"))
    return card


def test_the_snippets_of_a_card_run_as_they_stand(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = run_card(saved, monkeypatch)
    assert "lmpipe.load" in card
    assert "PeftModel.from_pretrained" in card


def test_the_bundled_lm_is_saved_with_an_adapter_that_its_card_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its base is not on the hub."""
    lm = load_lm("bundled")
    with RunStore(tmp_path / "run") as store:
        session = Session(lm, sampling=Sampling(max_tokens=8), store=store, structured=True)
        tune = BootstrapFinetune(always, LocalTrainer(lm, TuningConfig(rank=4, learning_rate=0.01, epochs=1)))
        result = tune.optimize(Colour(), None, examples(1), [], session)
        folder = result.save(tmp_path / "bundled")
        expected = completions(result.session, runs=1)
    assert "bundled_lm_folder()" in run_card(folder, monkeypatch)
    assert completions(lmpipe.load(folder), runs=1) == expected


def test_a_card_of_a_whole_model_loads_it_without_peft(
    tiny_folder: Path, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tiny_session(tiny_folder, store)
    trainer = LocalTrainer(session.lm_of("lm"), TuningConfig(method="full", epochs=1))  # type: ignore[arg-type]
    result = BootstrapFinetune(always, trainer).optimize(Colour(), None, examples(2), [], session)
    folder = result.save(tmp_path / "full")
    assert "PeftModel" not in run_card(folder, monkeypatch)
    assert completions(lmpipe.load(folder)) == completions(result.session)


def loaded_state(folder: Path, lm: LM) -> ProgramState | str | None:
    """The state in a folder, or the error that refuses it."""
    try:
        return lmpipe.load(folder, lm).state
    except LmpipeError as error:
        return str(error)


def test_every_damage_of_a_file_is_detected_or_harmless(saved: Path, tmp_path: Path) -> None:
    rng, lm, undamaged = random.Random(0), load_lm_of(saved), lmpipe.load(saved).state
    errors = 0
    for name in ("session.json", "state.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        for number, damage in enumerate(DAMAGES.values()):
            copy = shutil.copytree(saved, tmp_path / f"{Path(name).name}-{number}")
            (copy / name).write_bytes(damage((saved / name).read_bytes(), rng))
            state = loaded_state(copy, lm)
            assert state == undamaged or str(copy) in str(state)
            errors += isinstance(state, str)
    assert errors > 3 * len(DAMAGES)


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    lm = load_lm_of(saved)
    for number, name in enumerate(("state.json", "adapter/adapter_config.json", "adapter")):
        copy = shutil.copytree(saved, tmp_path / str(number))
        delete(copy / name)
        with pytest.raises(CorruptBlob, match=f"{copy}/{name.partition('/')[0]}"):
            lmpipe.load(copy, lm)


def test_a_folder_of_another_version_is_refused(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    fields = read_checksummed(copy / "session.json")
    write_checksummed(copy / "session.json", {**fields, "format": 2, "lmpipe": "9.0"})
    with pytest.raises(ConfigError, match=r"its format is 2, and this lmpipe reads 1; load it with lmpipe 9\.0"):
        lmpipe.load(copy)
    write_checksummed(copy / "session.json", {**fields, "session": {"lm": 3}})
    with pytest.raises(ConfigError, match=r"session\.json is invalid: session\.lm: Input"):
        lmpipe.load(copy)


def test_a_base_that_is_elsewhere_now_can_be_passed(tiny_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    session = Session(load_lm(f"hf:{base}"))
    state = lmpipe.initial_state(Colour(), session)
    folder = OptimizeResult(state=state).with_session(session).save(tmp_path / "saved")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=rf"cannot be loaded: .*no such folder; .* name='{base}'"):
        lmpipe.load(folder)
    assert lmpipe.load(folder, load_lm(f"hf:{moved}", name=str(base))).state == state


def test_a_saved_state_is_no_run_directory(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a saved state, not a run directory; .* lmpipe.load\("):
        open_run(saved)


def test_other_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    wrong: Any = None
    with pytest.raises(ConfigError, match=r"folder is None; .*; write lmpipe.load\('folder'\)"):
        lmpipe.load(wrong)
    with pytest.raises(ConfigError, match="seed is '0'; it must be a whole number"):
        lmpipe.load(saved, seed="0")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"missing is not a folder; pass one that result\.save"):
        lmpipe.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="is not a run directory"):
        lmpipe.load(tmp_path)
    with pytest.raises(ConfigError, match="holds one saved state, not a run; leave out strategy and seed"):
        lmpipe.load(saved, seed=0)


def test_a_save_that_is_killed_leaves_no_folder_or_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code = "import sys\nfrom pathlib import Path\nfrom tests.killed_saves import main\nmain(Path(sys.argv[1]))\n"
    kills, rest = script(tmp_path / "out", code, tmp_path / "out").split(" ", 1)
    assert int(kills) > 50
    assert rest == "True ['run', 'saved']\n"
    assert (tmp_path / "out" / "saved" / "adapter").is_dir()


def test_a_save_that_fails_leaves_no_folder(saved: Path, tmp_path: Path) -> None:
    session = lmpipe.load(saved)
    assert session.state is not None
    result = OptimizeResult(state=session.state).with_session(session)
    with pytest.raises(StoreError, match="cannot be written"):
        result.save(saved / "state.json" / "folder")
    (adapter,) = {str(weights.adapter) for weights in session.state.weights.values()}
    broken = session.with_adapters({adapter: tmp_path})
    with pytest.raises(CorruptBlob, match="is missing or damaged"):
        result.with_session(broken).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())

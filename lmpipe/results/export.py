"""Exports the final state of a strategy: a folder with the state, adapters in PEFT's format, and a model card."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path

import jinja2

from lmpipe.errors import ConfigError
from lmpipe.results.result import StrategyOutcome, StrategyReport
from lmpipe.results.run_reader import FinishedRun, prompts_sent
from lmpipe.storage.files import explain_write_errors, write_atomically
from lmpipe.text.cleaning import clean_text
from lmpipe.text.markdown import as_block, as_code, as_line

_CARD = "model_card.md.jinja"
_NOT_IN_NAME = re.compile(r"[^\w.-]")  # characters that are replaced in the name of a folder


def export(run: FinishedRun, outcome: StrategyOutcome, row: StrategyReport, target: Path) -> None:
    """Writes ``state.json``, a folder for each adapter and ``README.md``.

    Args:
        run: Run with the strategy.
        outcome: Outcome of the strategy on one seed.
        row: Report of the strategy.
        target: Path of the folder, which must not exist.

    Raises:
        ConfigError: If the folder exists.
        CorruptBlob: If an adapter is missing or damaged.
        StoreError: If the folder cannot be written.
    """
    if os.path.lexists(target):
        raise ConfigError(f"{target} already exists; name another folder")
    with explain_write_errors(target):
        target.mkdir(parents=True)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, target, ignore_errors=True)
        adapters = _adapters(outcome)
        for name, digest in adapters.items():
            run.copy_adapter(digest, target / name)
        state = json.dumps(outcome.state.model_dump(mode="json"), indent=2, ensure_ascii=False)
        write_atomically(target / "state.json", (state + "\n").encode(errors="backslashreplace"))
        write_atomically(target / "README.md", _card(run, outcome, row, adapters).encode())
        undo.pop_all()


def _adapters(outcome: StrategyOutcome) -> dict[str, str]:
    """Folder name → digest of its adapter.

    A single adapter is in the folder ``adapter``; several have a folder each, named by role and module.
    """
    tuned = {key: weights.adapter for key, weights in outcome.state.weights.items() if weights.adapter}
    if len(tuned) == 1:
        return {"adapter": next(iter(tuned.values()))}
    return {"adapter-" + _NOT_IN_NAME.sub("-", key): digest for key, digest in tuned.items()}


def _card(run: FinishedRun, outcome: StrategyOutcome, row: StrategyReport, adapters: dict[str, str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(),
    )
    environment.filters |= {"line": as_line, "code": as_code, "fenced": as_block, "shell": _shell_word}
    tuning = run.result.config.get("tuning")
    return environment.get_template(_CARD).render(
        result=run.result,
        base=clean_text(run.result.lm.partition("@")[0]),  # the suffix names the dtype or quantization of the weights
        rank=tuning.get("rank") if isinstance(tuning, dict) else None,
        row=row,
        seed=outcome.seed,
        score=row.test_score(outcome.seed),
        adapters=adapters,
        prompts=prompts_sent(run.records(outcome)),
    )


def _shell_word(text: object) -> str:
    """Quotes a text as one word of a command line."""
    return shlex.quote(" ".join(clean_text(str(text)).split()))

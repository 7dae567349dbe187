"""Exports the final state of a strategy of a run, as a saved session with a model card."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from lmpipe.errors import ConfigError
from lmpipe.lm import LMSource, Sampling
from lmpipe.results.model_card import CardFacts
from lmpipe.results.result import StrategyOutcome, StrategyReport
from lmpipe.results.run_reader import FinishedRun
from lmpipe.results.saved import SavedLM, SavedSession, write_saved
from lmpipe.text.figures import fixed, name_seeds
from lmpipe.text.markdown import as_code


def export(run: FinishedRun, outcome: StrategyOutcome, row: StrategyReport, target: Path) -> None:
    """Writes the state of an outcome to a folder that `lmpipe.load` reads.

    Args:
        run: Run with the strategy.
        outcome: Outcome of the strategy on one seed.
        row: Report of the strategy.
        target: Path of the folder.

    Raises:
        ConfigError: If the folder exists and holds anything else.
        CorruptBlob: If an adapter is missing or damaged.
        StoreError: If the folder cannot be written.
    """
    facts = CardFacts(
        program=run.result.task,
        found_by=as_code(row.strategy) + " (BetterTogether, arXiv 2407.10930)" * (run.examples == "test"),
        seed=outcome.seed,
        scores=_scores(run, outcome, row),
        prompts=run.prompts(outcome),
        settings=run.result.config,
    )
    write_saved(target, outcome.state, session_of(run, outcome), run.adapter_folder, facts)


def session_of(run: FinishedRun, outcome: StrategyOutcome) -> SavedSession:
    """Returns the LMs and settings that a run used for an outcome.

    Raises:
        ConfigError: If the run's settings are of another version.
    """
    if outcome.session is not None:
        return outcome.session
    config, provenance = run.result.config, run.provenance
    options = {name: provenance[name] for name in ("dtype", "quantization") if provenance.get(name)}
    source = LMSource(str(provenance["lm"]), options) if "dtype" in provenance else None
    task = provenance["task"]
    try:
        return SavedSession(
            lm={"lm": SavedLM.create(run.result.lm, source)},
            seed=outcome.seed,
            sampling=Sampling(config["temperature"], config["top_p"], config["max_tokens"], tuple(config["stop"])),
            structured=config["structured"],
            retriever=(task.get("retriever") or None) if isinstance(task, dict) else None,
        )
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"{run.folder} has settings of another version: {error}; run it again") from error


def _scores(run: FinishedRun, outcome: StrategyOutcome, row: StrategyReport) -> list[str]:
    """Returns sentences about the scores of a strategy."""
    if run.examples == "validation":
        return [f"Score: {row.val.percent} %, with {run.intervals}."]
    score = row.test_score(outcome.seed)
    alone = "— (there was nothing to learn from)" if score is None else f"{fixed(100 * score, row.test.decimals)} %"
    return [
        f"Test score of this seed: {alone}.",
        f"Over {name_seeds(run.result.seeds)}: {row.test.percent} %, with {run.intervals}.",
    ]

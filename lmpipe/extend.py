"""All names that authors of optimizers, engines, retrievers, trainers and tasks import besides those of `lmpipe`.

Names that need torch or another extra are loaded on first use, so importing this module is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmpipe._lazy import lazy_attributes
from lmpipe.embedder import Embedder
from lmpipe.engines import load_embedder
from lmpipe.errors import ConfigError, SessionError, StrategyError, TrainingDiverged
from lmpipe.events import (
    Callback,
    CandidateScored,
    EpochEnded,
    Event,
    FindingMade,
    ResultRecalled,
    StageEnded,
    StageStarted,
    TracesCollected,
)
from lmpipe.ledger import Cost, ModuleCost
from lmpipe.lm import Message, Usage
from lmpipe.metrics import Z_95, answer_f1, best_index, check_metric, finite_values, number_match, paired_interval
from lmpipe.optimize_result import Candidate, Finding, StageResult
from lmpipe.program.evaluate import Measure, evaluate_many
from lmpipe.program.failures import CommonFailure, FailureCounts, dominant_failure
from lmpipe.program.identity import identity, work_key
from lmpipe.progress import Progress
from lmpipe.prompting.signature import Field
from lmpipe.prompting.template import Template
from lmpipe.prompting.values import render_input
from lmpipe.reporter import Reporter
from lmpipe.results.run_reader import FinishedRun
from lmpipe.run_directory import open_run
from lmpipe.runtime.call_context import current_context
from lmpipe.runtime.trace import RetrievalStep, module_costs
from lmpipe.splits import shuffled, subsample
from lmpipe.state import DemoSelection
from lmpipe.storage.hashing import canonical_json, derive_seed, digest
from lmpipe.text.cleaning import clean_text
from lmpipe.text.display import did_you_mean, shorten, shown
from lmpipe.text.figures import percent, points
from lmpipe.trackers import Tracker, load_tracker
from lmpipe.trainer import DPOLoss, Objective, PolicyGradientLoss, SFTLoss, TrainingResult, TrainingRow
from lmpipe.validation.arguments import check_type, check_whole_number
from lmpipe.validation.checks import UnitInterval, check_examples, check_settings, deduplicate, digest_without_id

if TYPE_CHECKING:
    from lmpipe.engines.bundled import bundled_lm_folder
    from lmpipe.engines.cached import CachedLM
    from lmpipe.engines.local import LocalLM
    from lmpipe.engines.server import ServerLM
    from lmpipe.retrieval.colbert import load_encoder
    from lmpipe.retrieval.index import build_index
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            "CachedLM": ("lmpipe.engines.cached", "local"),
            "LocalLM": ("lmpipe.engines.local", "local"),
            "ServerLM": ("lmpipe.engines.server", "server"),
            "bundled_lm_folder": ("lmpipe.engines.bundled", "local"),
            "build_index": ("lmpipe.retrieval.index", "retrieval"),
            "load_encoder": ("lmpipe.retrieval.colbert", "retrieval"),
        },
    )

__all__ = [
    "Z_95",
    "CachedLM",
    "Callback",
    "Candidate",
    "CandidateScored",
    "CommonFailure",
    "ConfigError",
    "Cost",
    "DPOLoss",
    "DemoSelection",
    "Embedder",
    "EpochEnded",
    "Event",
    "FailureCounts",
    "Field",
    "Finding",
    "FindingMade",
    "FinishedRun",
    "LocalLM",
    "Measure",
    "Message",
    "ModuleCost",
    "Objective",
    "PolicyGradientLoss",
    "Progress",
    "Reporter",
    "ResultRecalled",
    "RetrievalStep",
    "SFTLoss",
    "ServerLM",
    "SessionError",
    "StageEnded",
    "StageResult",
    "StageStarted",
    "StrategyError",
    "Template",
    "TracesCollected",
    "Tracker",
    "TrainingDiverged",
    "TrainingResult",
    "TrainingRow",
    "UnitInterval",
    "Usage",
    "answer_f1",
    "best_index",
    "build_index",
    "bundled_lm_folder",
    "canonical_json",
    "check_examples",
    "check_metric",
    "check_settings",
    "check_type",
    "check_whole_number",
    "clean_text",
    "current_context",
    "deduplicate",
    "derive_seed",
    "did_you_mean",
    "digest",
    "digest_without_id",
    "dominant_failure",
    "evaluate_many",
    "finite_values",
    "identity",
    "lazy_attributes",
    "load_embedder",
    "load_encoder",
    "load_tracker",
    "module_costs",
    "number_match",
    "open_run",
    "paired_interval",
    "percent",
    "points",
    "render_input",
    "shorten",
    "shown",
    "shuffled",
    "subsample",
    "work_key",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

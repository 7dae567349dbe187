"""lmpipe: language-model pipelines that teach themselves.

A program is a frozen structure (`Module`); its prompts Π and weights Θ are one explicit value (`ProgramState`); an
`Optimizer` is a function from such a value to a better one; an `LM` and a `Retriever` answer batches. Importing this
package does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmpipe import _lazy, _neighbours
from lmpipe._version import __version__ as __version__
from lmpipe.data import Example, Prediction
from lmpipe.engines import load_lm
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import EngineError, LmpipeError, ParseError
from lmpipe.ledger import Budget
from lmpipe.lm import LM, Completion, Request, Sampling, ScriptedLM
from lmpipe.metrics import Metric, exact_match
from lmpipe.optimize_result import OptimizeResult
from lmpipe.optimizer import Optimizer, PromptOptimizer, WeightOptimizer
from lmpipe.program.evaluate import Evaluation, evaluate
from lmpipe.program.module import Module
from lmpipe.program.predict import ChainOfThought, Predict, initial_state, predictors
from lmpipe.program.retrieve import Retrieve
from lmpipe.program.rollout import Job, rollout
from lmpipe.prompting.signature import Input, Output, Signature, signature
from lmpipe.retrieval import load_retriever
from lmpipe.retriever import Passage, Retriever
from lmpipe.runtime.session import Session
from lmpipe.runtime.trace import Step, Trace
from lmpipe.state import Demo, ProgramState, PromptState, WeightState
from lmpipe.storage.store import RunStore
from lmpipe.trainer import Trainer

if TYPE_CHECKING:
    from lmpipe.engines.training import LocalTrainer
else:
    __getattr__ = _lazy.lazy_attributes(__name__, {"LocalTrainer": ("lmpipe.engines.training", "local")})

__all__ = [
    "LM",
    "Budget",
    "ChainOfThought",
    "Completion",
    "Demo",
    "EngineError",
    "Evaluation",
    "Example",
    "Input",
    "Job",
    "LmpipeError",
    "LocalTrainer",
    "Metric",
    "Module",
    "OptimizeResult",
    "Optimizer",
    "Output",
    "ParseError",
    "Passage",
    "Predict",
    "Prediction",
    "ProgramState",
    "PromptOptimizer",
    "PromptState",
    "Request",
    "Retrieve",
    "Retriever",
    "RunStore",
    "Sampling",
    "ScriptedLM",
    "Session",
    "Signature",
    "Step",
    "Trace",
    "Trainer",
    "TuningConfig",
    "WeightOptimizer",
    "WeightState",
    "evaluate",
    "exact_match",
    "initial_state",
    "load_lm",
    "load_retriever",
    "predictors",
    "rollout",
    "signature",
]

_neighbours.warn_about_other_packages("optimizers", "programs")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

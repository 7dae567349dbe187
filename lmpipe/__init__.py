"""lmpipe: language-model pipelines that teach themselves.

A program is frozen structure (`Module`); its prompts Π and weights Θ are one explicit value (`ProgramState`); an
`Optimizer` is a function from such a value to a better one; an `LM` answers batches. Importing this loads no torch.
"""

from __future__ import annotations

from lmpipe.data import Example, Prediction
from lmpipe.errors import EngineError, LmpipeError, ParseError
from lmpipe.evaluate import Evaluation, evaluate
from lmpipe.ledger import Budget
from lmpipe.lm import LM, Completion, Request, Sampling, ScriptedLM
from lmpipe.metrics import Metric, exact_match
from lmpipe.module import Module
from lmpipe.optimizer import Optimizer, OptimizeResult, PromptOptimizer, WeightOptimizer
from lmpipe.predict import ChainOfThought, Predict, initial_state, predictors
from lmpipe.rollout import Job, rollout
from lmpipe.session import Session
from lmpipe.signature import Input, Output, Signature, signature
from lmpipe.state import Demo, ProgramState, PromptState, WeightState
from lmpipe.store import RunStore
from lmpipe.trace import Step, Trace
from lmpipe.trainer import Trainer

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
    "Metric",
    "Module",
    "OptimizeResult",
    "Optimizer",
    "Output",
    "ParseError",
    "Predict",
    "Prediction",
    "ProgramState",
    "PromptOptimizer",
    "PromptState",
    "Request",
    "RunStore",
    "Sampling",
    "ScriptedLM",
    "Session",
    "Signature",
    "Step",
    "Trace",
    "Trainer",
    "WeightOptimizer",
    "WeightState",
    "evaluate",
    "exact_match",
    "initial_state",
    "predictors",
    "rollout",
    "signature",
]

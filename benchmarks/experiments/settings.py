"""How the stages of a benchmark run are set: the paper's settings, and what differs for the bundled LM.

Every field is a plain value, so a run's settings are part of its ``result.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, final

import tomli_w
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from lmpipe import Budget, Metric, Optimizer, Sampling
from lmpipe.engines.training import TuningConfig
from lmpipe.errors import ConfigError
from lmpipe.trainer import Trainer
from optimizers import VANILLA, BootstrapFewShotRandomSearch, BootstrapFinetune, format_strategy, parse_strategy

STAGES = ("p", "w")
"""What strategies are made of."""

BASELINES = (VANILLA, "p", "w")
"""What every strategy is tested against: nothing learned, prompts alone, weights alone."""

ROWS = (*BASELINES, "p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p")
"""The strategies of the paper's table."""


def table_rows(strategies: Iterable[str]) -> list[str]:
    """Some strategies as the rows of a table: each once and in its plain form, `BASELINES` first.

    Raises:
        StrategyError: If one cannot be read.
    """
    rows = dict.fromkeys(format_strategy(parse_strategy(text, STAGES)) for text in strategies)
    return [row for row in BASELINES if row in rows] + [row for row in rows if row not in BASELINES]


@final
class Settings(BaseModel):
    """The defaults are the paper's (arXiv 2407.10930); `BootstrapFewShotRandomSearch`, `BootstrapFinetune`,
    `TuningConfig`, `BetterTogether` and `Budget` say what each means."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    train: PositiveInt = 1000
    val: PositiveInt = 500
    test: PositiveInt = 1500
    temperature: float = 0.1
    top_p: float = 0.97
    max_tokens: PositiveInt = 1024
    stop: tuple[str, ...] = ()
    structured: bool = False

    num_candidate_programs: int = 6
    max_bootstrapped_demos: int = 3
    max_labeled_demos: int = 3
    num_train: int = 100
    num_val: int = 250
    max_rounds: int = 1
    partial_labels: bool = False

    rollouts_per_example: int = 1
    max_rollouts_per_example: int | None = None
    rollout_temperature: float | None = None
    vary_demos: bool = False
    balance: bool = False
    deduplicate: bool = False

    tuning: TuningConfig = TuningConfig()

    num_train_scored: int = 50
    max_lm_calls: int | None = None
    max_total_tokens: int | None = None
    max_seconds: float | None = None

    prompts_from: Literal["original", "current"] = "original"
    select: Literal["last", "best"] = "last"

    def changed(self, changes: Mapping[str, object]) -> Settings:
        """Others with some changed; of `tuning`, fields may be given, and ``"none"`` stands for none.

        Raises:
            ConfigError: If there is no such setting, or a value cannot be one.
        """
        known = {name: getattr(self, name) for name in type(self).model_fields}
        try:
            wanted = _without_none(changes)
            if isinstance(wanted.get("tuning"), Mapping):
                wanted["tuning"] = {**asdict(self.tuning), **wanted["tuning"]}
            return Settings.model_validate({**known, **wanted})
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ConfigError(f"these settings cannot be: {wrong}") from error
        except (TypeError, RecursionError) as error:
            raise ConfigError(f"these settings cannot be: {error}") from error

    def sampling(self) -> Sampling:
        """How completions are drawn outside of bootstrapping."""
        return Sampling(self.temperature, self.top_p, self.max_tokens, self.stop)

    def budget(self) -> Budget | None:
        """What the stages of a strategy may spend together, if that is limited."""
        limits = (self.max_lm_calls, self.max_total_tokens, self.max_seconds)
        return Budget(*limits) if any(limit is not None for limit in limits) else None

    def optimizers(self, metric: Metric, trainer: Trainer | None, label: str | None) -> dict[str, Optimizer]:
        """The stages that strategies name: ``p`` searches prompts, ``w`` tunes weights where something can train."""
        stages: dict[str, Optimizer] = {
            "p": BootstrapFewShotRandomSearch(
                metric,
                max_bootstrapped_demos=self.max_bootstrapped_demos,
                max_labeled_demos=self.max_labeled_demos,
                num_candidate_programs=self.num_candidate_programs,
                num_train=self.num_train,
                num_val=self.num_val,
                max_rounds=self.max_rounds,
                partial_labels=self.partial_labels,
                stratify_by=label,
            )
        }
        if trainer is not None:
            stages["w"] = BootstrapFinetune(
                metric,
                trainer,
                rollouts_per_example=self.rollouts_per_example,
                max_rollouts_per_example=self.max_rollouts_per_example,
                temperature=self.rollout_temperature,
                vary_demos=self.vary_demos,
                deduplicate=self.deduplicate,
                balance_by=label if self.balance else None,
            )
        return stages


_PAPER: dict[str, Settings] = {
    "iris": Settings(train=50, val=50, test=50, num_train=15, num_val=35),
    "hotpotqa": Settings(partial_labels=True),
    "gsm8k": Settings(test=1319),
}

_FEW_ROWS = TuningConfig(rank=16, alpha=32, target_modules="all-linear", learning_rate=1e-3, beta2=0.95)

# Zero-shot it never keeps the reply form, so completions are held to it, and one answer in some thirty is right:
# several sampled runs of each example find those.
_RARELY_RIGHT: dict[str, object] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "structured": True,
    "num_candidate_programs": 1,
    "num_train": 40,
    "rollouts_per_example": 2,
    "max_rollouts_per_example": 4,
    "rollout_temperature": 0.7,
    "deduplicate": True,
    "tuning": replace(_FEW_ROWS, warmup_steps=2, epochs=3, batch_size=4),
    "num_train_scored": 0,
}

# A 135M LM needs greedy decoding, short answers, a learning rate for few rows, and many varied runs.
_BUNDLED: dict[str, dict[str, object]] = {
    # Under one prompt it names one class for all flowers, and only other demonstrations make it name another.
    "iris": {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 24,
        "rollouts_per_example": 4,
        "max_rollouts_per_example": 64,
        "rollout_temperature": 0.8,
        "vary_demos": True,
        "balance": True,
        "deduplicate": True,
        "tuning": replace(_FEW_ROWS, warmup_steps=6, epochs=7, batch_size=6),
    },
    # A demonstration holds up to six passages, so there are few. A search sees half of the validation set, as in the
    # paper, and a quarter of the training set: eight rows on three seeds take six hours of one core.
    "hotpotqa": {
        **_RARELY_RIGHT,
        "train": 100,
        "val": 50,
        "test": 100,
        "max_tokens": 48,
        "stop": ("\n\n",),
        "max_bootstrapped_demos": 2,
        "num_train": 25,
        "num_val": 25,
    },
    "gsm8k": {**_RARELY_RIGHT, "train": 40, "val": 40, "test": 60, "max_tokens": 96, "num_val": 40},
}


def settings_of_paper(task: str) -> Settings:
    """The paper's settings of a task."""
    return _PAPER.get(task, Settings())


def settings_for(task: str, lm: str) -> Settings:
    """The paper's settings of a task, or those that suit the bundled LM."""
    settings = settings_of_paper(task)
    return settings.changed(_BUNDLED.get(task, {})) if lm == "bundled" else settings


def as_toml(settings: Settings) -> str:
    """Settings as a file for ``--config``; TOML has no word for none, so it is written ``"none"``."""
    return tomli_w.dumps({"settings": _with_none(settings.model_dump(mode="json"))})


def _with_none(values: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: "none" if value is None else value for name, value in values.items()}
    return {name: _with_none(value) if isinstance(value, Mapping) else value for name, value in named.items()}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: None if value == "none" else value for name, value in values.items()}
    return {name: _without_none(value) if isinstance(value, Mapping) else value for name, value in named.items()}

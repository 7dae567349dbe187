"""The settings of an experiment, as one plain value whose defaults are the paper's.

Every field is also an option of the command line (`benchmarks.experiments.setting_options`), with the description and
the help panel that are declared with it. A run's ``result.json`` contains its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, final

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from lmpipe import Budget, Metric, Optimizer, Sampling
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError
from lmpipe.trainer import Trainer
from optimizers import BootstrapFewShotRandomSearch, BootstrapFinetune

_DATA = "Settings: data"
_SAMPLING = "Settings: sampling"
_SEARCH = "Settings: prompt search (p)"
_FINETUNE = "Settings: fine-tuning data (w)"
_TUNING = "Settings: training (w)"
_SCHEDULE = "Settings: schedule"
_LIMITS = "Settings: limits of a strategy"


def _setting(panel: str, default: Any, description: str) -> Any:
    return Field(default=default, description=description, json_schema_extra={"panel": panel})


@final
class Settings(BaseModel):
    """Settings of the stages and of the data. The defaults are the paper's (arXiv 2407.10930).

    `BootstrapFewShotRandomSearch`, `BootstrapFinetune`, `TuningConfig`, `BetterTogether` and `Budget` document the
    arguments of the same names in more detail.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    train: PositiveInt = _setting(_DATA, 1000, "Number of training examples")
    val: PositiveInt = _setting(_DATA, 500, "Number of validation examples")
    test: PositiveInt = _setting(_DATA, 1500, "Number of test examples")

    temperature: float = _setting(_SAMPLING, 0.1, "Sampling temperature; 0 is greedy decoding")
    top_p: float = _setting(_SAMPLING, 0.97, "Cumulative probability of the tokens that are sampled from")
    max_tokens: PositiveInt = _setting(_SAMPLING, 1024, "Maximum number of new tokens of an LM call")
    stop: tuple[str, ...] = _setting(_SAMPLING, (), "Texts that end a completion")
    structured: bool = _setting(_SAMPLING, False, "Constrain completions to the form that can be parsed")

    num_candidate_programs: int = _setting(_SEARCH, 6, "Random sets of demonstrations, besides the three fixed ones")
    max_bootstrapped_demos: int = _setting(_SEARCH, 3, "Maximum number of demonstrations made by the program itself")
    max_labeled_demos: int = _setting(_SEARCH, 3, "Maximum number of demonstrations made from labelled examples")
    num_train: int = _setting(_SEARCH, 100, "Training examples that demonstrations are made from")
    num_val: int = _setting(_SEARCH, 250, "Validation examples that candidates are scored on")
    max_rounds: int = _setting(
        _SEARCH, 1, "Runs of each training example until one succeeds and becomes a demonstration"
    )
    racing: bool = _setting(
        _SEARCH, False, "Drop candidates that can no longer win before they have run on all validation examples"
    )
    partial_labels: bool = _setting(
        _SEARCH, False, "Make labelled demonstrations of modules with unlabelled inputs too, and leave those inputs out"
    )

    rollouts_per_example: int = _setting(_FINETUNE, 1, "Runs of the program on each training example")
    max_rollouts_per_example: int | None = _setting(
        _FINETUNE, None, "Maximum number of runs on an example that has not succeeded yet"
    )
    max_idle_rounds: PositiveInt = _setting(
        _FINETUNE, 3, "Rounds in a row with hardly any success after which no further runs are made"
    )
    rollout_temperature: float | None = _setting(_FINETUNE, None, "Temperature of these runs, if it differs")
    vary_demos: bool = _setting(_FINETUNE, False, "Show other demonstrations in each run on an example")
    balance: bool = _setting(_FINETUNE, False, "Keep equally many rows of each class")
    deduplicate: bool = _setting(_FINETUNE, False, "Keep equal rows only once")

    tuning: TuningConfig = _setting(_TUNING, TuningConfig(), "How weights are tuned")

    num_train_scored: int = _setting(_SCHEDULE, 50, "Training examples that the program is scored on after each stage")

    max_lm_calls: int | None = _setting(_LIMITS, None, "Maximum number of LM calls of all stages")
    max_total_tokens: int | None = _setting(_LIMITS, None, "Maximum number of tokens read and written by all stages")
    max_seconds: float | None = _setting(_LIMITS, None, "Maximum time of all stages")

    prompts_from: Literal["original", "current"] = _setting(
        _SCHEDULE, "original", "Prompts that a prompt search after another stage starts from"
    )
    select: Literal["last", "best"] = _setting(
        _SCHEDULE, "last", "State that a strategy ends with: the last or the best"
    )

    def changed(self, changes: Mapping[str, object]) -> Settings:
        """Returns these settings with some of them changed.

        Args:
            changes: Setting → new value; ``"none"`` stands for None. The value of `tuning` may be a mapping of the
                fields that change.

        Raises:
            ConfigError: If a setting does not exist or its value is invalid.
        """
        current = {name: getattr(self, name) for name in type(self).model_fields}
        try:
            new = _with_none(changes)
            if isinstance(new.get("tuning"), Mapping):
                new["tuning"] = {**asdict(self.tuning), **new["tuning"]}
            return Settings.model_validate({**current, **new})
        except ValidationError as error:
            problems = (
                f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
                + '; write a list, on the command line as JSON: \'["a", "b"]\'' * (detail["type"] == "tuple_type")
                for detail in error.errors()
            )
            raise ConfigError(f"invalid settings: {'; '.join(problems)}") from error
        except (TypeError, RecursionError) as error:
            raise ConfigError(f"invalid settings: {error}") from error

    def sampling(self) -> Sampling:
        """Returns the sampling settings of all LM calls except those that make fine-tuning data."""
        return Sampling(self.temperature, self.top_p, self.max_tokens, self.stop)

    def budget(self) -> Budget | None:
        """Returns the limit on the total cost of the stages of a strategy, or None if there is no limit."""
        limits = (self.max_lm_calls, self.max_total_tokens, self.max_seconds)
        return Budget(*limits) if any(limit is not None for limit in limits) else None

    def optimizers(self, metric: Metric, trainer: Trainer | None, label: str | None) -> dict[str, Optimizer]:
        """Returns the optimizers of the stages: ``p`` searches prompts and, given a trainer, ``w`` tunes weights.

        Args:
            metric: Metric of the task.
            trainer: Trainer of the weights, if there is one.
            label: Label whose classes are kept in proportion, if there is one.
        """
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
                racing=self.racing,
            )
        }
        if trainer is not None:
            stages["w"] = BootstrapFinetune(
                metric,
                trainer,
                rollouts_per_example=self.rollouts_per_example,
                max_rollouts_per_example=self.max_rollouts_per_example,
                max_idle_rounds=self.max_idle_rounds,
                temperature=self.rollout_temperature,
                vary_demos=self.vary_demos,
                deduplicate=self.deduplicate,
                balance_by=label if self.balance else None,
            )
        return stages


def as_toml(settings: Settings) -> str:
    """Returns settings as a file for ``--config``; TOML cannot write None, so it is written ``"none"``."""
    return tomli_w.dumps({"settings": _without_none(settings.model_dump(mode="json"))})


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: "none" if value is None else value for name, value in values.items()}
    return {name: _without_none(value) if isinstance(value, Mapping) else value for name, value in named.items()}


def _with_none(values: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: None if value == "none" else value for name, value in values.items()}
    return {name: _with_none(value) if isinstance(value, Mapping) else value for name, value in named.items()}

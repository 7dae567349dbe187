"""Trackers: callbacks that log the scores, costs and losses of a run to TensorBoard, MLflow or Weights & Biases.

Each package is imported when its tracker is created, so that only the packages in use need to be installed. Knows the
events in `lmpipe.events`, but nothing about what causes them.

    with load_tracker("tensorboard:runs/board") as tracker:
        session = Session(lm=lm, callbacks=(tracker,))

The logged names are below; the step of a value is the number of events of its kind so far, from 1:

    stage/score, stage/stderr, stage/lm_calls, stage/tokens, stage/seconds; stages/p-w is the score of "p -> w"
    stage/low, stage/high: the 95 % interval of the score; stage/skipped: 1 for a skipped stage, else 0
    trace/kept, trace/tried, trace/solved, trace/examples, trace/rows: the rollouts that a stage learns from
    candidate/score, candidate/examples; candidates/p-w/shuffled 1 is the score of one candidate
    epoch/loss, epoch/eval_loss

Other events have no figures and are not logged.
"""

from __future__ import annotations

import importlib
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, final

from typing_extensions import Self

from lmpipe.errors import ConfigError
from lmpipe.events import (
    CandidateScored,
    EpochEnded,
    Event,
    FindingMade,
    ResultRecalled,
    StageEnded,
    StageStarted,
    TracesCollected,
)
from lmpipe.text.secrets import redact, redact_spec, secrets_in_url

Kind = Literal["stage", "trace", "candidate", "epoch"]


class Tracker(ABC):
    """A callback that logs values to a tracking system; as a context manager, it closes itself.

    An error while logging ends the run, as with any callback; it is a `ConfigError` that names the destination. A run
    that is started again with the same store continues.
    """

    def __init__(self) -> None:
        self._counts: Counter[Kind] = Counter()

    @final
    def __call__(self, event: Event) -> None:
        """Logs the figures of an event that has some, without values that are not finite."""
        if isinstance(event, (StageStarted, ResultRecalled, FindingMade)):
            return
        kind, values = _scalars(event)
        self._counts[kind] += 1
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.log(kind, finite, self._counts[kind])

    @abstractmethod
    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        """Logs the values of one event.

        Args:
            kind: Kind of the event.
            values: Values by name.
            step: Number of events of this kind so far, including this one.
        """

    @abstractmethod
    def close(self) -> None:
        """Writes pending values and closes the tracker; nothing can be logged afterwards."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@final
class TensorBoardTracker(Tracker):
    """Writes event files for TensorBoard, without TensorFlow or torch.

    Args:
        folder: Folder for the files.

    Raises:
        ConfigError: If tensorboard is not installed.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        writer = _import("tensorboard.summary", "tensorboard").Writer
        self._errors = partial(_as_config_error, f"TensorBoard cannot write to {redact(folder)!r}", OSError)
        with self._errors():
            self._writer = writer(folder)

    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        with self._errors():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        with self._errors():
            self._writer.close()


@final
class MlflowTracker(Tracker):
    """Logs to a run of MLflow.

    Args:
        uri: URI of the tracking server. A file (``sqlite:///runs.db``) requires the full package mlflow, and a folder
            requires the environment variable ``MLFLOW_ALLOW_FILE_STORE=true``.
        experiment: Name of the experiment; it is created if it does not exist.

    Raises:
        ConfigError: If mlflow is not installed or cannot use the URI.
    """

    def __init__(self, uri: str, experiment: str = "lmpipe") -> None:
        super().__init__()
        mlflow = _import("mlflow", "mlflow")
        kinds = (mlflow.MlflowException, ImportError, OSError)
        self._errors = partial(
            _as_config_error, f"MLflow cannot log to {redact_spec(uri)!r}", *kinds, secrets=secrets_in_url(uri)
        )
        with self._errors():
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            existing = self._client.get_experiment_by_name(experiment)
            experiment_id = self._client.create_experiment(experiment) if existing is None else existing.experiment_id
            self._run_id = self._client.create_run(experiment_id).info.run_id

    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        with self._errors():
            for name, value in values.items():
                self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        with self._errors():
            self._client.set_terminated(self._run_id)


@final
class WandbTracker(Tracker):
    """Logs to a run of Weights & Biases.

    Args:
        project: Name of the project.
        options: Arguments of ``wandb.init``, such as ``mode="offline"`` and ``dir``.

    Raises:
        ConfigError: If wandb is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        wandb = _import("wandb", "wandb")
        self._errors = partial(
            _as_config_error, f"Weights & Biases cannot log to {redact(project)!r}", wandb.Error, OSError
        )
        with self._errors():
            self._run = wandb.init(project=project, reinit="create_new", **options)
            for names in ("stage", "stages", "trace", "candidate", "candidates", "epoch"):
                self._run.define_metric(f"{names}/*", step_metric=f"{names.removesuffix('s')}/number")

    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        with self._errors():
            self._run.log({**values, f"{kind}/number": step})

    def close(self) -> None:
        with self._errors():
            self._run.finish()


def load_tracker(spec: str) -> Tracker:
    """Creates a tracker from a text such as ``"tensorboard:runs/board"``.

    Args:
        spec: ``"tensorboard:FOLDER"``, ``"mlflow:URI"`` or ``"wandb:PROJECT"``.

    Raises:
        ConfigError: If the text does not name a tracker, or its package is not installed.
    """
    match spec.partition(":"):
        case "tensorboard", _, folder if folder:
            return TensorBoardTracker(folder)
        case "mlflow", _, uri if uri:
            return MlflowTracker(uri)
        case "wandb", _, project if project:
            return WandbTracker(project)
    raise ConfigError(
        f"unknown tracker {redact_spec(spec)!r}; write 'tensorboard:FOLDER', 'mlflow:URI' or 'wandb:PROJECT'"
    )


def _scalars(event: StageEnded | TracesCollected | CandidateScored | EpochEnded) -> tuple[Kind, dict[str, float]]:
    """Returns the kind of an event and its values by name."""
    match event:
        case StageEnded(stage=stage, status=status, score=score, stderr=stderr, cost=cost, interval=(low, high)):
            values = {"score": score, "stderr": stderr, "low": low, "high": high, "skipped": int(status == "skipped")}
            values |= {"lm_calls": cost.lm_calls, "tokens": cost.tokens, "seconds": cost.seconds}
            return "stage", {**_prefixed("stage", values), _joined("stages", stage): score}
        case TracesCollected(kept=kept, tried=tried, solved=solved, examples=examples, rows=rows):
            values = {"kept": kept, "tried": tried, "solved": solved, "examples": examples}
            return "trace", _prefixed("trace", values if rows is None else {**values, "rows": rows})
        case CandidateScored(stage=stage, name=name, score=score, n=n):
            values = {"score": score, "examples": n}
            return "candidate", {**_prefixed("candidate", values), _joined("candidates", stage, name): score}
        case EpochEnded(loss=loss, eval_loss=eval_loss):
            values = {"loss": loss} if eval_loss is None else {"loss": loss, "eval_loss": eval_loss}
            return "epoch", _prefixed("epoch", values)


def _prefixed(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}


def _joined(*names: str) -> str:
    """Joins the parts of a name that all trackers accept; ``p -> w`` becomes ``p-w``."""
    parts = (name.replace(" -> ", "-") for name in names if name)
    return "/".join(re.sub(r"[^\w\-. ]", "_", part, flags=re.ASCII) for part in parts)


def _import(module: str, extra: str) -> Any:
    """Imports a module.

    Raises:
        ConfigError: If it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{error}; this tracker needs {extra}: pip install 'lmpipe[{extra}]'") from error


@contextmanager
def _as_config_error(problem: str, *kinds: type[Exception], secrets: Iterable[str] = ()) -> Iterator[None]:
    """Converts errors of a tracking package to `ConfigError`, without the credentials that its messages may contain.

    Raises:
        ConfigError: If the block raises an error of one of these kinds.
    """
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{problem}: {redact(str(error), secrets)}") from None

"""Trackers: callbacks that log a run's figures to TensorBoard, MLflow or Weights & Biases.

Each package is imported when its tracker is made, so none needs to be installed unless it is asked for. Knows the
events of `lmpipe.events`, and nothing of what causes them.

    with load_tracker("tensorboard:runs/board") as tracker:
        session = Session(lm=lm, callbacks=(tracker,))

The figures are numbered by kind, from 1 on:

    stage/score, stage/stderr, stage/lm_calls, stage/tokens, stage/seconds; stages/p-w is the score of "p -> w"
    candidate/score, candidate/examples; candidates/p-w/shuffled 1 is the score of one
    epoch/loss, epoch/eval_loss
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
from lmpipe.events import CandidateScored, EpochEnded, Event, StageEnded
from lmpipe.text.secrets import redact, redact_spec, secrets_in_url

Kind = Literal["stage", "candidate", "epoch"]


class Tracker(ABC):
    """A callback that logs figures somewhere. As a context manager it closes itself.

    What is raised while logging ends the run, as with any callback, with a `ConfigError` that says where figures could
    not be logged; started again on its store, the run goes on.
    """

    def __init__(self) -> None:
        self._counts: Counter[Kind] = Counter()

    @final
    def __call__(self, event: Event) -> None:
        """Logs one event; figures that are not finite are left out."""
        kind, values = figures(event)
        self._counts[kind] += 1
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self.log(kind, known, self._counts[kind])

    @abstractmethod
    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        """Logs some figures.

        Args:
            kind: Of the event.
            values: Name → figure.
            step: How many events of the kind there have been, this one included.
        """

    @abstractmethod
    def close(self) -> None:
        """Finishes what is being written; nothing can be logged after it."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


@final
class TensorBoardTracker(Tracker):
    """Writes event files for TensorBoard, without TensorFlow or torch.

    Args:
        folder: Where the files go.

    Raises:
        ConfigError: If tensorboard is not installed.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        writer = _load("tensorboard.summary", "tensorboard").Writer
        self._trouble = partial(_told, f"TensorBoard cannot write to {redact(folder)!r}", OSError)
        with self._trouble():
            self._writer = writer(folder)

    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        with self._trouble():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        with self._trouble():
            self._writer.close()


@final
class MlflowTracker(Tracker):
    """Logs to a run of MLflow.

    Args:
        uri: Of the tracking server; a file (``sqlite:///runs.db``) needs the whole package mlflow, and a folder that
            the environment sets ``MLFLOW_ALLOW_FILE_STORE=true``.
        experiment: Name of the experiment; made if it is new.

    Raises:
        ConfigError: If mlflow is not installed, or cannot track there.
    """

    def __init__(self, uri: str, experiment: str = "lmpipe") -> None:
        super().__init__()
        mlflow = _load("mlflow", "mlflow")
        kinds = (mlflow.MlflowException, ImportError, OSError)
        self._trouble = partial(
            _told, f"MLflow cannot track to {redact_spec(uri)!r}", *kinds, secrets=secrets_in_url(uri)
        )
        with self._trouble():
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            known = self._client.get_experiment_by_name(experiment)
            number = known.experiment_id if known is not None else self._client.create_experiment(experiment)
            self._run = self._client.create_run(number).info.run_id

    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        with self._trouble():
            for name, value in values.items():
                self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        with self._trouble():
            self._client.set_terminated(self._run)


@final
class WandbTracker(Tracker):
    """Logs to a run of Weights & Biases.

    Args:
        project: Name of the project.
        options: Of ``wandb.init``, such as ``mode="offline"`` and ``dir``.

    Raises:
        ConfigError: If wandb is not installed.
    """

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        wandb = _load("wandb", "wandb")
        self._trouble = partial(_told, f"Weights & Biases cannot track {redact(project)!r}", wandb.Error, OSError)
        with self._trouble():
            self._run = wandb.init(project=project, reinit="create_new", **options)
            for names in ("stage", "stages", "candidate", "candidates", "epoch"):
                self._run.define_metric(f"{names}/*", step_metric=f"{names.removesuffix('s')}/number")

    def log(self, kind: Kind, values: Mapping[str, float], step: int) -> None:
        with self._trouble():
            self._run.log({**values, f"{kind}/number": step})

    def close(self) -> None:
        with self._trouble():
            self._run.finish()


def load_tracker(spec: str) -> Tracker:
    """Makes the tracker that a short text names.

    Args:
        spec: ``"tensorboard:FOLDER"``, ``"mlflow:URI"`` or ``"wandb:PROJECT"``.

    Raises:
        ConfigError: If the text names no tracker, or its package is not installed.
    """
    match spec.partition(":"):
        case "tensorboard", _, folder if folder:
            return TensorBoardTracker(folder)
        case "mlflow", _, uri if uri:
            return MlflowTracker(uri)
        case "wandb", _, project if project:
            return WandbTracker(project)
    shown = redact_spec(spec)
    raise ConfigError(f"unknown tracker {shown!r}; write 'tensorboard:FOLDER', 'mlflow:URI' or 'wandb:PROJECT'")


def figures(event: Event) -> tuple[Kind, dict[str, float]]:
    """What is logged of an event: its kind, and figures by name."""
    match event:
        case StageEnded(stage=stage, score=score, stderr=stderr, cost=cost):
            values = {"score": score, "stderr": stderr}
            values |= {"lm_calls": cost.lm_calls, "tokens": cost.tokens, "seconds": cost.seconds}
            return "stage", {**_prefixed("stage", values), _named("stages", stage): score}
        case CandidateScored(stage=stage, name=name, score=score, n=n):
            values = {"score": score, "examples": n}
            return "candidate", {**_prefixed("candidate", values), _named("candidates", stage, name): score}
        case EpochEnded(loss=loss, eval_loss=eval_loss):
            more = {} if eval_loss is None else {"eval_loss": eval_loss}
            return "epoch", _prefixed("epoch", {"loss": loss, **more})


def _prefixed(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}


def _named(*names: str) -> str:
    """A name that all trackers take: ``p -> w`` is written ``p-w``."""
    parts = (name.replace(" -> ", "-") for name in names if name)
    return "/".join(re.sub(r"[^\w\-. ]", "_", part, flags=re.ASCII) for part in parts)


def _load(module: str, extra: str) -> Any:
    """Imports a module, or says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{error}; this tracker needs {extra}: pip install 'lmpipe[{extra}]'") from error


@contextmanager
def _told(what: str, *kinds: type[Exception], secrets: Iterable[str] = ()) -> Iterator[None]:
    """Says what went wrong where a package of others fails, without credentials, which its messages can hold.

    Raises:
        ConfigError: In place of errors of these kinds.
    """
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{what}: {redact(str(error), secrets)}") from None

"""Fine-tuning of the model of a `LocalLM`, in this process or in several that a launcher starts.

Tokenizes rows and puts the tuned weights into the store; the training loop is in `fit`. Knows nothing about programs or
traces.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from pydantic import TypeAdapter

from lmpipe.engines.library_errors import (
    INVALID_INPUT_ERRORS,
    ErrorTranslator,
    is_out_of_memory,
    library_message,
)
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.adapters import save_weights
from lmpipe.engines.local.models import ModelSource, num_layers
from lmpipe.engines.training.batch_sampler import check_eval_fraction, step_count
from lmpipe.engines.training.callbacks import TrainingObserver
from lmpipe.engines.training.checkpoints import SAVE_ERRORS
from lmpipe.engines.training.fit import FitResult, fit, seeded
from lmpipe.engines.training.job import TrainingJob, launch_training
from lmpipe.engines.training.packed_batch import TokenizedRow
from lmpipe.engines.training.target_modules import check_target_modules
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError, EngineError, SessionError, TrainingDiverged
from lmpipe.events import EpochEnded
from lmpipe.ledger import Cost
from lmpipe.lm import LM
from lmpipe.program.identity import work_key
from lmpipe.runtime.session import Session
from lmpipe.state import WeightState
from lmpipe.storage.files import explain_write_errors
from lmpipe.storage.store import RunStore
from lmpipe.text.reprs import settings_repr
from lmpipe.trainer import Objective, PolicyGradientLoss, SFTLoss, Trainer, TrainingResult, TrainingRow
from lmpipe.validation.arguments import check_type

_RESULT = TypeAdapter(TrainingResult)


@final
@dataclass(frozen=True)
class LocalTrainer(Trainer):
    """Fine-tunes the model of a local LM; its base weights do not change.

    A killed training resumes from its last checkpoint, which is in the run directory until the training ends. The
    result of a finished training is recalled.

    Args:
        lm: Engine whose model is trained.
        tuning: Method and settings.
        launcher: Command that starts several processes, such as ``("torchrun", "--nproc-per-node", "2")`` or
            ``("accelerate", "launch", "--multi_gpu")``; each process loads the base model. By default, the training
            runs in this process.

    Raises:
        ConfigError: If the LM cannot be trained with these settings.
    """

    lm: LocalLM = field(repr=False)
    tuning: TuningConfig = field(default=TuningConfig())
    launcher: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return settings_repr(self)

    def train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, objective: Objective = SFTLoss()
    ) -> TrainingResult:
        store = session.store
        if store is None:
            raise SessionError("training needs a store for its weights; create the session with a store")
        if not rows:
            raise ConfigError("there are no rows to train on")
        check_eval_fraction(len(rows), self.tuning.eval_fraction)
        tokenized = [self._tokenize(row, objective) for row in rows]
        key = work_key(
            "training",
            trainer=self,
            objective=objective,
            lm=self.lm,
            rows=rows,
            start=start.digest,
            seed=session.seed,
            limits=session.ledger.limits,
        )
        checkpoints = store.new_folder() if key is None else store.path / key.replace(" ", "/")

        def work(inner: Session) -> Any:
            return _RESULT.dump_python(self._train(tokenized, start, inner, objective, store, checkpoints), mode="json")

        try:
            result = _RESULT.validate_python(session.cached(key, work))
        except TrainingDiverged:
            shutil.rmtree(checkpoints, ignore_errors=True)  # or a repetition would resume shortly before it diverges
            raise
        shutil.rmtree(checkpoints, ignore_errors=True)  # after the result is recorded, so that a kill cannot lose it
        return result

    def tuned(self, **changes: object) -> LocalTrainer:
        return replace(self, tuning=replace(self.tuning, **changes))  # type: ignore[arg-type]

    def _train(
        self,
        rows: Sequence[TokenizedRow],
        start: WeightState,
        session: Session,
        objective: Objective,
        store: RunStore,
        checkpoints: Path,
    ) -> TrainingResult:
        if start.adapter is not None:
            self.lm.register_adapter(start.adapter, session.adapter_folder(start.adapter))
        with explain_write_errors(checkpoints):
            checkpoints.mkdir(parents=True, exist_ok=True)
        job = TrainingJob(
            self.lm.source or ModelSource(""),
            self.lm.name,
            self.tuning,
            session.seed,
            None if start.adapter is None else str(self.lm.adapters.folder(start.adapter)),
            tuple(rows),
            objective,
            session.ledger.tokens_left(),
        )
        with session.track("training", step_count(len(rows), self.tuning)) as advance:
            observer = _observer(session, advance)
            if self.launcher:
                folder, result = launch_training(self.launcher, job, checkpoints, observer)
            else:
                folder, result = self._fit(job, start, checkpoints, observer)
        session.ledger.add(Cost(training_tokens=result.tokens, gpu_seconds=result.gpu_seconds))
        weights = WeightState(base=self.lm.name, adapter=store.put_folder(folder))
        return TrainingResult(
            weights, len(result.losses), result.tokens, result.losses, result.eval_losses, result.stopped
        )

    def __post_init__(self) -> None:
        check_type("lm", self.lm, (LM, LocalLM), "LocalTrainer({}, TuningConfig())")
        check_type("tuning", self.tuning, TuningConfig, "LocalTrainer(lm, {})")
        if not isinstance(self.lm, LocalLM):
            raise ConfigError(
                f"{type(self.lm).__name__} cannot be trained; pass the LocalLM itself, without a cache, such as "
                "load_lm('bundled')"
            )
        if self.lm.tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {self.lm.name} has no token that ends a message (eos_token)")
        check_target_modules(self.lm.model, self.lm.name, self.tuning)
        if self.tuning.method == "qlora" and not self.lm.is_quantized_to_4_bits:
            raise ConfigError("qlora needs a base in 4 bits; load the LM with quantization='nf4', or choose lora")
        if self.tuning.method == "full" and self.lm.is_quantized:
            raise ConfigError("full fine-tuning is not possible on a quantized base; load the LM without quantization")
        if self.launcher and self.lm.source is None:
            raise ConfigError("launched processes must load the base again; create the LM with LocalLM.from_pretrained")
        if self.launcher and self.tuning.method == "prefix":
            raise ConfigError("prefix tuning runs in one process; leave out the launcher, or choose another method")

    def _tokenize(self, row: TrainingRow, objective: Objective) -> TokenizedRow:
        """Tokenizes a row: the prompt exactly as in inference, then the completion and its end token."""
        completion = self._completion_tokens(row.completion, complete=row.complete)
        tokenized = TokenizedRow((*self.lm.encode(row.messages), *completion), len(completion), row.group)
        if isinstance(objective, SFTLoss):
            return tokenized
        if isinstance(objective, PolicyGradientLoss):
            if row.advantage is None or not math.isfinite(row.advantage):
                raise ConfigError(f"a policy gradient needs a finite advantage in every row; this row has none: {row}")
            return replace(tokenized, advantage=row.advantage)
        if row.rejected is None:
            raise ConfigError(f"DPO needs a rejected completion in every row; this row has none: {row}")
        return replace(tokenized, rejected=self._completion_tokens(row.rejected, complete=row.rejected_complete))

    def _completion_tokens(self, text: str, *, complete: bool) -> tuple[int, ...]:
        tokens = tuple(self.lm.encode_text(text))
        return (*tokens, self.lm.end_token) if complete or not tokens else tokens

    def _fit(
        self, job: TrainingJob, start: WeightState, folder: Path, observer: TrainingObserver
    ) -> tuple[Path, FitResult]:
        trainable = self.lm.adapters.trainable(self.tuning.peft_config(num_layers(self.lm.model)), start.adapter)
        errors = ErrorTranslator(
            (*INVALID_INPUT_ERRORS, ImportError, MemoryError, OSError, RuntimeError), self._failure
        )
        with errors, seeded(job.seed), trainable as model:
            result = fit(model, job.rows, job.tuning, job.seed, folder, job.objective, observer)
            with explain_write_errors(folder / "result", SAVE_ERRORS):
                return save_weights(model, folder / "result", self.lm.name), result

    def _failure(self, error: Exception) -> EngineError:
        advice = (
            "; free memory, set micro_batch_size or gradient_checkpointing=True, or use a smaller method or base"
            if is_out_of_memory(error)
            else ""
        )
        return EngineError(f"training {self.lm.name} failed: {library_message(error)}{advice}")


def _observer(session: Session, advance: Callable[[int], None]) -> TrainingObserver:
    """Connects a training to its session: the progress bar, the callbacks and the budget."""
    return TrainingObserver(
        advance,
        lambda number, loss, eval_loss: session.notify(EpochEnded(session.stage, number, loss, eval_loss)),
        lambda tokens: session.ledger.reached_limit(Cost(training_tokens=tokens)),
    )

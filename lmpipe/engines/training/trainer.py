"""Fine-tuning the resident model of a `LocalLM`, in this process or in several that a launcher starts.

Turns rows into tokens and tuned weights into a folder of the store. Knows nothing of programs or traces; the loop is in
`fit`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from pydantic import TypeAdapter

from lmpipe.engines.library_errors import MISFITS, Renamed, is_out_of_memory, told
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.adapters import save
from lmpipe.engines.local.models import Source
from lmpipe.engines.training.batch_sampler import check_eval_fraction, step_count
from lmpipe.engines.training.callbacks import Watch
from lmpipe.engines.training.checkpoints import SAVING_FAILS
from lmpipe.engines.training.fit import LossCurve, fit, seeded
from lmpipe.engines.training.job import TrainingJob, launch
from lmpipe.engines.training.packed_batch import EncodedRow
from lmpipe.engines.training.target_modules import check_targets
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError, EngineError, SessionError, TrainingDiverged
from lmpipe.events import EpochEnded
from lmpipe.ledger import Cost
from lmpipe.program.identity import work_key
from lmpipe.runtime.session import Session
from lmpipe.state import WeightState
from lmpipe.storage.files import writing
from lmpipe.storage.store import RunStore
from lmpipe.trainer import Objective, PolicyGradientLoss, SFTLoss, Trainer, TrainingResult, TrainingRow

_RESULT = TypeAdapter(TrainingResult)


@final
@dataclass(frozen=True)
class LocalTrainer(Trainer):
    """Fine-tunes the model of a local LM; its base weights are left as they are.

    A training that was killed goes on from its last checkpoint, which lies in the run directory until the training is
    done; one that was done is recalled.

    Args:
        lm: The engine whose model is trained in place.
        tuning: Method and settings.
        launcher: Command that starts several processes, such as ``("torchrun", "--nproc-per-node", "2")`` or
            ``("accelerate", "launch", "--multi_gpu")``; each loads the base anew. By default training is done in this
            process.

    Raises:
        ConfigError: If the LM cannot be trained in this way; it is said here, before anything is spent.
    """

    lm: LocalLM = field(repr=False)
    tuning: TuningConfig = field(default=TuningConfig())
    launcher: tuple[str, ...] = ()

    def train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, objective: Objective = SFTLoss()
    ) -> TrainingResult:
        store = session.store
        if store is None:
            raise SessionError("training needs a place for its weights; make the session with a store")
        if not rows:
            raise ConfigError("there are no rows to train on")
        check_eval_fraction(len(rows), self.tuning.eval_fraction)
        encoded = [self._encode(row, objective) for row in rows]
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
            return _RESULT.dump_python(self._train(encoded, start, inner, objective, store, checkpoints), mode="json")

        try:
            result = _RESULT.validate_python(session.cached(key, work))
        except TrainingDiverged:
            shutil.rmtree(checkpoints, ignore_errors=True)  # the same training would go on from what led there
            raise
        shutil.rmtree(checkpoints, ignore_errors=True)  # not before the result is recorded: a kill would lose it
        return result

    def _train(
        self,
        rows: Sequence[EncodedRow],
        start: WeightState,
        session: Session,
        objective: Objective,
        store: RunStore,
        checkpoints: Path,
    ) -> TrainingResult:
        if start.adapter is not None:
            self.lm.register_adapter(start.adapter, store.folder(start.adapter))
        with writing(checkpoints):
            checkpoints.mkdir(parents=True, exist_ok=True)
        job = TrainingJob(
            self.lm.source or Source(""),
            self.lm.name,
            self.tuning,
            session.seed,
            None if start.adapter is None else str(self.lm.adapters.folder(start.adapter)),
            tuple(rows),
            objective,
            session.ledger.tokens_left(),
        )
        with session.track("training", step_count(len(rows), self.tuning)) as advance:
            watch = _watch(session, advance)
            if self.launcher:
                result, curve = launch(self.launcher, job, checkpoints, watch)
            else:
                result, curve = self._fit(job, start, checkpoints, watch)
        session.ledger.add(Cost(training_tokens=curve.tokens, gpu_seconds=curve.gpu_seconds))
        weights = WeightState(base=self.lm.name, adapter=store.put_folder(result))
        return TrainingResult(weights, len(curve.train), curve.tokens, curve.train, curve.eval, curve.stopped)

    def __post_init__(self) -> None:
        if not isinstance(self.lm, LocalLM):
            raise ConfigError(f"{type(self.lm).__name__} cannot be trained; pass the LocalLM itself, without a cache")
        if self.lm.tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {self.lm.name} has no token that ends a message (eos_token)")
        check_targets(self.lm.model, self.lm.name, self.tuning)
        if self.tuning.method == "qlora" and not self.lm.is_quantized:
            raise ConfigError("qlora trains on a base in 4 bits; load the LM with quantization='nf4', or choose lora")
        if self.tuning.method == "full" and self.lm.is_quantized:
            raise ConfigError("a quantized base cannot be trained as a whole; load the LM without quantization")
        if self.launcher and self.lm.source is None:
            raise ConfigError("a launched training loads the base anew; make the LM with LocalLM.from_pretrained")
        if self.launcher and self.tuning.method == "prefix":
            raise ConfigError("prefix tuning runs in one process; leave out the launcher, or choose another method")

    def _encode(self, row: TrainingRow, objective: Objective) -> EncodedRow:
        """Tokens of the prompt exactly as in inference, then the completion and the token that ends it."""
        completion = self._completion(row.completion, ends=row.ends)
        encoded = EncodedRow((*self.lm.encode(row.messages), *completion), len(completion), row.group)
        if isinstance(objective, SFTLoss):
            return encoded
        if isinstance(objective, PolicyGradientLoss):
            if row.advantage is None or not math.isfinite(row.advantage):
                raise ConfigError(f"a policy gradient needs the advantage of every row, a number; this has none: {row}")
            return replace(encoded, advantage=row.advantage)
        if row.rejected is None:
            raise ConfigError(f"preference tuning needs a rejected completion in every row; this has none: {row}")
        return replace(encoded, rejected=self._completion(row.rejected, ends=row.rejected_ends))

    def _completion(self, text: str, *, ends: bool) -> tuple[int, ...]:
        tokens = tuple(self.lm.encode_text(text))
        return (*tokens, self.lm.end_token) if ends or not tokens else tokens

    def _fit(self, job: TrainingJob, start: WeightState, folder: Path, watch: Watch) -> tuple[Path, LossCurve]:
        trainable = self.lm.adapters.trainable(self.tuning.peft_config(), start.adapter)
        with self._named(), seeded(job.seed), trainable as model:
            curve = fit(model, job.rows, job.tuning, job.seed, folder, job.objective, watch)
            with writing(folder / "result", SAVING_FAILS):
                return save(model, folder / "result", self.lm.name), curve

    def _named(self) -> Renamed:
        return Renamed((*MISFITS, ImportError, MemoryError, OSError, RuntimeError), self._failed)

    def _failed(self, error: Exception) -> EngineError:
        advice = (
            "; free memory, or set micro_batch_size, gradient_checkpointing=True, or a smaller method or base"
            if is_out_of_memory(error)
            else ""
        )
        return EngineError(f"training {self.lm.name} failed: {told(error)}{advice}")


def _watch(session: Session, advance: Callable[[int], None]) -> Watch:
    """Shows steps, tells of epochs, and asks whether a budget is spent."""
    return Watch(
        advance,
        lambda number, loss, eval_loss: session.notify(EpochEnded(session.stage, number, loss, eval_loss)),
        lambda tokens: session.ledger.spent(Cost(training_tokens=tokens)),
    )

"""Fine-tuning the resident model of a `LocalLM`, in this process or in several that a launcher starts.

Turns rows into tokens and tuned weights into a folder of the store. Knows nothing of programs or traces; the loop is in
`fit`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from pydantic import TypeAdapter

from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.adapters import save
from lmpipe.engines.local.models import Source
from lmpipe.engines.training.checkpoints import SAVING_FAILS
from lmpipe.engines.training.fit import LossCurve, fit, seeded, step_count
from lmpipe.engines.training.job import Job, launch
from lmpipe.engines.training.layout import EncodedRow
from lmpipe.engines.training.tuning import Tuning
from lmpipe.errors import ConfigError, SessionError
from lmpipe.files import writing
from lmpipe.hashing import describe, digest
from lmpipe.ledger import Cost
from lmpipe.session import Session
from lmpipe.state import WeightState
from lmpipe.store import RunStore
from lmpipe.trainer import Trainer, TrainingResult, TrainingRow

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
    """

    lm: LocalLM = field(repr=False)
    tuning: Tuning = field(default=Tuning())
    launcher: tuple[str, ...] = ()

    def train(self, rows: Sequence[TrainingRow], start: WeightState, session: Session) -> TrainingResult:
        store = session.store
        if store is None:
            raise SessionError("training needs a place for its weights; make the session with a store")
        if not rows:
            raise ConfigError("there are no rows to train on")
        self._check()
        key = digest([describe(self), self.lm.name, describe(rows), start.model_dump(mode="json"), session.seed])
        checkpoints = store.path / "training" / key

        def work(inner: Session) -> Any:
            return _RESULT.dump_python(self._train(rows, start, inner, store, checkpoints), mode="json")

        result = _RESULT.validate_python(session.once("training " + key, work))
        shutil.rmtree(checkpoints, ignore_errors=True)  # not before the result is recorded: a kill would lose it
        return result

    def _train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, store: RunStore, checkpoints: Path
    ) -> TrainingResult:
        if start.adapter is not None:
            self.lm.register_adapter(start.adapter, store.folder(start.adapter))
        encoded = [self._encode(row) for row in rows]
        with writing(checkpoints):
            checkpoints.mkdir(parents=True, exist_ok=True)
        with session.track("training", step_count(len(rows), self.tuning)) as advance:
            if self.launcher:
                result, curve = self._launch(encoded, start, session.seed, checkpoints, advance)
            else:
                result, curve = self._fit(encoded, start, session.seed, checkpoints, advance)
        tokens = self.tuning.epochs * sum(len(row.tokens) for row in encoded)
        session.ledger.add(Cost(training_tokens=tokens))
        weights = WeightState(base=self.lm.name, adapter=store.put_folder(result))
        return TrainingResult(weights, len(curve.train), tokens, curve.train, curve.held_out)

    def _check(self) -> None:
        if self.tuning.method == "qlora" and not self.lm.is_quantized:
            raise ConfigError("qlora trains on a base in 4 bits; load the LM with quantization='nf4', or choose lora")
        if self.tuning.method == "full" and self.lm.is_quantized:
            raise ConfigError("a quantized base cannot be trained as a whole; load the LM without quantization")
        if self.launcher and self.lm.source is None:
            raise ConfigError("a launched training loads the base anew; make the LM with LocalLM.from_pretrained")
        if self.launcher and self.tuning.method == "prefix":
            raise ConfigError("prefix tuning runs in one process; leave out the launcher, or choose another method")

    def _encode(self, row: TrainingRow) -> EncodedRow:
        """Tokens of the prompt exactly as in inference, then the completion and the token that ends it."""
        prompt = self.lm.encode(row.messages)
        completion = [*self.lm.encode_text(row.completion), self.lm.end_token]
        return EncodedRow((*prompt, *completion), len(completion), row.group)

    def _fit(
        self, rows: Sequence[EncodedRow], start: WeightState, seed: int, folder: Path, advance: Callable[[int], None]
    ) -> tuple[Path, LossCurve]:
        with seeded(seed), self.lm.adapters.trainable(self.tuning.peft_config(), start.adapter) as model:
            curve = fit(model, rows, self.tuning, seed, folder, advance)
            with writing(folder / "result", SAVING_FAILS):
                return save(model, folder / "result", self.lm.name), curve

    def _launch(
        self, rows: Sequence[EncodedRow], start: WeightState, seed: int, folder: Path, advance: Callable[[int], None]
    ) -> tuple[Path, LossCurve]:
        folder_of_start = None if start.adapter is None else str(self.lm.adapters.folder(start.adapter))
        job = Job(self.lm.source or Source(""), self.lm.name, self.tuning, seed, folder_of_start, tuple(rows))
        return launch(self.launcher, job, folder, advance)

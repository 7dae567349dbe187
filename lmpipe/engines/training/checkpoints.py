"""Checkpoints of the training loop: which of them are complete, and from which a training can resume.

Knows nothing about how checkpoints are written or what is trained.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState

from lmpipe.storage.files import write_atomically
from lmpipe.storage.hashing import canonical_json, digest, file_digests

logger = logging.getLogger(__name__)

SAVE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""Errors that safetensors and torch raise when the disk is full."""

_MARKER = "complete.json"  # written last; contains the digest of each file of the checkpoint


@final
class CheckpointMarkerCallback(TrainerCallback):
    """Marks a checkpoint as complete when all its files are written, and updates the path of the best checkpoint.

    The path changes when the run directory is moved.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_folder(args, state.best_global_step))

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes its own file
        if state.is_world_process_zero:
            folder = checkpoint_folder(args, state.global_step)
            write_atomically(folder / _MARKER, canonical_json(file_digests(folder)).encode())


def checkpoint_folder(args: Any, step: int) -> Path:
    """Returns the folder of the checkpoint after a step; `args` are the `TrainingArguments`."""
    return Path(args.output_dir) / f"checkpoint-{step}"


def last_complete_checkpoint(folder: Path) -> str | None:
    """Returns the newest checkpoint from which the training can resume, or None, and deletes all unusable ones.

    A checkpoint is usable only if its files, and those of the best checkpoint before it, are undamaged.
    """
    usable: dict[str, Path] = {}
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])):
        if _is_complete(checkpoint) and _is_resumable(checkpoint, usable):
            usable[checkpoint.name] = checkpoint
        else:
            logger.warning(
                "training cannot resume from %s; the checkpoint is deleted and its steps are repeated", checkpoint
            )
            shutil.rmtree(checkpoint, ignore_errors=True)
    return str(list(usable.values())[-1]) if usable else None


def _is_complete(checkpoint: Path) -> bool:
    digests = file_digests(checkpoint)
    return digests.pop(_MARKER, None) == digest(digests)


def _is_resumable(checkpoint: Path, usable: Container[str]) -> bool:
    """Whether the best checkpoint so far is usable and patience had not run out, after which no step may follow."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopped = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    best = f"checkpoint-{state.best_global_step}"
    has_best = not state.best_global_step or best == checkpoint.name or best in usable
    return has_best and not (stopped and state.global_step < state.max_steps)

"""Checkpoints of the training loop: which are whole, and which of them a training can go on from.

Knows nothing of how they are written or what is trained.
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

SAVING_FAILS = (OSError, SafetensorError, RuntimeError)
"""What safetensors and torch raise when the disk is full."""

_WHOLE = "whole.json"  # written last: file → digest, of a checkpoint that is complete


@final
class Seal(TrainerCallback):
    """Marks a checkpoint as whole once all its files are written, and finds the best one where the folder is now."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.best_global_step:
            state.best_model_checkpoint = str(checkpoint_of(args, state.best_global_step))

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes a file of its own
        if state.is_world_process_zero:
            folder = checkpoint_of(args, state.global_step)
            write_atomically(folder / _WHOLE, canonical_json(file_digests(folder)).encode())


def checkpoint_of(args: Any, step: int) -> Path:
    """Folder of the checkpoint after a step; `args` are the trainer's."""
    return Path(args.output_dir) / f"checkpoint-{step}"


def last_whole(folder: Path) -> str | None:
    """The newest checkpoint to go on from: its files, and those of the best one before it, are as they were written.

    Others are deleted.
    """
    usable: dict[str, Path] = {}
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])):
        if _is_whole(checkpoint) and _leads_on(checkpoint, usable):
            usable[checkpoint.name] = checkpoint
        else:
            logger.warning("training cannot go on from %s; it is deleted and its steps are done again", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return str(list(usable.values())[-1]) if usable else None


def _is_whole(checkpoint: Path) -> bool:
    found = file_digests(checkpoint)
    return found.pop(_WHOLE, None) == digest(found)


def _leads_on(checkpoint: Path, usable: Container[str]) -> bool:
    """Whether the best checkpoint until then is there, and patience had not ended: going on would train for longer."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopped = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    best = f"checkpoint-{state.best_global_step}"
    found = not state.best_global_step or best == checkpoint.name or best in usable
    return found and not (stopped and state.global_step < state.max_steps)

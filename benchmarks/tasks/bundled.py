"""Settings that the tasks share for the bundled LM, which has 135 million weights.

It needs greedy decoding, short answers, a learning rate for few rows, and many varied runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from optimizers import SMALL_LM_TUNING

RARELY_CORRECT: Mapping[str, object] = MappingProxyType(
    {
        "temperature": 0.0,
        "top_p": 1.0,
        "structured": True,
        "num_candidate_programs": 1,
        "num_train": 40,
        "rollouts_per_example": 2,
        "max_rollouts_per_example": 4,
        "rollout_temperature": 0.7,
        "deduplicate": True,
        "tuning": replace(SMALL_LM_TUNING, warmup_steps=2, epochs=3, batch_size=4),
        "num_train_scored": 0,
    }
)
"""Settings for tasks on which about one answer in thirty is correct, and no zero-shot reply has the right form.

Completions are therefore constrained to the form, and each example is run several times with sampling.
"""

"""Settings of Π and Θ that suit an LM of a few hundred million weights, which is rarely right before it is tuned.

Such an LM often gives one answer to every input. Only other demonstrations change that answer, so the rollouts to learn
from vary them, and go on until an example is solved, also through rounds in which hardly any rollout succeeds. Few rows
then remain, which a high learning rate learns in a few epochs. The defaults of the classes themselves are the paper's
(Soylu et al. 2024, arXiv 2407.10930), for LMs of several billion weights and a thousand examples.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmpipe import Metric, Optimizer, Trainer, TuningConfig
from optimizers.prompts import BootstrapFewShotRandomSearch
from optimizers.weights import BootstrapFinetune

SMALL_LM_TUNING = TuningConfig(
    rank=16,
    alpha=32,
    target_modules="all-linear",
    learning_rate=1e-3,
    beta2=0.95,
    warmup_steps=6,
    epochs=7,
    batch_size=6,
)
"""LoRA settings for a small LM and a few dozen rows."""


def small_lm_stages(
    metric: Metric, trainer: Trainer | Mapping[str, Trainer] | None = None, label: str | None = None
) -> dict[str, Optimizer]:
    """Returns the stages ``p`` and, given a trainer, ``w``, with settings that suit a small LM.

    Args:
        metric: Scores a prediction.
        trainer: Trains weights on rows; or one trainer for each role.
        label: Label whose classes are kept in proportion in prompt search, and made equally frequent in training.
    """
    stages: dict[str, Optimizer] = {
        "p": BootstrapFewShotRandomSearch(metric, num_train=15, num_val=35, stratify_by=label, racing=True)
    }
    if trainer is not None:
        stages["w"] = BootstrapFinetune(
            metric,
            trainer,
            rollouts_per_example=4,
            max_rollouts_per_example=64,
            max_idle_rounds=8,
            temperature=0.8,
            vary_demos=True,
            deduplicate=True,
            balance_by=label,
        )
    return stages

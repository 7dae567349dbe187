"""TRL's SFTTrainer with LoRA: ``python trl_train.py MODEL WORKLOAD DTYPE``.

One pass over the rows, completion-only loss; matrix products in ``bfloat16`` (by autocast) or ``float32``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from time import process_time

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(folder: str, path: str, dtype: str) -> None:
    """Prints CPU seconds, tokens and the losses of the steps."""
    workload = json.loads(Path(path).read_text())
    rows = [
        {"input_ids": row, "labels": [-100] * (len(row) - trained) + row[-trained:]}
        for row, trained in zip(workload["rows"], workload["trained"], strict=True)
    ]
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            SFTConfig(
                output_dir=out,
                per_device_train_batch_size=8,
                num_train_epochs=1,
                learning_rate=1e-4,
                bf16=dtype == "bfloat16",
                use_cpu=True,
                gradient_checkpointing=False,
                max_length=None,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        started = process_time()
        trainer.train()
        seconds = process_time() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"cpu_seconds": seconds, "tokens": sum(map(len, workload["rows"])), "losses": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:4])

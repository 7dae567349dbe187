"""A transformers model in this process as a DSPy model: an engine that generates, and a provider that fine-tunes.

DSPy asks for one completion per call, from a pool of threads. The engine gathers the requests of the threads and
answers them with one padded ``generate``. A fine-tuned model has a name of its own; its adapter is merged, so it costs
as much as the base.
"""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from time import perf_counter, process_time
from typing import Any, final

import torch
from datasets import Dataset
from dspy.clients.provider import Provider, TrainingJob
from dspy.lm15 import Message, Request, Response, Usage
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

BASE = "local/base"
_END = "[[ ## completed ## ]]"  # where DSPy's chat format ends
_STARTED = perf_counter()
_GATHER = 0.05  # seconds without a further request after which the waiting ones are answered


@final
class LocalEngine:
    """Answers DSPy's requests in batches; one thread runs the model.

    Args:
        folder: Folder of the base model, as transformers saves it.
        batch: Maximum number of requests in a batch.
    """

    def __init__(self, folder: str, batch: int = 16) -> None:
        self.folder, self.batch = folder, batch
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.models = {BASE: load(folder)}
        self.calls: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._waiting: queue.SimpleQueue[tuple[Request, Future[str]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalEngine:
        """Returns itself: DSPy deep-copies programs with their LMs, and would copy the weights each time."""
        return self

    def complete(self, request: Request) -> Response:
        """Returns one completion; blocks until its batch is done."""
        answer: Future[str] = Future()
        self._waiting.put((request, answer))
        text = answer.result()
        usage = Usage(input_tokens=0, output_tokens=0, total_tokens=0)
        return Response(None, request.model, Message.assistant(text), "stop", usage)

    def close(self) -> None:
        """Does nothing: no resource is held open."""

    def _serve(self) -> None:
        while True:
            batch = [self._waiting.get()]
            try:
                while len(batch) < self.batch and batch[0][0].model == batch[-1][0].model:
                    batch.append(self._waiting.get(timeout=_GATHER))
            except queue.Empty:
                pass
            for name in dict.fromkeys(request.model for request, _ in batch):
                part = [(request, answer) for request, answer in batch if request.model == name]
                try:
                    texts = self._generate(name, [request for request, _ in part])
                except Exception as error:  # noqa: BLE001 it is raised in the thread that asked
                    for _, answer in part:
                        answer.set_exception(error)
                else:
                    for (_, answer), text in zip(part, texts, strict=True):
                        answer.set_result(text)

    def _generate(self, name: str, requests: list[Request]) -> list[str]:
        prompts = self.tokenizer.apply_chat_template(
            [chat(request) for request in requests], tokenize=False, add_generation_prompt=True
        )
        rows = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = self.models[name].generate(
                **rows,
                max_new_tokens=requests[0].config.max_tokens,
                do_sample=False,
                stop_strings=[_END],
                tokenizer=self.tokenizer,
            )
        new = out[:, rows["input_ids"].shape[1] :]
        self.calls[name] += len(requests)
        self.tokens["prompt"] += int(rows["attention_mask"].sum())
        self.tokens["new"] += int((new != self.tokenizer.pad_token_id).sum())
        log(f"batch of {len(requests)} on {name}: {sum(self.calls.values())} calls")
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))


def load(folder: str) -> Any:
    """Loads the model in float32 for greedy decoding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    return model


def chat(request: Request) -> list[dict[str, str]]:
    """Returns the conversation in the form of chat templates."""
    system = [{"role": "system", "content": str(request.system)}] if request.system else []
    return system + [{"role": message.role, "content": message.text or ""} for message in request.messages]


def log(text: str) -> None:
    """Prints one line to stderr, with the time, the CPU seconds of the process and the load of the machine."""
    line = f"{perf_counter() - _STARTED:.0f} s, {process_time():.0f} CPU s, load {os.getloadavg()[0]:.1f}: {text}"
    print(line, file=sys.stderr, flush=True)


@final
class LocalProvider(Provider):
    """Fine-tunes LoRA with TRL, and registers the tuned model with the engine under a name of its own.

    Args:
        engine: Engine that runs the tuned models too.
        tuning: Settings of the training, by the names of lmpipe's ``TuningConfig``.
        seed: Seed of the initial adapter and of the order of rows.
    """

    def __init__(self, engine: LocalEngine, tuning: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        self.finetunable = True
        self.engine, self.tuning, self.seed = engine, tuning, seed
        self.jobs: list[dict[str, Any]] = []

    def finetune(
        self,
        job: TrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: str,
        train_kwargs: Any = None,
    ) -> str:
        """Trains the base on the completions of DSPy's chats, and returns the name of the tuned model."""
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in train_data]
        log(f"fine-tuning on {len(rows)} rows")
        with tempfile.TemporaryDirectory() as out:
            trainer = SFTTrainer(
                load(self.engine.folder),
                self._config(out),
                train_dataset=Dataset.from_list(rows),
                processing_class=AutoTokenizer.from_pretrained(self.engine.folder),
                peft_config=LoraConfig(
                    r=self.tuning["rank"],
                    lora_alpha=self.tuning["alpha"],
                    target_modules=self.tuning["target_modules"],
                    task_type="CAUSAL_LM",
                ),
            )
            trainer.train()
        name = f"local/tuned-{len(self.jobs) + 1}"
        self.engine.models[name] = trainer.model.merge_and_unload().eval()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.jobs.append({"rows": len(rows), "steps": trainer.state.global_step, "losses": losses})
        return name

    def _config(self, out: str) -> SFTConfig:
        tuning = self.tuning
        return SFTConfig(
            output_dir=out,
            per_device_train_batch_size=tuning["batch_size"],
            num_train_epochs=tuning["epochs"],
            learning_rate=tuning["learning_rate"],
            lr_scheduler_type=tuning["schedule"],
            warmup_steps=tuning["warmup_steps"],
            adam_beta2=tuning["beta2"],
            weight_decay=tuning["weight_decay"],
            bf16=tuning["bf16"],
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=self.seed,
        )

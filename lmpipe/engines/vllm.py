"""vLLM in this process: the same protocol as the local engine, for many and large batches.

vLLM generates and does not train; a `LocalLM` of the same name trains its adapters. Knows nothing of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams

from lmpipe.engines.chat import ChatTokens, too_long, unregistered, wrong_base
from lmpipe.engines.library_errors import Renamed, told
from lmpipe.engines.loading import loading
from lmpipe.errors import EngineError
from lmpipe.lm import LM, Completion, Request, Usage
from lmpipe.runtime.deadline import check_deadline


@final
class VllmLM(LM):
    """A causal LM in vLLM.

    Args:
        engine: A `vllm.LLM`, made with ``enable_lora=True`` if adapters are used.
        name: Identifies the base weights in states and stores.

    Raises:
        ConfigError: If the model has no chat template that works.
    """

    def __init__(self, engine: Any, name: str) -> None:
        self.engine = engine
        self.tokenizer = engine.get_tokenizer()
        self._chat = ChatTokens(self.tokenizer, name)
        self._name = name
        self._adapters: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, id_or_path: str, *, name: str = "", max_lora_rank: int = 64, **settings: Any) -> VllmLM:
        """Loads a model from the hub or a folder.

        Args:
            id_or_path: Hub id or local folder.
            name: By default `id_or_path`.
            max_lora_rank: Largest rank of an adapter.
            **settings: Of `vllm.LLM`.

        Raises:
            ConfigError: If vLLM cannot load it.
        """
        if current_platform.is_cpu():  # there, a seeded request whose prompt is cut in pieces ends the engine
            settings = {"enable_chunked_prefill": False, **settings}
        with loading("a model for vLLM", id_or_path):
            engine = LLM(
                id_or_path, enable_lora=True, max_lora_rank=max_lora_rank, generation_config="vllm", **settings
            )
        return cls(engine, name or id_or_path)

    @property
    def name(self) -> str:
        return self._name

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return int(self.engine.llm_engine.model_config.max_model_len)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Raises:
        EngineError: If the folder is no LoRA adapter.
        """
        if not (folder / "adapter_config.json").is_file():
            raise EngineError(f"{folder} is no PEFT adapter; make the engine with those weights instead")
        if adapter not in self._adapters:
            self._adapters[adapter] = LoRARequest(adapter, len(self._adapters) + 1, str(folder))

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        checked = [self._checked(request) for request in requests]
        prompts = {number: prompt for number, prompt in enumerate(checked) if not isinstance(prompt, EngineError)}
        answers: dict[int, Completion | EngineError | None] = {
            number: refusal if isinstance(refusal, EngineError) else None for number, refusal in enumerate(checked)
        }
        open_ = list(prompts)
        for chosen in (
            [n for n in open_ if requests[n].weights.adapter is None],
            [n for n in open_ if requests[n].weights.adapter is not None],
        ):
            if chosen:
                check_deadline()
                outputs = self._generate([requests[n] for n in chosen], [prompts[n] for n in chosen])
                answers |= dict(zip(chosen, outputs, strict=True))
        return [answer for answer in answers.values() if answer is not None]

    def _checked(self, request: Request) -> list[int] | EngineError:
        """The tokens of a prompt, or why there is no answer to it."""
        try:
            prompt = self._chat.encode(request.messages)
        except EngineError as error:
            return error
        return (
            wrong_base(request, self.name) or too_long(request, len(prompt), self.context_length, self.name) or prompt
        )

    def _generate(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> list[Completion]:
        """Answers requests that all run on adapters, or all on the base.

        vLLM's CPU kernels run base rows of a mixed batch on an adapter (its pull request 48421).
        """
        with Renamed((OSError, RuntimeError, TypeError, ValueError), self._failed):
            outputs = self.engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [_sampling(request) for request in requests],
                lora_request=[self._adapter(request.weights.adapter) for request in requests],
                use_tqdm=False,
            )
        return [_completion(request, output) for request, output in zip(requests, outputs, strict=True)]

    def _failed(self, error: Exception) -> EngineError:
        return EngineError(f"vLLM failed while it generated with {self.name}: {told(error)}")

    def _adapter(self, adapter: str | None) -> Any:
        if adapter is not None and adapter not in self._adapters:
            raise unregistered(adapter)
        return self._adapters[adapter] if adapter is not None else None


def _sampling(request: Request) -> Any:
    asked = request.sampling
    return SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k or 0,
        max_tokens=asked.max_tokens,
        stop=list(asked.stop),
        seed=request.seed,
        logprobs=0 if asked.logprobs else None,
        structured_outputs=None if request.regex is None else StructuredOutputsParams(regex=request.regex),
    )


def _completion(request: Request, output: Any) -> Completion:
    made = output.outputs[0]
    reason: Literal["stop", "length"] = "length" if made.finish_reason == "length" else "stop"
    logprobs = None
    if request.sampling.logprobs:
        logprobs = tuple(float(step[token].logprob) for step, token in zip(made.logprobs, made.token_ids, strict=True))
    return Completion(made.text, reason, Usage(1, len(output.prompt_token_ids), len(made.token_ids)), logprobs)

"""vLLM in this process: the same interface as the local engine, for many large batches.

vLLM generates but does not train; a `LocalLM` with the same name trains the adapters. Knows nothing about programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams

from lmpipe.engines.chat import ChatTokens, context_length_error, unregistered_adapter_error, wrong_base_error
from lmpipe.engines.library_errors import ErrorTranslator, library_message
from lmpipe.engines.loading import loading_errors
from lmpipe.errors import EngineError
from lmpipe.lm import LM, Completion, Request, Usage
from lmpipe.runtime.deadline import check_deadline


@final
class VllmLM(LM):
    """A causal LM in vLLM.

    Args:
        engine: A `vllm.LLM`, created with ``enable_lora=True`` if adapters are used.
        name: Name of the base weights in states and stores.

    Raises:
        ConfigError: If the model has no working chat template.
    """

    constrains = True

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
            name: Name of the base weights; by default `id_or_path`.
            max_lora_rank: Largest rank of an adapter.
            **settings: Arguments of `vllm.LLM`.

        Raises:
            ConfigError: If vLLM cannot load the model.
        """
        if current_platform.is_cpu():  # chunked prefill of a seeded request crashes the engine on a CPU
            settings = {"enable_chunked_prefill": False, **settings}
        with loading_errors("a model for vLLM", id_or_path):
            engine = LLM(
                id_or_path, enable_lora=True, max_lora_rank=max_lora_rank, generation_config="vllm", **settings
            )
        return cls(engine, name or id_or_path)

    @property
    def name(self) -> str:
        return self._name

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt and its completion together."""
        return int(self.engine.llm_engine.model_config.max_model_len)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Registers the folder of a LoRA adapter.

        Raises:
            EngineError: If the folder does not hold a PEFT adapter.
        """
        if not (folder / "adapter_config.json").is_file():
            raise EngineError(f"{folder} does not hold a PEFT adapter; create the engine with these weights instead")
        if adapter not in self._adapters:
            self._adapters[adapter] = LoRARequest(adapter, len(self._adapters) + 1, str(folder))

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        encoded = [self._encode(request) for request in requests]
        prompts = {number: prompt for number, prompt in enumerate(encoded) if not isinstance(prompt, EngineError)}
        answers: dict[int, Completion | EngineError | None] = {
            number: error if isinstance(error, EngineError) else None for number, error in enumerate(encoded)
        }
        for group in (
            [n for n in prompts if requests[n].weights.adapter is None],
            [n for n in prompts if requests[n].weights.adapter is not None],
        ):
            if group:
                check_deadline()
                outputs = self._generate([requests[n] for n in group], [prompts[n] for n in group])
                answers |= dict(zip(group, outputs, strict=True))
        return [answer for answer in answers.values() if answer is not None]

    def _encode(self, request: Request) -> list[int] | EngineError:
        """Returns the token ids of a prompt, or the error if the request cannot be answered."""
        try:
            prompt = self._chat.encode(request.messages)
        except EngineError as error:
            return error
        return (
            wrong_base_error(request, self.name)
            or context_length_error(request, len(prompt), self.context_length, self.name)
            or prompt
        )

    def _generate(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> list[Completion]:
        """Answers requests that either all use adapters or all use the base.

        In a mixed batch, vLLM's CPU kernels apply an adapter to requests of the base (its pull request 48421).
        """
        with ErrorTranslator((OSError, RuntimeError, TypeError, ValueError), self._failed):
            outputs = self.engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [_sampling(request) for request in requests],
                lora_request=[self._adapter(request.weights.adapter) for request in requests],
                use_tqdm=False,
            )
        return [_completion(request, output) for request, output in zip(requests, outputs, strict=True)]

    def _failed(self, error: Exception) -> EngineError:
        return EngineError(f"vLLM failed during generation with {self.name}: {library_message(error)}")

    def _adapter(self, adapter: str | None) -> Any:
        if adapter is not None and adapter not in self._adapters:
            raise unregistered_adapter_error(adapter)
        return self._adapters[adapter] if adapter is not None else None


def _sampling(request: Request) -> Any:
    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        seed=request.seed,
        logprobs=0 if sampling.logprobs else None,
        structured_outputs=None if request.regex is None else StructuredOutputsParams(regex=request.regex),
    )


def _completion(request: Request, output: Any) -> Completion:
    completion = output.outputs[0]
    reason: Literal["stop", "length"] = "length" if completion.finish_reason == "length" else "stop"
    logprobs = None
    if request.sampling.logprobs:
        logprobs = tuple(
            float(step[token].logprob) for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        )
    return Completion(
        completion.text, reason, Usage(1, len(output.prompt_token_ids), len(completion.token_ids)), logprobs
    )

"""The local engine as an LM: requests in, completions out.

It turns requests into sequences of tokens, groups them by weights, and switches adapters on the resident base model.
Knows nothing about programs. The decoding loop is in `generate`, shared prefixes are in `prefixes`, attention is in
`attention` and `forward_batch`, adapters are in `adapters`, and models are loaded in `models`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any, final

import torch
from transformers import PreTrainedTokenizerBase

from lmpipe.engines.allocator import keep_freed_memory
from lmpipe.engines.chat import ChatTokens, context_length_error, cut_at_stop, wrong_base_error
from lmpipe.engines.int8_linear import has_int8_layers
from lmpipe.engines.library_errors import ErrorTranslator, is_out_of_memory, library_message
from lmpipe.engines.loading import vocabulary_size
from lmpipe.engines.local.adapters import ActiveModel, AdapterPool
from lmpipe.engines.local.attention import use_lmpipe_attention
from lmpipe.engines.local.constrained import Automaton, Guide, can_constrain, token_bytes
from lmpipe.engines.local.decoder import FusedDecoder
from lmpipe.engines.local.generate import BatchLimits, ContinuousBatch
from lmpipe.engines.local.greedy_cache import GreedyCache
from lmpipe.engines.local.models import (
    ModelSource,
    Quantization,
    bytes_per_token,
    check_architecture,
    default_memory,
    load_model,
)
from lmpipe.engines.local.prefixes import PrefixCache
from lmpipe.engines.local.sampling import SequenceState
from lmpipe.engines.onednn_linear import OneDnnLinear
from lmpipe.engines.threads import log_spinning
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import LM, Completion, Message, Request, Usage
from lmpipe.runtime.deadline import check_deadline

logger = logging.getLogger(__name__)


@final
class LocalLM(LM):
    """A causal LM in this process.

    Args:
        model: A transformers causal LM, for the exclusive use of the engine.
        tokenizer: Tokenizer of the model, with a chat template.
        name: Name of the base weights in states and stores.
        max_sequences: Maximum number of sequences that are decoded together; by default 128 on a CPU and 256 on a GPU.
        memory: Maximum size of keys and values in bytes, including cached prefixes; by default half of the free memory.
        max_cached_answers: Maximum number of greedy completions that are kept, for equal requests later; 0 keeps none.
        source: Source of the model, for training jobs that load it again.

    Attributes:
        limits: Limits of a batch; they are lowered when memory runs out.

    Raises:
        ConfigError: If the tokenizer has no working chat template or more tokens than the model, or the engine does not
            support the architecture.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        max_sequences: int | None = None,
        memory: int | None = None,
        max_cached_answers: int = 10_000,
        source: ModelSource | None = None,
    ) -> None:
        if max_cached_answers < 0:
            raise ConfigError(f"max_cached_answers={max_cached_answers} must be at least 0")
        if min(1 if limit is None else limit for limit in (max_sequences, memory)) < 1:
            raise ConfigError(f"max_sequences={max_sequences} and memory={memory} must be at least 1, or left out")
        self._chat = ChatTokens(tokenizer, name)
        check_architecture(model, name)
        self._vocabulary = vocabulary_size(model, tokenizer, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.adapters = AdapterPool(model)
        self.source = source
        self._name = name
        use_lmpipe_attention(model)
        sequences = max_sequences or (128 if model.device.type == "cpu" else 256)
        self.limits = BatchLimits(sequences, memory or default_memory(model.device), bytes_per_token(model, name))
        self._onednn_linear = OneDnnLinear(model)
        self._decoder = FusedDecoder.create(model, self._onednn_linear)
        self._prefixes = PrefixCache(self.limits.bytes_per_token)
        self._greedy = GreedyCache(max_cached_answers)
        eos = model.generation_config.eos_token_id
        end_tokens = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
        self._end_tokens = frozenset(token for token in end_tokens if token is not None)
        self.constrains = bool(self._end_tokens) and can_constrain(tokenizer)
        self._automaton = lru_cache(maxsize=64)(self._compile)
        log_spinning()
        if model.device.type == "cpu":
            keep_freed_memory()

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str,
        *,
        name: str = "",
        dtype: torch.dtype | str | None = None,
        quantization: Quantization | None = None,
        max_sequences: int | None = None,
        memory: int | None = None,
        max_cached_answers: int = 10_000,
    ) -> LocalLM:
        """Loads a model from the hub or a folder, onto the GPU if there is one.

        Args:
            id_or_path: Hub id or local folder.
            name: Name of the base weights; by default `id_or_path`, with the dtype and the quantization if they are
                given, since they change the weights.
            dtype: Dtype of the weights, or its name; by default float32 on a CPU, and the dtype of the checkpoint on a
                GPU.
            quantization: Quantization of the base: ``"nf4"`` or ``"int8"`` for weights in 4 or 8 bits by bitsandbytes;
                ``"int8-dynamic"`` for products in int8, on CPUs that multiply int8 in hardware; or None.
            max_sequences: Maximum number of sequences that are decoded together; see the class.
            memory: Maximum size of keys and values in bytes; see the class.
            max_cached_answers: Maximum number of greedy completions that are kept; see the class.

        Raises:
            ConfigError: If the model does not exist, it has no chat template, or the engine does not support it.
        """
        source = ModelSource.create(id_or_path, dtype, quantization)
        model, tokenizer = load_model(source)
        return cls(
            model,
            tokenizer,
            name or source.name,
            max_sequences=max_sequences,
            memory=memory,
            max_cached_answers=max_cached_answers,
            source=source,
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def prefix_bytes(self) -> int:
        """Size of the cached keys and values of shared prefixes, in bytes."""
        return self._prefixes.bytes

    @property
    def is_quantized(self) -> bool:
        """Whether the base is quantized."""
        return bool(getattr(self.model, "is_quantized", False)) or has_int8_layers(self.model)

    @property
    def is_quantized_to_4_bits(self) -> bool:
        """Whether bitsandbytes has quantized the base to 4 bits, as QLoRA requires."""
        return bool(getattr(self.model, "is_loaded_in_4bit", False))

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt and its completion together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def end_token(self) -> int:
        """The token that ends an assistant message."""
        return int(self.tokenizer.eos_token_id)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self.adapters.register(adapter, folder)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Encodes a chat up to the beginning of the next assistant message; see `ChatTokens.encode`."""
        return self._chat.encode(messages)

    def encode_text(self, text: str) -> list[int]:
        """Encodes a completion, without special tokens; see `ChatTokens.encode_text`."""
        return self._chat.encode_text(text)

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return self._greedy.answer(requests, self._complete)

    def _complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        started = perf_counter()
        sequences = [self._sequence(request) for request in requests]
        for adapter in sorted({request.weights.adapter or "" for request in requests}):
            members = [
                sequence
                for sequence, request in zip(sequences, requests, strict=True)
                if isinstance(sequence, SequenceState) and (request.weights.adapter or "") == adapter
            ]
            self.generate(members, adapter or None)
        gpu_seconds = perf_counter() - started if self.model.device.type == "cuda" else 0.0
        share = gpu_seconds / max(len(sequences), 1)
        return [
            self._completion(sequence, share) if isinstance(sequence, SequenceState) else sequence
            for sequence in sequences
        ]

    def _sequence(self, request: Request) -> SequenceState | EngineError:
        check_deadline()
        try:
            prompt = tuple(self.encode(request.messages))
            error = (
                wrong_base_error(request, self.name)
                or context_length_error(request, len(prompt), self.context_length, self.name)
                or self._memory_error(request, len(prompt))
            )
            return error or SequenceState(prompt, request.sampling, request.seed, self._guide(request))
        except EngineError as raised:
            return raised

    def _memory_error(self, request: Request, prompt_tokens: int) -> EngineError | None:
        max_tokens = request.sampling.max_tokens
        needed = (prompt_tokens + max_tokens) * self.limits.bytes_per_token
        if needed <= self.limits.memory:
            return None
        return EngineError(
            f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} need {needed:,} bytes of keys and values, but "
            f"the engine has {self.limits.memory:,}; pass a larger memory= to LocalLM"
        )

    def _guide(self, request: Request) -> Guide | None:
        if request.regex is None:
            return None
        guide = Guide(self._automaton(request.regex))
        if guide.min_tokens > request.sampling.max_tokens:
            raise EngineError(
                f"a completion that matches the regex takes at least {guide.min_tokens} tokens, but max_tokens is "
                f"{request.sampling.max_tokens}; increase it"
            )
        return guide

    def _compile(self, regex: str) -> Automaton:
        return Automaton(regex, self._token_bytes, self._end_tokens)

    @cached_property
    def _token_bytes(self) -> dict[bytes, list[int]]:
        return token_bytes(self.tokenizer)

    def generate(self, sequences: Sequence[SequenceState], adapter: str | None = None) -> None:
        """Completes sequences with the same weights. If memory runs out, it continues with smaller batches.

        The engine can be used again after any error.

        Args:
            sequences: Sequences to complete in place; each must fit the context and the memory.
            adapter: Digest of a registered adapter, or None for the base.

        Raises:
            EngineError: If the adapter cannot be used, the model fails, or memory does not suffice for one sequence.
            BudgetSpent: If the time limit of the current call is over.
        """
        errors = ErrorTranslator(
            (IndexError, RuntimeError, TypeError, ValueError),
            lambda error: EngineError(f"{self.name} failed during generation: {library_message(error)}"),
        )
        with (
            self.adapters.active(adapter) as active,
            self._prefixes.cleared_on_error(),
            errors,
        ):
            while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
                self._run_batch(active, adapter or "", unfinished)

    def _run_batch(self, active: ActiveModel, weights: str, sequences: Sequence[SequenceState]) -> None:
        """Completes sequences; if memory runs out, lowers the limits and restarts the unfinished ones."""
        for sequence in sequences:
            sequence.virtual_tokens = self._prefixes.insert(weights, active.prefix) if active.prefix else 0
        decoder = self._decoder if self._decoder is not None and self._decoder.is_current else None
        batch = ContinuousBatch(
            active.model,
            sequences,
            weights,
            self._prefixes,
            self.limits,
            self._end_tokens,
            self._decode,
            self._vocabulary,
            decoder,
        )
        try:
            with self._onednn_linear if decoder is None else nullcontext():
                batch.run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._lower_limits(error)
            for sequence in sequences:
                if sequence.finish_reason is None:
                    sequence.restart()

    def _lower_limits(self, error: RuntimeError | MemoryError) -> None:
        self._prefixes.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.limits.sequences == 1:
            raise EngineError(
                f"not even one sequence fits in memory alongside {self.name}: {library_message(error)}"
            ) from error
        sequences, memory = self.limits.sequences // 2, self.limits.memory // 2
        logger.warning(
            "out of memory: continuing with at most %d sequences and %d bytes of keys and values", sequences, memory
        )
        self.limits = replace(self.limits, sequences=sequences, memory=memory)

    def _completion(self, sequence: SequenceState, gpu_seconds: float) -> Completion | EngineError:
        if sequence.failed:
            return EngineError(
                f"{self.name} cannot answer this request: {len(sequence.tokens)} tokens after the prompt, the logits "
                "are NaN or infinite; the weights are damaged, or the dtype overflows: load the model with "
                "dtype='float32' or 'bfloat16'"
            )
        return Completion(
            cut_at_stop(self._decode(sequence.tokens), sequence.sampling.stop),
            sequence.finish_reason or "length",
            Usage(1, len(sequence.prompt), sequence.sampled, gpu_seconds=gpu_seconds),
            tuple(sequence.logprobs) if sequence.sampling.logprobs else None,
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

"""The local engine as an LM: requests in, completions out.

Turns requests into rows of tokens, groups them by weights, and switches adapters on the resident base. Knows nothing
of programs. The decoding loop is in `generate`, shared prefixes are in `prefixes`, attention is in `attention` and
`layouts`, adapters are in `adapters`, models come from `models`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, final

import torch
from transformers import PreTrainedTokenizerBase

from lmpipe.engines.chat import ChatTokens, cut_at_stop, too_long, wrong_base
from lmpipe.engines.library_errors import Renamed, is_out_of_memory, told
from lmpipe.engines.loading import vocabulary_size
from lmpipe.engines.local.adapters import Active, AdapterPool
from lmpipe.engines.local.attention import use
from lmpipe.engines.local.constrained import Automaton, Guide, token_bytes
from lmpipe.engines.local.generate import Batch, Limits
from lmpipe.engines.local.models import (
    Source,
    bytes_per_token,
    check_architecture,
    default_memory,
    load_model,
)
from lmpipe.engines.local.prefixes import PrefixCache
from lmpipe.engines.local.sampling import Row
from lmpipe.engines.onednn_linear import PackedProducts
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import LM, Completion, Message, Request, Usage
from lmpipe.runtime.deadline import check_deadline

logger = logging.getLogger(__name__)


@final
class LocalLM(LM):
    """A causal LM in process.

    Args:
        model: A transformers causal LM; the engine keeps it for itself.
        tokenizer: Its tokenizer, with a chat template.
        name: Identifies the base weights in states and stores.
        max_rows: Most rows that are decoded together; by default 64 on a CPU and 256 on a GPU.
        memory: Bytes for keys and values, kept prefixes included; by default half of what is free now.
        source: Where the model came from, for trainings that load it anew.

    Attributes:
        limits: What a batch may take; lower after the memory ran out.

    Raises:
        ConfigError: If the tokenizer has no chat template that works or more tokens than the model, or the
            architecture cannot run here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        max_rows: int | None = None,
        memory: int | None = None,
        source: Source | None = None,
    ) -> None:
        if min(1 if limit is None else limit for limit in (max_rows, memory)) < 1:
            raise ConfigError(f"max_rows={max_rows} and memory={memory} must be at least 1, or left out")
        self._chat = ChatTokens(tokenizer, name)
        check_architecture(model, name)
        self._vocabulary = vocabulary_size(model, tokenizer, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.adapters = AdapterPool(model)
        self.source = source
        self._name = name
        use(model)
        rows = max_rows or (64 if model.device.type == "cpu" else 256)
        self.limits = Limits(rows, memory or default_memory(model.device), bytes_per_token(model, name))
        self._products = PackedProducts(model)
        self._prefixes = PrefixCache(self.limits.bytes_per_token)
        ends = [tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)]
        self._ends = frozenset(token for token in ends if token is not None)
        self._automaton = lru_cache(maxsize=64)(self._compile)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str,
        *,
        name: str = "",
        dtype: torch.dtype | str | None = None,
        quantization: Literal["nf4", "int8"] | None = None,
        max_rows: int | None = None,
        memory: int | None = None,
    ) -> LocalLM:
        """Loads a model from the hub or a folder, onto the GPU if there is one.

        Args:
            id_or_path: Hub id or local folder.
            name: By default `id_or_path` and a dtype or quantization that is asked for, since the weights are then
                others.
            dtype: Of the weights, or its name; by default float32 on a CPU, and what the model was saved in on a GPU.
            quantization: Loads the base in 4 or 8 bits through bitsandbytes.
            max_rows: See the class.
            memory: See the class.

        Raises:
            ConfigError: If there is no model there, it has no chat template, or it cannot run here.
        """
        source = Source.of(id_or_path, dtype, quantization)
        model, tokenizer = load_model(source)
        return cls(model, tokenizer, name or source.name, max_rows=max_rows, memory=memory, source=source)

    @property
    def name(self) -> str:
        return self._name

    @property
    def prefix_bytes(self) -> int:
        """Memory of the keys and values that are kept for the next batch."""
        return self._prefixes.bytes

    @property
    def is_quantized(self) -> bool:
        """Whether the base is in 4 or 8 bits."""
        return bool(getattr(self.model, "is_quantized", False))

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def end_token(self) -> int:
        """The token that ends an assistant message."""
        return int(self.tokenizer.eos_token_id)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self.adapters.register(adapter, folder)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to the beginning of the next assistant message; see `ChatTokens.encode`."""
        return self._chat.encode(messages)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a completion, without special tokens; see `ChatTokens.encode_text`."""
        return self._chat.encode_text(text)

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        started = perf_counter()
        rows = [self._row(request) for request in requests]
        for adapter in sorted({request.weights.adapter or "" for request in requests}):
            members = [
                row
                for row, request in zip(rows, requests, strict=True)
                if isinstance(row, Row) and (request.weights.adapter or "") == adapter
            ]
            self.generate(members, adapter or None)
        on_gpu = perf_counter() - started if self.model.device.type == "cuda" else 0.0
        share = on_gpu / max(len(rows), 1)
        return [self._completion(row, share) if isinstance(row, Row) else row for row in rows]

    def _row(self, request: Request) -> Row | EngineError:
        check_deadline()
        try:
            prompt = tuple(self.encode(request.messages))
            refusal = (
                wrong_base(request, self.name)
                or too_long(request, len(prompt), self.context_length, self.name)
                or self._too_large(request, len(prompt))
            )
            return refusal or Row(prompt, request.sampling, request.seed, self._guide(request))
        except EngineError as error:
            return error

    def _too_large(self, request: Request, prompt_tokens: int) -> EngineError | None:
        wanted = request.sampling.max_tokens
        needed = (prompt_tokens + wanted) * self.limits.bytes_per_token
        if needed <= self.limits.memory:
            return None
        return EngineError(
            f"{prompt_tokens} prompt tokens and max_tokens={wanted} need {needed:,} bytes of keys and values, but "
            f"the engine has {self.limits.memory:,}; give LocalLM a larger memory="
        )

    def _guide(self, request: Request) -> Guide | None:
        if request.regex is None:
            return None
        guide = Guide(self._automaton(request.regex))
        if guide.least_tokens > request.sampling.max_tokens:
            raise EngineError(
                f"a completion of the form asked for takes at least {guide.least_tokens} tokens, but max_tokens is "
                f"{request.sampling.max_tokens}; make it larger"
            )
        return guide

    def _compile(self, regex: str) -> Automaton:
        return Automaton(regex, self._token_bytes, self._ends)

    @cached_property
    def _token_bytes(self) -> dict[bytes, list[int]]:
        return token_bytes(self.tokenizer)

    def generate(self, rows: Sequence[Row], adapter: str | None = None) -> None:
        """Fills rows of tokens, all on the same weights; out of memory, it goes on with fewer at once.

        Args:
            rows: Prompts; each fits the context and the memory. They are filled in place.
            adapter: Digest of a registered adapter, or none for the base.

        Raises:
            EngineError: If the adapter cannot be used, the model fails, or the memory does not suffice for one row.
            BudgetSpent: If the time for the call under way is over; whatever is raised, the engine can go on.
        """
        with self.adapters.active(adapter) as active, self._products, self._prefixes.whole_or_cleared(), self._named():
            while waiting := [row for row in rows if row.finish_reason is None]:
                self._try(active, adapter or "", waiting)

    def _try(self, active: Active, weights: str, rows: Sequence[Row]) -> None:
        """Fills rows, or lowers the limits and leaves those unfinished that did not get done."""
        for row in rows:
            row.virtual = self._prefixes.plant(weights, active.prefix) if active.prefix else 0
        try:
            Batch(
                active.model, rows, weights, self._prefixes, self.limits, self._ends, self._decode, self._vocabulary
            ).run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(error)
            for row in rows:
                if row.finish_reason is None:
                    row.restart()

    def _named(self) -> Renamed:
        return Renamed(
            (IndexError, RuntimeError, TypeError, ValueError),
            lambda error: EngineError(f"{self.name} failed while it generated: {told(error)}"),
        )

    def _shrink(self, error: RuntimeError | MemoryError) -> None:
        self._prefixes.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.limits.rows == 1:
            raise EngineError(f"not even one row fits the memory beside {self.name}: {told(error)}") from error
        rows, memory = self.limits.rows // 2, self.limits.memory // 2
        logger.warning("out of memory: going on with at most %d rows and %d bytes of keys and values", rows, memory)
        self.limits = replace(self.limits, rows=rows, memory=memory)

    def _completion(self, row: Row, gpu_seconds: float) -> Completion | EngineError:
        if row.failed:
            return EngineError(
                f"{self.name} cannot answer this request: {len(row.tokens)} tokens after its prompt its logits are NaN "
                "or infinite; its weights are damaged, or its dtype overflows: load it with dtype='float32' or "
                "'bfloat16'"
            )
        return Completion(
            cut_at_stop(self._decode(row.tokens), row.sampling.stop),
            row.finish_reason or "length",
            Usage(1, len(row.prompt), row.drawn, gpu_seconds=gpu_seconds),
            tuple(row.logprobs) if row.sampling.logprobs else None,
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _listed(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]

"""The local engine: a transformers causal LM in this process.

Orders a batch by weights and shared prompt beginning, and switches adapters on the resident base. Knows nothing
of programs; the decoding loop is in `generate`, adapters are in `adapters`, prefix sharing is in `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lmpipe.engines.adapters import AdapterPool
from lmpipe.engines.batch import plan
from lmpipe.engines.generate import Row, generate
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import LM, Completion, Message, Request, Usage


@final
class LocalLM(LM):
    """A causal LM in process.

    Args:
        model: A transformers causal LM.
        tokenizer: Its tokenizer, with a chat template.
        name: Identifies the base weights in states and stores.
        max_rows: Most rows that are decoded together; memory grows with it.

    Raises:
        ConfigError: If the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str, max_rows: int = 32) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of {name!r} has no chat template; choose an instruction-tuned model")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.adapters = AdapterPool(model)
        self._name = name
        self._max_rows = max_rows
        ends = [tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)]
        self._ends = frozenset(token for token in ends if token is not None)

    @classmethod
    def from_pretrained(cls, id_or_path: str, *, name: str = "", dtype: torch.dtype = torch.float32) -> LocalLM:
        """Loads a model from the hub or a folder.

        Args:
            id_or_path: Hub id or local folder.
            name: By default `id_or_path`.
            dtype: Of the weights.

        Raises:
            ConfigError: If there is no model there, or it has no chat template.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(id_or_path)
            model: Any = AutoModelForCausalLM.from_pretrained(id_or_path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load a causal LM from {id_or_path!r}: {error}") from error
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, name or id_or_path)

    @property
    def name(self) -> str:
        return self._name

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def end_token(self) -> int:
        """The token that ends an assistant message."""
        return int(self.tokenizer.eos_token_id)

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self.adapters.register(adapter, folder)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to the beginning of the next assistant message."""
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.encode_text(str(text))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text as it stands, without special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        prompts = [self.encode(request.messages) for request in requests]
        answers: list[Completion | EngineError | None] = [
            self._refusal(request, len(prompt)) for request, prompt in zip(requests, prompts, strict=True)
        ]
        for adapter in sorted({request.weights.adapter or "" for request in requests}):
            chosen = [
                number
                for number, request in enumerate(requests)
                if (request.weights.adapter or "") == adapter and answers[number] is None
            ]
            with self.adapters.active(adapter or None) as model:
                self._generate(model, chosen, requests, prompts, answers)
        return [answer for answer in answers if answer is not None]

    def _generate(
        self,
        model: Any,
        chosen: Sequence[int],
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        answers: list[Completion | EngineError | None],
    ) -> None:
        """Answers the chosen requests, which run on the same weights."""
        for batch in plan([prompts[number] for number in chosen], self._max_rows):
            numbers = [chosen[row] for row in batch.rows]
            rows = [Row(requests[number].sampling, requests[number].seed) for number in numbers]
            generate(model, batch, rows, self._ends, self._decode)
            for number, row in zip(numbers, rows, strict=True):
                answers[number] = self._completion(row, len(prompts[number]))

    def _refusal(self, request: Request, prompt_tokens: int) -> EngineError | None:
        if request.weights.base != self.name:
            return EngineError(f"the request runs on {request.weights.base!r}, but this LM is {self.name!r}")
        if prompt_tokens + request.sampling.max_tokens <= self.context_length:
            return None
        return EngineError(
            f"{prompt_tokens} prompt tokens and max_tokens={request.sampling.max_tokens} do not fit the context of "
            f"{self.context_length} tokens of {self.name}; use fewer demonstrations or a smaller max_tokens"
        )

    def _completion(self, row: Row, prompt_tokens: int) -> Completion:
        text = self._decode(row.tokens)
        cuts = [text.index(stop) for stop in row.sampling.stop if stop in text]
        usage = Usage(1, prompt_tokens, len(row.tokens))
        return Completion(text[: min(cuts)] if cuts else text, row.finish_reason or "length", usage)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _listed(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]

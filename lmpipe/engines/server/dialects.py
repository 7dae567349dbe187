"""The dialects of OpenAI-compatible servers: their fields for sampling, regular expressions and adapters.

Knows how requests differ between servers and how to detect a server's dialect. Knows nothing about sending, retries or
load balancing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, final

from lmpipe.errors import EngineError
from lmpipe.lm import Request
from lmpipe.web.endpoints import Endpoint
from lmpipe.web.http import HTTPStatusError, InvalidResponse, Response

_NO_SUCH_ROUTE = (404, 405)

DialectName = Literal["vllm", "sglang", "tgi", "llamacpp", "openai"]


@final
@dataclass(frozen=True, slots=True)
class Dialect:
    """The dialect of one kind of server.

    Args:
        name: Name of the dialect.
        neutral: Sampling fields that are always sent, so that defaults of the server or of the model folder cannot
            change a completion.
        top_k: Whether the server supports top-k sampling.
        regex: Creates the fields that constrain a completion to a regular expression; None if unsupported.
        regex_in_completions: Whether regular expressions also work in completions without a chat template.
        token_prompts: Whether prompts may be token ids.
        adapter: Creates the fields that select an adapter by name; None if adapters cannot be loaded at run time.
        adapter_route: Route that loads and unloads adapters, relative to the server's root; ``{}`` stands for the
            action.
        adapter_hint: Command that starts a server that can load adapters.
        max_tokens_field: Field for the maximum number of new tokens of a chat completion.
    """

    name: DialectName
    neutral: Mapping[str, Any] = field(default_factory=dict)
    top_k: bool = True
    regex: Callable[[str], dict[str, Any]] | None = None
    regex_in_completions: bool = True
    token_prompts: bool = True
    adapter: Callable[[str], dict[str, Any]] | None = None
    adapter_route: str = ""
    adapter_hint: str = ""
    max_tokens_field: str = "max_tokens"

    def sampling(self, request: Request) -> dict[str, Any]:
        """Returns the fields for the sampling settings, seed and regular expression of a request.

        Raises:
            EngineError: If the dialect has no field for one of them.
        """
        settings = request.sampling
        fields = {
            **self.neutral,
            "temperature": settings.temperature,
            "seed": request.seed % (2**31 - 1) + 1,  # servers accept 31 bits, and some reject 0
        }
        if settings.top_p < 1:
            fields["top_p"] = settings.top_p
        if settings.top_k is not None:
            if not self.top_k:
                raise EngineError(f"{self.name!r} servers do not support top_k; leave it out")
            fields["top_k"] = settings.top_k
        if settings.stop:
            fields["stop"] = list(settings.stop)
        if request.regex is not None:
            if self.regex is None:
                raise EngineError(
                    f"{self.name!r} servers cannot constrain a completion to a regular expression; run without "
                    "structured output, or use vLLM, SGLang or TGI"
                )
            fields |= self.regex(request.regex)
        return fields


DIALECTS: Mapping[DialectName, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "vllm",
            neutral={"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            regex=lambda regex: {"structured_outputs": {"regex": regex}},
            adapter=lambda name: {"model": name},
            adapter_route="/v1/{}_lora_adapter",
            adapter_hint="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve … --enable-lora --max-lora-rank RANK",
        ),
        Dialect(
            "sglang",
            neutral={"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            regex=lambda regex: {"regex": regex},
            adapter=lambda name: {"lora_path": name},
            adapter_route="/{}_lora_adapter",
            adapter_hint="sglang.launch_server … --enable-lora --max-lora-rank RANK --lora-target-modules all",
        ),
        Dialect(
            "tgi",
            top_k=False,
            regex=lambda regex: {"response_format": {"type": "regex", "value": regex}},
            regex_in_completions=False,
            token_prompts=False,
        ),
        Dialect("llamacpp", neutral={"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}),
        Dialect("openai", top_k=False, max_tokens_field="max_completion_tokens"),
    )
}


def detect(endpoint: Endpoint) -> Dialect:
    """Detects the dialect of a server from its list of models and its info page; ``openai`` if they do not tell.

    Raises:
        RequestError: If the list of models cannot be requested or is invalid.
    """
    try:
        models = endpoint.send("GET", "/models")
    except HTTPStatusError as error:
        if error.status_code in _NO_SUCH_ROUTE:
            return DIALECTS["openai"]
        raise
    owners = _owners(models)
    for name in ("vllm", "sglang", "llamacpp"):
        if name in owners:
            return DIALECTS[name]
    try:
        info = endpoint.send("GET", "/info", strip_suffix="/v1").json()
    except InvalidResponse:
        return DIALECTS["openai"]  # gateways often have an HTML page there
    except HTTPStatusError as error:
        if error.status_code == 429 or error.status_code >= 500:
            raise
        return DIALECTS["openai"]
    return DIALECTS["tgi" if isinstance(info, dict) and "docker_label" in info else "openai"]


def _owners(response: Response) -> set[str]:
    """Returns the owners in a list of models; some servers send null if there is no model."""
    body = response.json()
    models = body.get("data") if isinstance(body, dict) else None
    if not isinstance(body, dict) or "data" not in body or not isinstance(models, (list, NoneType)):
        raise InvalidResponse(f"the response is not a list of models: {response.excerpt}")
    owners = (model.get("owned_by") for model in models or () if isinstance(model, dict))
    return {owner for owner in owners if isinstance(owner, str)}

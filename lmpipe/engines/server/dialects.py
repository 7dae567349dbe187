"""What the families of OpenAI-compatible servers call things: sampling fields, patterns, adapters.

Knows how their requests differ, and how to tell the families apart. Knows nothing of sending, retrying or balancing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, final

from lmpipe.errors import EngineError
from lmpipe.lm import Request
from lmpipe.web.endpoints import Endpoint
from lmpipe.web.http import Answer, BadAnswer, Refused

_UNKNOWN = (404, 405)  # what a server says of a route that it has not

DialectName = Literal["vllm", "sglang", "tgi", "llamacpp", "openai"]


@final
@dataclass(frozen=True, slots=True)
class Dialect:
    """One family of servers.

    Args:
        name: Of the family.
        neutral: Sampling fields that are always sent, so that no default of the server or of the model's folder
            changes an answer.
        top_k: Whether it takes top-k.
        regex: The fields that hold a completion to a regular expression; none if it cannot.
        regex_in_completions: Whether that works without its chat template, too.
        token_prompts: Whether prompts may be token ids.
        adapter: The fields that ask for an adapter by its name; none if it loads none at run time.
        adapter_route: Where adapters are loaded and unloaded, with ``{}`` for either word; below the server's root.
        adapter_hint: How a server is started that loads adapters.
        limit: The field for the most new tokens of a chat completion.
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
    limit: str = "max_tokens"

    def sampling(self, request: Request) -> dict[str, Any]:
        """The fields of a request's sampling, seed and regex.

        Raises:
            EngineError: If the family has no field for one of them.
        """
        asked = request.sampling
        fields = {
            **self.neutral,
            "temperature": asked.temperature,
            "seed": request.seed % (2**31 - 1) + 1,  # servers take 31 bits, and some no 0
        }
        if asked.top_p < 1:
            fields["top_p"] = asked.top_p
        if asked.top_k is not None:
            if not self.top_k:
                raise EngineError(f"servers of the family {self.name!r} take no top_k; leave it out")
            fields["top_k"] = asked.top_k
        if asked.stop:
            fields["stop"] = list(asked.stop)
        if request.regex is not None:
            if self.regex is None:
                raise EngineError(
                    f"servers of the family {self.name!r} cannot hold a completion to a regular expression; run "
                    "without structured output, or on vLLM, SGLang or TGI"
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
        Dialect("openai", top_k=False, limit="max_completion_tokens"),
    )
}


def detect(endpoint: Endpoint) -> Dialect:
    """The family of a server, by what it says of its models and of itself; ``openai`` if it says nothing.

    Raises:
        Fault: If it cannot be asked for its models, or answers with something else.
    """
    try:
        answer = endpoint.send("GET", "/models")
    except Refused as error:
        if error.status in _UNKNOWN:
            return DIALECTS["openai"]
        raise
    owners = _owners(answer)
    for name in ("vllm", "sglang", "llamacpp"):
        if name in owners:
            return DIALECTS[name]
    try:
        info = endpoint.send("GET", "/info", below="/v1").json()
    except BadAnswer:
        return DIALECTS["openai"]  # a page for people, as gateways have
    except Refused as error:
        if error.status == 429 or error.status >= 500:
            raise
        return DIALECTS["openai"]
    return DIALECTS["tgi" if isinstance(info, dict) and "docker_label" in info else "openai"]


def _owners(answer: Answer) -> set[str]:
    """Who owns the models of a list; some servers write none where there is no model."""
    found = answer.json()
    models = found.get("data") if isinstance(found, dict) else None
    if not isinstance(found, dict) or "data" not in found or not isinstance(models, (list, NoneType)):
        raise BadAnswer(f"the answer is no list of models: {answer.quoted}")
    owners = (model.get("owned_by") for model in models or () if isinstance(model, dict))
    return {owner for owner in owners if isinstance(owner, str)}

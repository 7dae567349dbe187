"""Faulty answers of servers, once or always: the request is repeated, or it alone fails."""

from __future__ import annotations

from lmpipe import Completion, EngineError
from lmpipe.engines.server import ServerLM
from tests.engines.faulty_answers import FAULTY, RawResponse, always, answering, completion, http, once
from tests.engines.openai_server import client, request
from tests.tally import Tally


def faulty_answers() -> Tally:
    """Tries all faults of `FAULTY`."""
    tally = Tally()
    with answering(always(http(completion()))) as server:
        for name, fault in FAULTY.items():
            endless = bool(fault.pause) or fault.end == "stay"
            with client(server.url, dialect="vllm", retries=1, timeout=0.3 if endless else 30.0) as lm:
                server.begin(once(fault))
                answers = lm.complete([request(logprobs=True)])
                fine = [answer.text for answer in answers if isinstance(answer, Completion)] == ["fine"]
                server.begin(always(fault))
                refused = _is_refused(lm, fault)
            tally.tried += 2
            tally.harmless += fine
            tally.refused += refused
            tally.wrong += [] if fine else [f"{name}, once: {answers}"]
            tally.wrong += [] if refused else [f"{name}, always: no error"]
    return tally


def _is_refused(lm: ServerLM, fault: RawResponse) -> bool:
    """Whether a permanent fault becomes an error of the request or, if the server is at fault, of the batch."""
    try:
        (answer,) = lm.complete([request(logprobs=True)])
    except EngineError:
        return fault.server_fault
    return isinstance(answer, EngineError) and not fault.server_fault

"""Traces on disk: what the examples of an evaluation were asked, answered and scored, step by step.

A log is gzipped JSON Lines, one `TraceRecord` each, in the order of example ids. It is there to be read by people and
plots: values that are not JSON are kept as text, so a trace cannot be made of a record again.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from lmpipe.errors import CorruptBlob
from lmpipe.hashing import digest_bytes
from lmpipe.trace import AnyStep, RetrievalStep, Trace


@final
class StepRecord(BaseModel):
    """One LM call or retrieval of a trace.

    Attributes:
        path: Of its module.
        index: Which call of that module it was, from 0.
        kind: Which of the two.
        messages: Exactly what was sent, as ``(role, content)``; empty for a retrieval.
        text: The raw completion.
        inputs: What the module was given.
        outputs: What was parsed or found; none if that failed.
        error: Why it failed.
        prompt_tokens: Read.
        completion_tokens: Written.
    """

    path: str
    index: int
    kind: Literal["lm", "retrieval"]
    messages: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    inputs: dict[str, Any]
    outputs: dict[str, Any] | None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@final
class TraceRecord(BaseModel):
    """One run of a program on one example; fields like those of `lmpipe.trace.Trace`.

    Attributes:
        measures: What was measured besides the score, by name.
    """

    example: str
    inputs: dict[str, Any]
    labels: dict[str, Any]
    prediction: dict[str, Any] | None
    score: float
    measures: dict[str, float] = {}
    failure: str | None = None
    error: str | None = None
    feedback: str = ""
    steps: tuple[StepRecord, ...]


def record_of(trace: Trace, measures: Mapping[str, Mapping[str, float]]) -> TraceRecord:
    """What is kept of a trace; `measures` are values by name and example id."""
    return TraceRecord(
        example=trace.example.id,
        inputs=_json(trace.example.inputs),
        labels=_json(trace.example.labels),
        prediction=None if trace.prediction is None else _json(trace.prediction),
        score=trace.score,
        measures={name: values[trace.example.id] for name, values in measures.items() if trace.example.id in values},
        failure=trace.failure,
        error=trace.error,
        feedback=trace.feedback,
        steps=tuple(map(_step, trace.steps)),
    )


def write_log(traces: Iterable[Trace], measures: Mapping[str, Mapping[str, float]] = {}) -> bytes:
    """The log of some traces; the same bytes for the same traces. `measures` are those of `record_of`."""
    records = sorted((record_of(trace, measures) for trace in traces), key=lambda record: record.example)
    text = "".join(record.model_dump_json(exclude_defaults=True) + "\n" for record in records)
    return gzip.compress(text.encode(), mtime=0)


def read_log(path: Path) -> list[TraceRecord]:
    """The records of a log that is named by its digest.

    Raises:
        CorruptBlob: If it is absent or damaged.
    """
    try:
        data = path.read_bytes()
        if digest_bytes(data) != path.name:
            raise CorruptBlob(f"{path} is damaged; run the evaluation again")
        return [TraceRecord.model_validate_json(line) for line in gzip.decompress(data).splitlines()]
    except (OSError, ValidationError) as error:
        raise CorruptBlob(f"{path} cannot be read ({error}); run the evaluation again") from error


def _step(step: AnyStep) -> StepRecord:
    shared: dict[str, Any] = {
        "path": step.path,
        "index": step.index,
        "kind": step.kind,
        "inputs": _json(step.inputs),
        "outputs": None if step.outputs is None else _json(step.outputs),
        "error": step.error,
    }
    if isinstance(step, RetrievalStep):
        return StepRecord(**shared)
    return StepRecord(
        **shared,
        messages=tuple((message.role, message.content) for message in step.request.messages),
        text=step.text,
        prompt_tokens=step.usage.prompt_tokens,
        completion_tokens=step.usage.completion_tokens,
    )


def _json(values: Any) -> Any:
    return to_jsonable_python(dict(values), fallback=str)

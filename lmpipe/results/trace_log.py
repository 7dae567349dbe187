"""Traces on disk: what the examples of an evaluation were asked, answered and scored, step by step.

A log is gzipped JSON Lines, one `TraceRecord` each, in the order of example ids. It is there to be read by people and
plots: values that are not JSON are kept as text, so a trace cannot be made of a record again.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ValidationError

from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.runtime.trace import RetrievalStep, Trace, TraceStep
from lmpipe.storage.hashing import digest_file, jsonable
from lmpipe.text.cleaning import cleaned
from lmpipe.text.display import shown

_GZIP = 31  # zlib's number for a gzip header, whose time is then 0


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
    """One run of a program on one example; fields like those of `lmpipe.runtime.trace.Trace`.

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


def log_pieces(traces: Iterable[Trace], measures: Mapping[str, Mapping[str, float]] = {}) -> Iterator[bytes]:
    """The log of some traces, piece by piece; the same bytes for the same traces. `measures` are those of `record_of`.

    One record is made at a time, so that a log takes little memory however long it is.
    """
    compressor = zlib.compressobj(9, wbits=_GZIP)
    for trace in sorted(traces, key=lambda trace: trace.example.id):
        yield compressor.compress(record_of(trace, measures).model_dump_json(exclude_defaults=True).encode() + b"\n")
    yield compressor.flush()


def records_of(path: Path) -> Iterator[TraceRecord]:
    """The records of a log that is named by its digest, one at a time.

    Raises:
        CorruptBlob: If it is absent or damaged; before the first record, if its bytes are not those it was named by.
    """
    try:
        if not path.is_file() or digest_file(path) != path.name:
            raise _corrupt(path, "missing or damaged")
        with gzip.open(path) as file:
            for line in file:
                yield TraceRecord.model_validate_json(line)
    except (OSError, EOFError, zlib.error, ValidationError) as error:
        raise _corrupt(path, f"cannot be read ({error})") from error


def _corrupt(path: Path, problem: str) -> CorruptBlob:
    return CorruptBlob(
        f"{path}: {problem}; restore it from a copy, or delete it and start the run again: the evaluation is then done "
        "again"
    )


def _step(step: TraceStep) -> StepRecord:
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
    try:
        made = jsonable(dict(values))
    except ConfigError:  # something in it is no JSON
        made = {name: _readable(value) for name, value in values.items()}
    return cleaned(made)


def _readable(value: Any) -> Any:
    try:
        return jsonable(value)
    except ConfigError:
        return shown(value, 2000)

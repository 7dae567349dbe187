"""Trace logs: the traces of an evaluation on disk, with all steps and scores.

A log is gzipped JSON Lines with one `TraceRecord` a line, in the order of example ids. It is meant for people and
plots: values that are not JSON are written as text, so a trace cannot be restored from its record.
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
from lmpipe.text.cleaning import clean_value
from lmpipe.text.display import shown

_GZIP = 31  # zlib's number for a gzip header, whose time is then 0


@final
class StepRecord(BaseModel):
    """One LM call or retrieval of a trace.

    Attributes:
        path: Path of the module.
        index: Index of the call among the calls of this module, from 0.
        kind: LM call or retrieval.
        messages: Messages exactly as sent, as ``(role, content)``; empty for a retrieval.
        text: Text of the completion.
        inputs: Inputs of the module.
        outputs: Parsed outputs or retrieved passages; None if the step failed.
        error: Reason of the failure.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the completion.
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
    """The trace of a program on one example; see `lmpipe.runtime.trace.Trace` for the fields.

    Attributes:
        measures: Measures besides the score: name → value.
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


def _trace_record(trace: Trace, measures: Mapping[str, Mapping[str, float]]) -> TraceRecord:
    """Converts a trace to a record.

    Args:
        trace: The trace.
        measures: Measure → example id → value.
    """
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


def trace_log_chunks(traces: Iterable[Trace], measures: Mapping[str, Mapping[str, float]] = {}) -> Iterator[bytes]:
    """Yields the bytes of a trace log in chunks; equal traces have equal bytes.

    Only one record is in memory at a time.

    Args:
        traces: Traces of an evaluation.
        measures: Measure → example id → value.
    """
    compressor = zlib.compressobj(9, wbits=_GZIP)
    for trace in sorted(traces, key=lambda trace: trace.example.id):
        yield compressor.compress(
            _trace_record(trace, measures).model_dump_json(exclude_defaults=True).encode() + b"\n"
        )
    yield compressor.flush()


def read_trace_log(path: Path) -> Iterator[TraceRecord]:
    """Yields the records of a trace log, one at a time.

    Args:
        path: Path of the log; its name is its digest, which is checked before the first record.

    Raises:
        CorruptBlob: If the log is missing or damaged.
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
        converted = jsonable(dict(values))
    except ConfigError:  # one of the values has no JSON
        converted = {name: _readable(value) for name, value in values.items()}
    return clean_value(converted)


def _readable(value: Any) -> Any:
    try:
        return jsonable(value)
    except ConfigError:
        return shown(value, 2000)

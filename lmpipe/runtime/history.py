"""The history of a session: LM calls as they were sent and answered, as text for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final, overload

from lmpipe.runtime.trace import Step
from lmpipe.text.display import escape_controls
from lmpipe.text.tables import preformatted


@final
class CallHistory(Sequence[Step]):
    """LM calls, the oldest first. Printing them shows every message as it was sent, and the completion.

    Args:
        steps: The calls.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> CallHistory: ...
    def __getitem__(self, index: int | slice) -> Step | CallHistory:
        return CallHistory(self._steps[index]) if isinstance(index, slice) else self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        return "\n\n".join("\n".join(_lines(step)) for step in self._steps) or "no LM call yet"

    def _repr_html_(self) -> str:
        """The calls, for notebooks."""
        return preformatted(repr(self))


def _lines(step: Step) -> Iterator[str]:
    request, usage = step.request, step.usage
    adapter = f", adapter {request.weights.adapter[:12]}" if request.weights.adapter else ""
    temperature = f"temperature {request.sampling.temperature:g}"
    yield f"── {step.path}, call {step.index}: {request.weights.base}{adapter}, {temperature}"
    for message in request.messages:
        yield f"[{message.role}]"
        yield escape_controls(message.content)
    yield f"[completion: {usage.completion_tokens} tokens after {usage.prompt_tokens}]"
    yield escape_controls(step.text or "")
    if step.error is not None:
        yield f"[error] {escape_controls(step.error)}"

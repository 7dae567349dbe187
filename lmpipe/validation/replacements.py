"""What to write in place of an argument of the wrong type: code that is made from the argument, where that is possible.

Classes are told apart by their names, so that this module stands below all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmpipe.text.display import shown

_FROM_TEXT: Mapping[str, str] = {
    "LM": "load_lm({})",
    "RunStore": "RunStore({})",
    "Embedder": "load_embedder({})",
    "Retriever": "load_retriever({})",
    "PromptState": "PromptState(instructions={})",
    "Callable": "{}, the function itself, without quotes",
}
"""Type → what to write in place of a text."""

_USUAL: Mapping[str, str] = {
    "LM": "load_lm('bundled')",
    "RunStore": "RunStore('runs/first')",
    "Embedder": "load_embedder('bundled')",
    "Retriever": "load_retriever('bm25:passages.jsonl')",
    "PromptState": "PromptState(instructions='…')",
    "WeightState": "WeightState(base=lm.name)",
    "ProgramState": "initial_state(program, session)",
    "Session": "Session(lm=lm)",
    "Sampling": "Sampling(temperature=0.7)",
    "Budget": "Budget(max_lm_calls=1000)",
    "TuningConfig": "TuningConfig(learning_rate=1e-4)",
    "Trainer": "LocalTrainer(lm, TuningConfig())",
    "Optimizer": "BootstrapFewShotRandomSearch(metric)",
    "Example": "Example(inputs={'question': '…'}, labels={'answer': '…'})",
    "Job": "Job(state, example)",
    "Teacher": "Teacher(program)",
    "Template": "Template()",
}
"""Type → an expression that makes a usual value of it."""


def or_write(value: object, kind: type, around: str = "{}") -> str:
    """Returns the clause ``"; write …"`` with code to put in place of an argument; empty if it depends on too much.

    Args:
        value: The argument that was passed.
        kind: The type that it should have.
        around: The call that the code belongs to, such as ``"Session(lm={})"``; or all the code, without ``{}``.
    """
    code = _replacement(value, kind)
    if not code and "{}" in around:
        return ""
    return f"; write {around.replace('{}', code)}"


def _replacement(value: object, kind: type) -> str:
    name = getattr(kind, "__name__", str(kind))
    if isinstance(value, type) and issubclass(value, kind):
        return f"{value.__name__}(…), not the class itself"
    if isinstance(value, str) and name in _FROM_TEXT:
        text = _FROM_TEXT[name]
        return text.format(value if name == "Callable" else shown(value, 100))
    if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
        if name == "Example":
            return _example(value)
        if dataclasses.is_dataclass(kind):
            return f"{name}({', '.join(f'{key}={shown(item, 50)}' for key, item in value.items())})"
    if name == "Trainer" and type(value).__name__ == "TuningConfig":
        return "LocalTrainer(lm, TuningConfig(…))"
    return _USUAL.get(name, "")


def _example(row: Mapping[str, Any]) -> str:
    """Shows a dict as an example. The last of several fields is shown as the label, as data sets usually have it."""
    fields = [f"{name!r}: {shown(value, 50)}" for name, value in row.items()]
    inputs, labels = (fields[:-1], fields[-1:]) if len(fields) > 1 else (fields, [])
    return f"Example(inputs={{{', '.join(inputs)}}}, labels={{{', '.join(labels)}}})"

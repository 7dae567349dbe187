"""Odd, damaged and hostile text and files: every parser must return a value or raise an error of lmpipe."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from benchmarks.experiments.config_file import read_config
from benchmarks.experiments.settings import as_toml
from benchmarks.tasks.iris import IrisTask
from lmpipe import Example, Prediction, ProgramState, PromptState, RunStore, signature
from lmpipe.errors import LmpipeError
from lmpipe.metrics import last_number, score_prediction
from lmpipe.prompting.template import Template
from lmpipe.results.trace_log import read_trace_log
from lmpipe.retrieval.passages import read_passages
from lmpipe.retrieval.training.questions import read_questions
from lmpipe.run_directory import open_run
from lmpipe.storage.hashing import canonical_json
from lmpipe.text.cleaning import clean_text, clean_value
from optimizers import Strategy
from tests.damage import CONFIG, DAMAGES, make_run
from tests.tally import Tally

# fmt: off
_PIECES = [
    "answer:", "reasoning:", "**answer**:", "answer：", "\\answer:", "<think>", "</think>", "<thinking>", "```", "~~~",
    "\n", "entailed", "not", "not_entailed", "New York", "York", "-", "_", ",", ".", "%", "$", "−", "3", "1,000",
    "1 000", "1e5", "NaN", "[", "]", "{", "}", '"', "'", "null", "true", "- ", "• ", "1. ", "->", "*", "(", ")", ":",
    "Literal", "list[str]", "int", "p", "w", "\x00", "\x1b[31m", "\ud83d", "\u202e", "\ufeff", "é", "漢", "😀",
    "9" * 5000, "[" * 2000, "(" * 2000, "[bold]", "\t", "\r\n",
]
# fmt: on
TEXT = st.lists(st.sampled_from(_PIECES) | st.text(st.characters(), max_size=6), max_size=12).map("".join)
SIGNATURES = [
    "q -> answer",
    "q -> reasoning, answer: Literal['entailed', 'not_entailed']",
    "q -> answer: int",
    "q -> answer: float",
    "q -> answer: bool",
    "q -> answer: list[str]",
    "q -> answer: dict[str, int], reasoning",
    "q -> answer: Literal['New York', 'York'] | None",
    "q -> answer: Any",
]
VALUES = st.recursive(
    TEXT | st.integers() | st.floats() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


def _parses(case: tuple[str, str]) -> None:
    source, text = case
    known = signature(source)
    outputs = clean_value(Template().parse(known, clean_text(text)))
    assert outputs.keys() == {field.name for field in known.outputs}
    assert Template().parse(known, Template().completion(known, outputs)) == outputs


def _reads_back(outputs: dict[str, str]) -> None:
    known = signature("q -> reasoning, answer")
    stripped = {name: text.strip() for name, text in clean_value(outputs).items()}
    assert Template().parse(known, Template().completion(known, stripped)) == stripped


def _strategy(text: str) -> None:
    strategy = Strategy.parse(text, {"p", "w"})
    assert Strategy.parse(str(strategy), {"p", "w"}) == strategy


def _example(values: dict[str, Any]) -> None:
    example = Example(values)
    canonical_json(example.inputs).encode()
    assert Example(dict(reversed(values.items()))).id == example.id


def _state(text: str) -> None:
    state = ProgramState(prompts={"self": PromptState(instructions=text)}, weights={})
    assert ProgramState.model_validate_json(state.model_dump_json()) == state


def _state_of_json(data: bytes) -> None:
    ProgramState.model_validate_json(data)


def _verdict(value: object) -> None:
    score, _ = score_prediction(lambda example, prediction: value, Example({}), Prediction())  # type: ignore[arg-type, return-value]
    assert 0 <= score <= 1


_STATE = (
    ProgramState(prompts={"a": PromptState(instructions="Do it.")}, weights={})
    .with_prompt("a", PromptState(instructions="Do it well."))
    .model_dump_json()
    .encode()
)


@st.composite
def _damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Damages bytes up to three times."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    for name in draw(st.lists(st.sampled_from(sorted(DAMAGES)), min_size=1, max_size=3)):
        data = DAMAGES[name](data, rng) if data else b"\xff"
    return data


def _file(path: Path, read: Callable[[], object], data: bytes) -> None:
    whole = path.read_bytes()
    try:
        path.write_bytes(data)
        read()
    finally:
        path.write_bytes(whole)


def _passages(folder: Path) -> dict[str, bytes]:
    lines = [{"pid": number, "text": f"river {number}", "title": "R"} for number in range(5)]
    questions = [{"question": f"where {number}?", "titles": ["R"]} for number in range(5)]
    files = {
        "passages.jsonl": "\n".join(map(json.dumps, lines)).encode(),
        "passages.tsv": b"id\ttext\ttitle\n" + b"".join(b'%d\t"river %d"\tR\n' % (n, n) for n in range(5)),
        "questions.jsonl": "\n".join(map(json.dumps, questions)).encode(),
        "settings.toml": as_toml(IrisTask().settings).encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def targets(folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], object], int]]:
    """Returns for each name: inputs, the function that reads them, and their share of all inputs.

    Args:
        folder: Folder for the files that are damaged.
    """
    make_run(folder / "run")
    found: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], object], int]] = {
        "completions": (st.tuples(st.sampled_from(SIGNATURES), TEXT), _parses, 30),
        "rendered outputs": (st.fixed_dictionaries({"reasoning": TEXT, "answer": TEXT}), _reads_back, 15),
        "signatures": (TEXT | st.from_regex(r"[a-z]{1,3}(: \w+)? -> [a-z]{1,3}(: \w+(\[\w+\])?)?"), signature, 10),
        "strategies": (TEXT | st.text("pw*()-> 0123", max_size=20), _strategy, 10),
        "numbers": (TEXT, last_number, 8),
        "examples": (st.dictionaries(TEXT, VALUES, max_size=3), _example, 8),
        "verdicts of metrics": (VALUES | st.sampled_from([float("nan"), -1, 7, {}]), _verdict, 4),
        "instructions": (TEXT, _state, 3),
        "states as JSON": (_damaged(_STATE), _state_of_json, 4),
    }
    run = folder / "run"
    log = next(path for path in (run / "blobs").iterdir() if path.is_file() and path.read_bytes()[:2] == b"\x1f\x8b")
    readers: dict[Path, Callable[[], object]] = {
        run / "journal.jsonl": partial(_opened, run),
        run / "config.json": partial(_opened, run),
        run / "result.json": partial(open_run, run),
        run / "splits.json": lambda: open_run(run).splits,
        log: lambda: list(read_trace_log(log)),
    }
    for name in _passages(folder):
        path = folder / name
        readers[path] = {
            "passages.tsv": lambda path=path: list(read_passages(path, header=True)),
            "passages.jsonl": lambda path=path: list(read_passages(path)),
            "questions.jsonl": lambda path=path: read_questions(path),
            "settings.toml": lambda path=path: IrisTask().settings.changed(read_config(path).settings),
        }[name]
    for path, read in readers.items():
        name = "a log of traces" if path == log else path.name
        found[name] = (_damaged(path.read_bytes()), partial(_file, path, read), 1)
    return found


def _opened(run: Path) -> None:
    RunStore(run, CONFIG).close()


def fuzz(folder: Path, inputs: int, seed: int) -> Tally:
    """Tries many inputs.

    Args:
        folder: Empty folder for files.
        inputs: Number of inputs in all.
        seed: Seed of the inputs.
    """
    tally, all_targets = Tally(), targets(folder)
    shares = sum(share for _, _, share in all_targets.values())
    for name, (strategy, read, share) in all_targets.items():
        _try(name, strategy, read, -(-inputs * share // shares), seed, tally)
    return tally


def _try(
    name: str, strategy: st.SearchStrategy[Any], read: Callable[[Any], object], count: int, seed: int, tally: Tally
) -> None:
    @seeded(seed)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def tries(value: Any) -> None:
        tally.tried += 1
        try:
            read(value)
        except LmpipeError:
            tally.refused += 1
        else:
            tally.harmless += 1

    try:
        tries()
    except Exception as error:  # noqa: BLE001 (any other exception is a finding)
        tally.wrong.append(f"{name}: {type(error).__name__}: {error}"[:2000])

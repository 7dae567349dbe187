"""The GSM8K task: its data, its metric, and the check of sums."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tasks.arithmetic import equations
from benchmarks.tasks.gsm8k import Gsm8kTask
from lmpipe import Job, Request, ScriptedLM, Session, initial_state, rollout
from lmpipe.errors import ConfigError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for part, first in (("train", 0), ("test", 7)):  # problem 7 is in both parts
        records = [
            {"question": f"What is 1000 plus {n}?", "answer": f"1000+{n}=<<1000+{n}={1000 + n}>>\n#### 1,{n:03}"}
            for n in range(first, first + 8)
        ]
        path = tmp_path / "gsm8k" / f"{part}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in records).encode()))
    return tmp_path


def answer(request: Request) -> str:
    """Adds correctly below 10, incorrectly from 10 on, and answers 14 without a sum."""
    n = int(request.messages[-1].content.rpartition("plus ")[2].rstrip("?"))
    if n == 14:
        return "reasoning: I know it.\nanswer: it is $1014.00"
    return f"reasoning: 1000 + {n} = {1000 + n + (n > 9)}\nanswer: 1,{n + (n > 9):03} in all"


def test_answers_are_scored_by_their_last_number_and_sums_are_checked(data: Path) -> None:
    task = Gsm8kTask(data=str(data))
    split = task.split(5, 1, 8, seed=0)
    ids = [example.id for part in (split.train, split.val, split.test) for example in part]
    assert len(set(ids)) == 14
    program, session = task.program(), Session(lm=ScriptedLM(answer))
    state = initial_state(program, session)
    traces = rollout(program, [Job(state, example) for example in split.test], session, task.metric())
    values = {
        int(trace.example.labels["answer"].replace(",", "")) - 1000: (
            trace.score,
            *(measure(trace) for measure in task.measures.values()),
        )
        for trace in traces
    }
    assert list(task.measures) == ["right sums", "with sums"]
    assert values == {n: (1, 1, 1) if n < 10 else (0, 0, 1) for n in range(7, 14)} | {14: (1, None, 0)}


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gsm8k/train\.jsonl\.gz cannot be read"):
        Gsm8kTask(data=str(tmp_path)).examples()


def test_data_with_a_byte_order_mark_are_read_and_a_malformed_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    record = '{"question": "1 + 1?", "answer": "#### 2"}'
    for part in ("train", "test"):
        (tmp_path / "gsm8k" / f"{part}.jsonl.gz").write_bytes(gzip.compress(f"\ufeff{record}\r\n".encode()))
    assert [example.labels for example in Gsm8kTask(data=str(tmp_path)).examples().test] == [{"answer": "2"}]
    for line in ('{"question": "1 + 1?"}', '{"question": 1, "answer": "2"}', "{", "\0", "[]"):
        (tmp_path / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(f"{record}\n{line}\n".encode()))
        with pytest.raises(ConfigError, match=r"test\.jsonl\.gz, line 2: "):
            Gsm8kTask(data=str(tmp_path)).examples()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("48/2 = <<48/2=24>>24 clips", [True]),
        ("3 x $4 = $13, and (2 + 3) * 4 = 20.", [False, True]),
        ("10 / 3 = 3.33, nearly 10/3 = 3", [True, False]),
        ("20% × 1,000 = 200 and −3 + 5 = 2", [True, True]),
        ("x = 3, a1+2=3, 2 + = 4, 1/0 = 3", []),
    ],
)
def test_sums_in_texts(text: str, right: list[bool]) -> None:
    assert list(equations(text)) == right


def test_sums_without_end_are_left_out() -> None:
    """An LM that repeats itself writes such sums."""
    endless = ["1" + 1100 * "+1" + "=1101", f"1/3=0.{5000 * '3'}", 5000 * "1" + "+1=2"]
    assert list(equations(". ".join([*endless, "2+2=4"]))) == [True]


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.sampled_from("+-*"), st.integers(-3, 3))
def test_a_sum_is_right_if_its_value_is(left: int, right: int, sign: str, error: int) -> None:
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    assert list(equations(f"so {left:,} {sign} ${right} = {value + error:,} ")) == [not error]


@given(st.text("0123456789+-*/=x ().,$", max_size=400))
def test_any_text_can_be_checked(text: str) -> None:
    assert set(equations(text)) <= {True, False}

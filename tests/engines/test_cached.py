"""The completion cache: no request is answered twice, no answers are confused, and damage is reported."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe import LM, Completion, EngineError, Request, Sampling, ScriptedLM, WeightState
from lmpipe.engines import load_lm
from lmpipe.engines.cached import CachedLM
from lmpipe.errors import ConfigError, CorruptBlob, StoreError
from lmpipe.lm import Message, Usage
from lmpipe.storage.hashing import digest_bytes
from tests.disk import full_disk


def request(text: str = "hi", seed: int = 0) -> Request:
    return Request((Message("user", text),), Sampling(), WeightState(base="scripted"), seed)


def echo(request: Request) -> str:
    return f"{request.messages[-1].content} {request.seed}"


@contextmanager
def cached(path: Path, lm: LM) -> Iterator[CachedLM]:
    cached_lm = CachedLM(lm, path)
    try:
        yield cached_lm
    finally:
        cached_lm.close()


def test_a_request_is_answered_once_whoever_makes_it(tmp_path: Path) -> None:
    first, second = ScriptedLM(echo), ScriptedLM(echo)
    with cached(tmp_path / "new" / "cache.db", first) as lm:
        answers = lm.complete([request("a"), request("b"), request("a")])
        again = lm.complete([request("b"), request("a"), request("c")])
        assert [answer.text for answer in again[:2]] == [answers[1].text, answers[0].text]
        assert lm.complete([request("b")])[0].usage == replace(answers[1].usage, cached=1)
    assert [each.messages[-1].content for each in first.requests] == ["a", "b", "c"]
    with cached(tmp_path / "new" / "cache.db", second) as lm:
        assert [answer.text for answer in lm.complete([request("a"), request("b"), request("a")])] == [
            answer.text for answer in answers
        ]
    assert not second.requests


def test_the_key_of_a_request_never_changes(tmp_path: Path) -> None:
    """Files that older versions wrote still match."""
    asked = Request((Message("user", "hello"),), Sampling(max_tokens=3), WeightState(base="m"), 1, "a|b")
    with cached(tmp_path / "cache.db", ScriptedLM(echo, name="m")) as lm:
        lm.complete([asked])
    with sqlite3.connect(tmp_path / "cache.db") as file:
        assert file.execute("SELECT key FROM answers").fetchall() == [("745d0496fabc865bf1b9880b9a26da02",)]


def test_whole_completions_are_cached(tmp_path: Path) -> None:
    whole = Completion("Π\n\x00", "length", Usage(1, 20, 3), (-0.1, float("-inf"), -1e-9))
    for times in range(2):
        with cached(tmp_path / "cache.db", Constant(whole)) as lm:
            assert lm.complete([request()]) == [replace(whole, usage=replace(whole.usage, cached=times))]
            assert (lm.name, lm.batched) == ("constant", True)


class Constant(LM):
    """Returns the same answer to every request."""

    def __init__(self, answer: Completion) -> None:
        self.answer = answer

    @property
    def name(self) -> str:
        return "constant"

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return [self.answer for _ in requests]

    def register_adapter(self, adapter: str, folder: Path) -> None:
        return


def test_errors_are_not_cached(tmp_path: Path) -> None:
    def fails(request: Request) -> str:
        raise EngineError("too long")

    with cached(tmp_path / "cache.db", ScriptedLM(fails)) as lm:
        assert "too long" in str(lm.complete([request()])[0])
    with cached(tmp_path / "cache.db", ScriptedLM(echo)) as lm:
        assert isinstance(lm.complete([request()])[0], Completion)


def test_equal_requests_of_many_threads_are_answered_once(tmp_path: Path) -> None:
    barrier, inner = threading.Barrier(8), ScriptedLM(echo)
    with cached(tmp_path / "cache.db", inner) as lm:

        def ask() -> None:
            barrier.wait()
            lm.complete([request(str(n)) for n in range(20)])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(inner.requests) == 20


def _fill(path: Path, first: int) -> None:
    with cached(path, ScriptedLM(echo)) as lm:
        for number in range(first, first + 30):
            lm.complete([request(str(number))])


def test_processes_share_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(path, first)) for first in (0, 15)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    inner = ScriptedLM(echo)
    with cached(path, inner) as lm:
        assert lm.complete([request("44")]) == [Completion("44 0", usage=Usage(1, 1, 2, cached=1))]
    assert not inner.requests


def damage_bytes(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def damage_answer(path: Path) -> None:
    with sqlite3.connect(path) as file:
        file.execute("UPDATE answers SET answer = replace(answer, 'hi', 'ho')")
    file.close()


@pytest.mark.parametrize("damage", [damage_bytes, damage_answer])
def test_a_damaged_cache_is_reported(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "cache.db"
    with cached(path, ScriptedLM(echo)) as lm:
        lm.complete([request()])
    damage(path)
    with pytest.raises(CorruptBlob, match=r"cache\.db is damaged or not a completion cache .*; delete it"):
        read(path)


def read(path: Path) -> None:
    with cached(path, ScriptedLM(echo)) as lm:
        lm.complete([request()])


GOOD = '{"text": "hi", "finish_reason": "stop", "usage": {"calls": 1}, "logprobs": null}'


def write_answer(path: Path, answer: str | bytes | None, checksum: str | None = None) -> None:
    """Replaces the only answer of a cache, and its checksum."""
    data = answer.encode() if isinstance(answer, str) else answer or b""
    with sqlite3.connect(path) as file:
        file.execute("UPDATE answers SET answer = ?, sum = ?", (answer, checksum or digest_bytes(data)))
    file.close()


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "hi",
        "null",
        "[]",
        "[" * 100_000,
        GOOD[:-1],
        "{}",
        GOOD.replace('"hi"', "7"),
        GOOD.replace('"stop"', '"end"'),
        GOOD.replace('"stop"', "[]"),
        GOOD.replace('"text": "hi", ', ""),
        GOOD.replace("1", '"one"'),
        GOOD.replace("1", "-1"),
        GOOD.replace("1", "NaN"),
        GOOD.replace("1", "true"),
        GOOD.replace("calls", "cost"),
        GOOD.replace('{"calls": 1}', "[1]"),
        GOOD.replace("null", "7"),
        GOOD.replace("null", '["-0.5"]'),
        GOOD.replace("null", 'null, "thoughts": 7'),
        b"\xff\xfe",
        b"\x00" * 9,
    ],
)
def test_an_answer_of_another_version_is_reported(tmp_path: Path, answer: str | bytes) -> None:
    path = tmp_path / "cache.db"
    read(path)
    write_answer(path, answer)
    with pytest.raises(CorruptBlob, match=r"cache\.db is damaged or not a completion cache .*; delete it"):
        read(path)


def test_a_wrong_checksum_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    read(path)
    write_answer(path, GOOD, "none")
    with pytest.raises(CorruptBlob, match="does not match its checksum"):
        read(path)


def test_usage_that_an_older_version_did_not_count_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    read(path)
    write_answer(path, GOOD)
    with cached(path, ScriptedLM(echo)) as lm:
        assert lm.complete([request()]) == [Completion("hi", usage=Usage(1, cached=1))]


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None), max_size=5))
def test_any_text_is_cached_unchanged(tmp_path_factory: pytest.TempPathFactory, text: str, prompt: str) -> None:
    path = tmp_path_factory.mktemp("cache") / "cache.db"
    for times in range(2):
        with cached(path, Constant(Completion(text))) as lm:
            assert lm.complete([request(prompt)]) == [Completion(text, usage=Usage(1, cached=times))]


def test_an_lm_that_gives_too_few_answers_is_reported(tmp_path: Path) -> None:
    class Forgetful(LM):
        name = "forgetful"

        def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
            return []

        def register_adapter(self, adapter: str, folder: Path) -> None:
            return

    error = pytest.raises(EngineError, match=r"'forgetful' .Forgetful. returned 0 answers for 1 requests")
    with cached(tmp_path / "cache.db", Forgetful()) as lm, error:
        lm.complete([request()])


def test_a_full_disk_is_an_error_that_names_the_cache(tmp_path: Path) -> None:
    long = Constant(Completion("long " * 100_000))
    error = pytest.raises(StoreError, match=r"cache\.db cannot be used")
    with cached(tmp_path / "cache.db", long) as lm, full_disk(100_000), error:
        lm.complete([request()])
    with cached(tmp_path / "cache.db", long) as lm:
        assert lm.complete([request()]) == [long.answer]


def test_a_closed_cache_is_reported(tmp_path: Path) -> None:
    with cached(tmp_path / "cache.db", ScriptedLM(echo)) as lm:
        lm.close()
        with pytest.raises(StoreError, match="closed"):
            lm.complete([request()])


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/cache\.db cannot be used"):
        CachedLM(ScriptedLM(echo), tmp_path / "file" / "cache.db")


def test_a_cache_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path} cannot be used: unable to open"):
        CachedLM(ScriptedLM(echo), tmp_path)


WEIGHTS = st.builds(WeightState, base=st.sampled_from(["a", "b"]), adapter=st.none() | st.sampled_from(["c", "d"]))
SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5]),
    top_p=st.sampled_from([1.0, 0.5]),
    max_tokens=st.integers(1, 2),
    stop=st.sampled_from([(), ("a",), ("a", "b"), ("ab",)]),
    top_k=st.none() | st.integers(1, 2),
    logprobs=st.booleans(),
)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant"]), st.text(alphabet="ab\n", max_size=2)), max_size=3
).map(tuple)
REQUESTS = st.builds(
    Request, MESSAGES, SAMPLING, WEIGHTS, seed=st.integers(0, 2), regex=st.none() | st.sampled_from(["", "a"])
)


@settings(deadline=None)
@given(st.lists(REQUESTS, max_size=8))
def test_requests_share_an_answer_exactly_if_they_are_equal(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Request]
) -> None:
    inner = ScriptedLM(repr)
    with cached(tmp_path_factory.mktemp("cache") / "cache.db", inner) as lm:
        for each in [*requests, *(replace(each) for each in requests)]:
            answer = lm.complete([each])[0]
            assert isinstance(answer, Completion)
            assert answer.text == repr(each)
    assert inner.requests == list(dict.fromkeys(requests))


def test_the_name_of_the_lm_is_part_of_the_key(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with cached(tmp_path / "cache.db", ScriptedLM(lambda _, name=name: name, name)) as lm:  # type: ignore[misc]
            answer = lm.complete([request()])[0]
            assert isinstance(answer, Completion)
            assert answer.text == name


def test_adapters_are_passed_on_and_any_lm_can_be_loaded_with_a_cache(tmp_path: Path) -> None:
    inner = ScriptedLM(echo)
    with cached(tmp_path / "cache.db", inner) as lm:
        lm.register_adapter("d", tmp_path)
    assert inner.adapters == {"d": tmp_path}
    with pytest.raises(ConfigError, match="unknown LM 'gpt'"):
        load_lm("gpt", cache=tmp_path / "cache.db")

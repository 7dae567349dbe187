"""Time limits of requests: the timeout of a whole request, whatever the server does, and the time left in a budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmpipe import Completion, EngineError, Request
from lmpipe.engines import inflight
from lmpipe.engines.cached import CachedLM
from lmpipe.engines.inflight import InFlight
from lmpipe.engines.server import ServerLM
from lmpipe.errors import BudgetSpent, ConfigError
from lmpipe.runtime.deadline import check_deadline, set_deadline
from tests.engines.faulty_answers import RawRequest, RawResponse, always, answering, completion, http, once
from tests.engines.openai_server import NOWHERE, FakeServer, client, request, texts
from tests.engines.test_server_adapters import adapter_folder
from tests.storage.test_store_damage import interrupted

DRIBBLE = RawResponse((b"HTTP/1.1 200 OK\r\n\r\n", *[b" "] * 100_000), pause=0.05)
SILENCE = RawResponse((), end="stay")


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


def test_a_server_that_dribbles_ends_with_the_timeout() -> None:
    with (
        answering(always(DRIBBLE)) as raw,
        client(raw.url, dialect="vllm", timeout=0.5, retries=0) as lm,
        ends_within(5),
        pytest.raises(EngineError, match=r"no response within 0.5 s in 1 attempt,"),
    ):
        lm.complete([request()])


@pytest.mark.parametrize("answer", [DRIBBLE, SILENCE, http({}, "429 Slow Down", Retry_After="1e9")])
@pytest.mark.parametrize("dialect", ["vllm", None])
def test_a_call_ends_when_the_time_of_the_budget_is_over(answer: RawResponse, dialect: str | None) -> None:
    with answering(always(answer)) as raw, client(raw.url, dialect=dialect) as lm:
        for requests in ([request()], [request(str(n)) for n in range(8)]):
            with ends_within(5), set_deadline(0.3), pytest.raises(BudgetSpent, match="max_seconds is spent"):
                lm.complete(requests)
        if answer in (DRIBBLE, SILENCE):  # the budget ended, which is not a failure of the server: there is no backoff
            raw.begin(
                lambda received: http({"data": [{"owned_by": "vllm"}]} if "models" in received.path else completion())
            )
            with ends_within(5), set_deadline(4):
                assert texts(lm.complete([request()])) == ["fine"]


def test_a_call_that_waits_for_a_free_slot_ends_in_time() -> None:
    with answering(always(SILENCE)) as raw, client(raw.url, dialect="vllm", max_concurrency=1, retries=0) as lm:
        first = in_thread(lambda: lm.complete([request("first")]))
        wait_until(lambda: bool(raw.requests))
        with ends_within(5), set_deadline(0.3), pytest.raises(BudgetSpent):
            lm.complete([request("second")])
        assert len(raw.requests) == 1
        lm.close()
        first.join()


def test_a_call_that_waits_for_the_end_of_a_backoff_ends_in_time() -> None:
    with (
        client(NOWHERE, dialect="vllm", backoff=60.0) as lm,
        ends_within(5),
        set_deadline(0.5),
        pytest.raises(BudgetSpent),
    ):
        lm.complete([request()])


def test_a_long_wait_for_a_dead_server_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with client(NOWHERE, dialect="vllm", backoff=60.0, retries=3) as lm:
        for _ in range(2):
            with set_deadline(0.2), pytest.raises(BudgetSpent):
                lm.complete([request()])
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert NOWHERE.partition("//")[2].partition("/")[0] in record.message
    assert record.message.endswith("trying again in 60 s, and for about 180 s before the call counts as failed")


def test_a_short_wait_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    with client(NOWHERE, dialect="vllm", backoff=0.001, retries=2) as lm, pytest.raises(EngineError):
        lm.complete([request()])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_calls_that_wait_for_an_adapter_end_in_time(tmp_path: Path) -> None:
    def answer(received: RawRequest) -> RawResponse:
        return SILENCE if received.path.endswith("adapter") else http(completion())

    with answering(answer) as raw, client(raw.url, dialect="vllm") as lm:
        lm.register_adapter("d1", adapter_folder(tmp_path, "d1"))
        first = in_thread(lambda: lm.complete([request(adapter="d1")]))
        wait_until(lambda: bool(raw.requests))
        with ends_within(5), set_deadline(0.3), pytest.raises(BudgetSpent):
            lm.complete([request(f"{n}", adapter="d1") for n in range(3)])
        assert texts(lm.complete([request()])) == ["fine"]
        lm.close()
        first.join()


def test_a_fast_server_responds_within_a_time_limit(server: FakeServer, lm: ServerLM) -> None:
    with set_deadline(60):
        assert texts(lm.complete([request(str(n)) for n in range(5)])) == [f"m: {n}" for n in range(5)]
    with set_deadline(0), pytest.raises(BudgetSpent):
        lm.complete([request()])
    assert len(server.bodies) == 5


@pytest.mark.parametrize("cached", [False, True])
def test_a_call_that_waits_for_an_equal_one_does_not_share_its_limit(cached: bool, tmp_path: Path) -> None:
    """The time limit of the first call ends; the second call, which waited for it, sends its own request."""
    with answering(once(SILENCE)) as raw, client(raw.url, dialect="vllm") as inner:
        lm = CachedLM(inner, tmp_path / "cache.db") if cached else inner
        raised: list[Exception] = []
        first = in_thread(lambda: under_limit(1.0, lambda: lm.complete([request()]), raised))
        wait_until(lambda: bool(raw.requests))
        with ends_within(10):
            assert texts(lm.complete([request()])) == ["fine"]
        first.join()
    assert [type(error) for error in raised] == [BudgetSpent]


def test_a_call_that_waits_for_an_equal_one_keeps_its_own_limit() -> None:
    with answering(always(SILENCE)) as raw, client(raw.url, dialect="vllm", retries=0) as lm:
        first = in_thread(lambda: lm.complete([request()]))
        wait_until(lambda: bool(raw.requests))
        with ends_within(5), set_deadline(0.3), pytest.raises(BudgetSpent):
            lm.complete([request()])
        lm.close()
        first.join()


def test_requests_are_answered_after_an_interrupt_anywhere_in_an_earlier_call() -> None:
    def answer(requests: Sequence[Request]) -> list[Completion | EngineError]:
        return [Completion(str(asked.seed)) for asked in requests]

    requests = [request(seed=seed) for seed in range(2)]
    for before in range(1, 200):
        in_flight = InFlight()
        try:
            with interrupted(before, {inflight.__file__}):
                in_flight.answer(requests, answer)
        except KeyboardInterrupt:
            with set_deadline(5):
                assert in_flight.answer(requests, answer) == answer(requests)
        else:
            break
    assert 20 < before < 199


@pytest.mark.parametrize(
    ("error", "shared"), [(EngineError("down"), True), (BudgetSpent("over"), False), (KeyboardInterrupt(), False)]
)
def test_only_errors_that_concern_all_calls_are_shared_with_waiting_ones(error: BaseException, shared: bool) -> None:
    in_flight, started, waiting = InFlight(), threading.Event(), []

    def fail(requests: object) -> list[Completion | EngineError]:
        started.set()
        wait_until(lambda: bool(waiting))
        time.sleep(0.1)  # until the other call waits
        raise error

    def succeed(requests: object) -> list[Completion | EngineError]:
        return [Completion("asked again")]

    def ask() -> None:
        with pytest.raises(type(error)):
            in_flight.answer([request()], fail)

    first = in_thread(ask)
    started.wait()
    waiting.append(True)
    if shared:
        with pytest.raises(EngineError, match="down"):
            in_flight.answer([request()], succeed)
    else:
        assert in_flight.answer([request()], succeed) == [Completion("asked again")]
    first.join()


@pytest.mark.parametrize("retry_after", ["nan", "inf", "-inf", "-1", "1e999", "soon", "Thu, 99 Foo 2000", "0"])
def test_invalid_retry_times_are_ignored(retry_after: str) -> None:
    busy = http({}, "503 Busy", Retry_After=retry_after)
    with answering(once(busy)) as raw, client(raw.url, dialect="vllm", backoff=0.01) as lm, ends_within(5):
        assert texts(lm.complete([request()])) == ["fine"]


def test_a_retry_date_is_respected() -> None:
    busy = http({}, "503 Busy", Retry_After="Fri, 31 Dec 9999 23:59:59 GMT")
    with answering(once(busy)) as raw, client(raw.url, dialect="vllm", backoff=0.01) as lm:
        with set_deadline(0.5), pytest.raises(BudgetSpent):
            lm.complete([request()])
        assert len(raw.requests) == 1


def test_a_client_that_was_closed_says_so(server: FakeServer) -> None:
    with client(server.url, dialect="vllm") as lm:
        lm.close()
        with pytest.raises(EngineError, match="is closed; create a new one"):
            lm.complete([request()])


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": 0},
        {"timeout": True},
        {"timeout": "1"},
        {"backoff": -1},
        {"backoff": float("nan")},
        {"retries": -1},
        {"retries": 1.5},
        {"max_concurrency": 0},
        {"max_concurrency": 2.5},
        {"max_adapters": 0},
        {"max_adapters": 1.5},
        {"dialect": "gpt"},
    ],
)
def test_invalid_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServerLM("m", [NOWHERE], **settings)  # type: ignore[arg-type]


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """Runs a function in another thread; an `EngineError` that it raises is ignored."""

    def run() -> None:
        try:
            work()
        except EngineError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def under_limit(seconds: float, work: Callable[[], object], raised: list[Exception]) -> None:
    with set_deadline(seconds):
        try:
            work()
            check_deadline()
        except BudgetSpent as error:
            raised.append(error)


def wait_until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.001)

"""The base URLs of one service: which one is asked next, how often, and what happens when one fails.

A call goes to the least busy URL. One that fails rests for a while, twice as long each time, and the others go on;
when all rest, calls wait; when all have failed too often, all calls give up. Nothing waits longer than the call under
way may take (`lmpipe.runtime.deadline`). Knows nothing of what is asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from threading import Condition
from time import monotonic
from typing import TypeVar, final

from lmpipe.errors import ConfigError, EngineError
from lmpipe.runtime.deadline import check_deadline, seconds_left
from lmpipe.validation.arguments import finite_number, whole_number
from lmpipe.web.address import Address
from lmpipe.web.http import Answer, BadAnswer, Fault, HttpClient, Refused, TimedOut, Unreachable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_REST = 60.0  # seconds
_MOST_DOUBLINGS = 30
_PASSING = frozenset({408, 409, 425, 429})  # and all from 500 on
_MOST_UNANSWERED = 10  # calls that may get unusable answers only, one after another, before none is made any more


@final
class GaveUp(EngineError):
    """A call failed as often as it may.

    Attributes:
        fault: The last one.
        alone: Whether the fault is this call's own, as far as can be seen, and other calls may go on.
    """

    def __init__(self, message: str, fault: Fault, alone: bool) -> None:
        super().__init__(message)
        self.fault = fault
        self.alone = alone


@final
class Endpoint:
    """One base URL.

    Attributes:
        url: The base URL, without credentials.
        busy: Calls it is answering.
        failures: How often it has failed since its last success.
    """

    def __init__(self, address: Address, client: HttpClient, timeout: float) -> None:
        self.url = address.url
        self.busy = 0
        self.failures = 0
        self._address, self._client, self._timeout = address, client, timeout
        self._rests_until = 0.0

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    @property
    def rest(self) -> float:
        """Seconds that it still rests."""
        return max(0.0, self._rests_until - monotonic())

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        params: Mapping[str, str] | None = None,
        *,
        below: str | None = None,
    ) -> Answer:
        """Sends one request, and returns an answer with a status from 200 to 299.

        Args:
            method: Of HTTP.
            path: Below the base URL, or below its root: see `below`.
            body: Sent as JSON.
            params: Sent in the URL.
            below: The end of the base URL that is left out, such as ``/v1``.

        Raises:
            Fault: If there is no such answer.
            BudgetSpent: If the time of the call under way is over.
        """
        check_deadline()
        left = seconds_left()
        path = self._address.path.removesuffix(below or "") + path
        seconds = self._timeout if left is None else min(self._timeout, left)
        try:
            answer = self._client.send(self._address, method, path, seconds=seconds, body=body, params=params)
        except TimedOut:
            check_deadline()  # then it was not the server that took too long
            raise
        logger.debug("%s %s at %s: HTTP %d, %d bytes", method, path, self.url, answer.status, len(answer.body))
        if answer.status >= 400:
            raise Refused(self.url, answer.status, answer.said, answer.headers.get("retry-after", ""))
        if answer.status >= 300:
            raise BadAnswer(f"it sends the call elsewhere, with HTTP {answer.status}; write the URL that it names")
        return answer

    def failed(self, fault: Fault, backoff: float) -> None:
        """Rests: as long as the server says, or twice as long as after its last failure.

        Calls that fail together count as one failure.
        """
        if not self.rest:
            pause = backoff * 2.0 ** min(self.failures, _MOST_DOUBLINGS)
            asked = _seconds(fault.retry_after) if isinstance(fault, Refused) else None
            self.failures += 1
            self._rests_until = monotonic() + min(pause if asked is None else max(asked, backoff), _LONGEST_REST)


@final
class Endpoints:
    """All base URLs of one service.

    Args:
        urls: Base URLs of the servers, with or without credentials.
        key: Sent to those without credentials, as a Bearer token.
        max_concurrency: Most calls in flight at each.
        timeout: Seconds that a request may take in all.
        retries: How often a failed call is made again, and a failed URL tried again.
        backoff: Seconds that a URL rests after its first failure.
        advice: What to look at if no server can be reached or answers as it should.

    Raises:
        ConfigError: If a value cannot be used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str = "",
        max_concurrency: int,
        timeout: float,
        retries: int,
        backoff: float,
        advice: str,
    ) -> None:
        if isinstance(urls, str) or not urls or not all(isinstance(url, str) for url in urls):
            raise ConfigError("base URLs must be one or more of the form http://host:8000/v1, in a list")
        self._limit = whole_number("max_concurrency", max_concurrency)
        self._retries = whole_number("retries", retries, 0)
        self._timeout, self._backoff = finite_number("timeout", timeout), finite_number("backoff", backoff)
        if not timeout:
            raise ConfigError("timeout=0 leaves no time for an answer; it counts seconds")
        addresses = [Address(url, key) for url in urls]
        self._client = HttpClient()
        self._endpoints = [Endpoint(address, self._client, self._timeout) for address in addresses]
        self._advice = advice
        self._changed = Condition()
        self._answered = 0  # calls
        self._unanswered = 0  # calls since then that gave up with an answer that cannot be used

    @property
    def capacity(self) -> int:
        """Most calls in flight at all URLs together."""
        return self._limit * len(self._endpoints)

    @property
    def all(self) -> Sequence[Endpoint]:
        """Each of them."""
        return self._endpoints

    def close(self) -> None:
        """Ends calls that are under way, and refuses new ones."""
        self._client.close()

    def call(self, work: Callable[[Endpoint], T]) -> T:
        """Makes a call at the least busy URL, and again elsewhere or later while the failure may pass.

        Raises:
            GaveUp: If it still failed after all retries; the message names the URL and what to do.
            Refused: If a server refused it for good.
            BudgetSpent: If the time of the call under way is over.
        """
        failures, answered = 0, self._answered
        while True:
            with self._claimed() as endpoint:
                try:
                    answer = work(endpoint)
                except (Unreachable, TimedOut, BadAnswer, Refused) as error:
                    if isinstance(error, Refused) and error.status not in _PASSING and error.status < 500:
                        raise
                    fault: Fault = error
                else:
                    with self._changed:
                        endpoint.failures = self._unanswered = 0
                        self._answered += 1
                    return answer
            failures += 1
            with self._changed:
                endpoint.failed(fault, self._backoff)
                if failures > self._retries or self._hopeless:
                    break
            logger.info("%s: %s; the call is made again", endpoint.url, fault)
        raise self._gave_up(endpoint, fault, self._answered > answered)

    def again(self, error: GaveUp) -> GaveUp:
        """The error for a call that was not made because another has just ended with this one."""
        return GaveUp(str(error), error.fault, error.alone and self._may_go_on())

    @contextmanager
    def _claimed(self) -> Iterator[Endpoint]:
        with self._changed:
            while (endpoint := self._free()) is None:
                check_deadline()
                waits = [endpoint.rest for endpoint in self._endpoints if endpoint.rest]
                left = seconds_left()
                self._changed.wait(min(waits if left is None else [*waits, left], default=None))
            endpoint.busy += 1
        try:
            yield endpoint
        finally:
            with self._changed:
                endpoint.busy -= 1
                self._changed.notify_all()

    def _free(self) -> Endpoint | None:
        ready = [endpoint for endpoint in self._endpoints if self._hopeless or not endpoint.rest]
        free = [endpoint for endpoint in ready if endpoint.busy < self._limit]
        return min(free, key=lambda endpoint: endpoint.busy, default=None)

    @property
    def _hopeless(self) -> bool:
        """Whether every URL has failed too often; calls then wait no longer, and end with their first failure."""
        return all(endpoint.failures > self._retries for endpoint in self._endpoints)

    def _gave_up(self, endpoint: Endpoint, fault: Fault, others_answered: bool) -> GaveUp:
        """The error of a call, and whether it ends that call alone.

        It does if other calls were answered in the meantime, or if there was an answer that cannot be used: a server
        that is there may stumble over one request. If ten calls in a row get no other answers, it is the server.
        """
        alone = others_answered or (isinstance(fault, BadAnswer) and self._may_go_on())
        if alone:
            with self._changed:
                for one in self._endpoints:
                    one.failures = 0
        return GaveUp(self._words(endpoint, fault), fault, alone)

    def _may_go_on(self) -> bool:
        with self._changed:
            self._unanswered += 1
            return self._unanswered < _MOST_UNANSWERED

    def _words(self, endpoint: Endpoint, fault: Fault) -> str:
        tries = f"{self._retries + 1} tries in a row, the last of them at {endpoint.url}"
        if isinstance(fault, TimedOut):
            return f"no answer within {self._timeout:g} s in {tries}; raise timeout, or make fewer calls at once"
        if isinstance(fault, Unreachable):
            return f"no connection in {tries} ({fault}); {self._advice}"
        if isinstance(fault, BadAnswer):
            return f"no answer that can be used in {tries}: {fault}; {self._advice}"
        return f"{tries}, failed with {fault}; look into the server's log, or make fewer calls at once"


def _seconds(retry_after: str) -> float | None:
    """Seconds that a server asks to wait, as a number or until a date; none if it says neither or nothing sensible."""
    try:
        asked = float(retry_after)
    except ValueError:
        try:
            until = parsedate_to_datetime(retry_after)
            asked = (until.replace(tzinfo=until.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return asked if asked > 0 and math.isfinite(asked) else None

"""The base URLs of one service: load balancing, retries with exponential backoff, and giving up.

A call goes to the URL with the fewest calls in flight. A URL that fails is not used for a while, twice as long each
time, and the others take its calls. When all URLs are backing off, calls wait; when all have failed too often, all
calls fail. Nothing waits longer than the time limit of the current call (`lmpipe.runtime.deadline`). Knows nothing
about the content of requests.
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
from lmpipe.validation.arguments import check_finite_number, check_whole_number
from lmpipe.web.address import Address
from lmpipe.web.http import (
    ConnectError,
    HttpClient,
    HTTPStatusError,
    InvalidResponse,
    RequestError,
    RequestTimeout,
    Response,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_BACKOFF = 60.0  # seconds
_MAX_DOUBLINGS = 30
_RETRIABLE = frozenset({408, 409, 425, 429})  # and all status codes from 500 on
_LONG_WAIT = 3.0  # seconds; a longer one is worth a warning
_MAX_UNUSABLE = 10  # consecutive calls that receive only unusable responses before the service counts as broken


@final
class RetriesExhausted(EngineError):
    """A call that failed again on its last retry.

    Attributes:
        last_error: Error of the last attempt.
        request_specific: Whether the failure seems to concern only this call, so that others may succeed.
    """

    def __init__(self, message: str, last_error: RequestError, request_specific: bool) -> None:
        super().__init__(message)
        self.last_error = last_error
        self.request_specific = request_specific


@final
class Endpoint:
    """One base URL of a service.

    Attributes:
        url: The base URL, without credentials.
        in_flight: Number of calls in progress.
        failures: Number of failures since the last success.
    """

    def __init__(self, address: Address, client: HttpClient, timeout: float) -> None:
        self.url = address.url
        self.in_flight = 0
        self.failures = 0
        self._address, self._client, self._timeout = address, client, timeout
        self._unused_until = 0.0

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    @property
    def backoff_left(self) -> float:
        """Seconds until this URL may be used again."""
        return max(0.0, self._unused_until - monotonic())

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        params: Mapping[str, str] | None = None,
        *,
        strip_suffix: str = "",
    ) -> Response:
        """Sends one request and returns a response with a status code from 200 to 299.

        Args:
            method: HTTP method.
            path: Path relative to the base URL.
            body: JSON body; None sends no body.
            params: Query parameters.
            strip_suffix: Suffix of the base URL, such as ``/v1``, that is removed before `path` is appended.

        Raises:
            RequestError: If the request fails, or the status code of the response is not from 200 to 299.
            BudgetSpent: If the time limit of the current call is exceeded.
        """
        check_deadline()
        left = seconds_left()
        path = self._address.path.removesuffix(strip_suffix) + path
        timeout = self._timeout if left is None else min(self._timeout, left)
        try:
            response = self._client.send(self._address, method, path, timeout=timeout, body=body, params=params)
        except RequestTimeout:
            check_deadline()  # raises BudgetSpent if the time limit of the call was shorter than the timeout
            raise
        status = response.status_code
        logger.debug("%s %s at %s: HTTP %d, %d bytes", method, path, self.url, status, len(response.content))
        if status >= 400:
            retry_after = response.headers.get("retry-after", "")
            raise HTTPStatusError(self.url, status, response.error_message, retry_after)
        if status >= 300:
            raise InvalidResponse(f"the server redirects with HTTP {status}; use the URL that it redirects to")
        return response

    def back_off(self, error: RequestError, backoff: float) -> None:
        """Pauses the use of this URL for as long as the server asks, or twice as long as after the last failure.

        Calls that fail together count as one failure.
        """
        if not self.backoff_left:
            pause = backoff * 2.0 ** min(self.failures, _MAX_DOUBLINGS)
            requested = _retry_seconds(error.retry_after) if isinstance(error, HTTPStatusError) else None
            self.failures += 1
            self._unused_until = monotonic() + min(
                pause if requested is None else max(requested, backoff), _MAX_BACKOFF
            )


@final
class EndpointPool:
    """All base URLs of one service.

    Args:
        urls: Base URLs of the servers, with or without credentials.
        key: API key, sent as a Bearer token to URLs without credentials.
        max_concurrency: Maximum number of calls in flight at each URL.
        timeout: Seconds that a whole request may take.
        retries: Maximum number of retries of a failed call, and of a failed URL.
        backoff: Seconds during which a URL is not used after its first failure.
        advice: Advice for error messages: what to check if no server can be reached or responds properly.

    Attributes:
        endpoints: One endpoint for each URL.
        capacity: Maximum number of calls in flight at all URLs together.

    Raises:
        ConfigError: If a value is invalid.
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
            raise ConfigError("base_urls must be a list of at least one URL of the form http://host:8000/v1")
        self._limit = check_whole_number("max_concurrency", max_concurrency)
        self._retries = check_whole_number("retries", retries, 0)
        self._timeout, self._backoff = check_finite_number("timeout", timeout), check_finite_number("backoff", backoff)
        if not timeout:
            raise ConfigError("timeout=0 leaves no time for a response; choose a number of seconds above 0")
        addresses = [Address(url, key) for url in urls]
        self._client = HttpClient()
        self.endpoints: Sequence[Endpoint] = [Endpoint(address, self._client, self._timeout) for address in addresses]
        self.capacity = self._limit * len(self.endpoints)
        self._advice = advice
        self._changed = Condition()
        self._succeeded = 0  # calls
        self._warned = False  # of a long wait
        self._unusable = 0  # calls since the last success that failed with an unusable response

    def close(self) -> None:
        """Cancels calls in progress and rejects new ones."""
        self._client.close()

    def call(self, function: Callable[[Endpoint], T]) -> T:
        """Makes a call at the URL with the fewest calls in flight, and retries transient failures there or elsewhere.

        Args:
            function: Function that makes the call at an endpoint and returns its result.

        Raises:
            RetriesExhausted: If the call still failed after all retries; the message names the URL and what to do.
            HTTPStatusError: If the status code is one that retries cannot change.
            BudgetSpent: If the time limit of the current call is exceeded.
        """
        failures, succeeded_before = 0, self._succeeded
        while True:
            with self._acquire() as endpoint:
                try:
                    result = function(endpoint)
                except (ConnectError, RequestTimeout, InvalidResponse, HTTPStatusError) as error:
                    status = error.status_code if isinstance(error, HTTPStatusError) else 500
                    if status < 500 and status not in _RETRIABLE:
                        raise
                    failure: RequestError = error
                else:
                    with self._changed:
                        endpoint.failures = self._unusable = 0
                        self._succeeded += 1
                    return result
            failures += 1
            with self._changed:
                endpoint.back_off(failure, self._backoff)
                if failures > self._retries or self._all_failing:
                    break
            logger.info("%s: %s; retrying the call", endpoint.url, failure)
            self._warn_of_long_wait(endpoint, failure)
        raise self._retries_exhausted(endpoint, failure, self._succeeded > succeeded_before)

    def _warn_of_long_wait(self, endpoint: Endpoint, failure: RequestError) -> None:
        """Says once that calls wait for servers that have failed, so that nobody wonders why nothing happens."""
        with self._changed:
            wait = min(each.backoff_left for each in self.endpoints)
            if wait < _LONG_WAIT or self._warned:
                return
            self._warned = True
            pauses = (self._backoff * 2.0**n for n in range(endpoint.failures, self._retries))
            longest = wait + sum(min(pause, _MAX_BACKOFF) for pause in pauses)
        logger.warning(
            "%s: %s; trying again in %.0f s, and for about %.0f s before the call counts as failed",
            endpoint.url,
            failure,
            wait,
            longest,
        )

    def same_failure(self, error: RetriesExhausted) -> RetriesExhausted:
        """Returns the error of a call that was skipped because an equal concurrent call just failed with `error`."""
        return RetriesExhausted(str(error), error.last_error, error.request_specific and self._count_unusable())

    @contextmanager
    def _acquire(self) -> Iterator[Endpoint]:
        with self._changed:
            while (endpoint := self._least_busy()) is None:
                check_deadline()
                waits = [endpoint.backoff_left for endpoint in self.endpoints if endpoint.backoff_left]
                left = seconds_left()
                self._changed.wait(min(waits if left is None else [*waits, left], default=None))
            endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            with self._changed:
                endpoint.in_flight -= 1
                self._changed.notify_all()

    def _least_busy(self) -> Endpoint | None:
        ready = [endpoint for endpoint in self.endpoints if self._all_failing or not endpoint.backoff_left]
        free = [endpoint for endpoint in ready if endpoint.in_flight < self._limit]
        return min(free, key=lambda endpoint: endpoint.in_flight, default=None)

    @property
    def _all_failing(self) -> bool:
        """Whether every URL has failed too often; calls then stop waiting and end with their first failure."""
        return all(endpoint.failures > self._retries for endpoint in self.endpoints)

    def _retries_exhausted(self, endpoint: Endpoint, error: RequestError, others_succeeded: bool) -> RetriesExhausted:
        """Creates the error of a call and decides whether the failure is specific to the request.

        It is if other calls succeeded in the meantime, or if the response was unusable: a working server may fail on
        one request. If ten calls in a row receive only unusable responses, the server itself counts as broken.
        """
        specific = others_succeeded or (isinstance(error, InvalidResponse) and self._count_unusable())
        if specific:
            with self._changed:
                for other in self.endpoints:
                    other.failures = 0
        return RetriesExhausted(self._message(endpoint, error), error, specific)

    def _count_unusable(self) -> bool:
        """Counts a call with an unusable response; returns whether the count is still below the limit."""
        with self._changed:
            self._unusable += 1
            return self._unusable < _MAX_UNUSABLE

    def _message(self, endpoint: Endpoint, error: RequestError) -> str:
        count = self._retries + 1
        attempts = f"{count} attempt{'s' if count > 1 else ''}, the last one at {endpoint.url}"
        if isinstance(error, RequestTimeout):
            return (
                f"no response within {self._timeout:g} s in {attempts}; raise timeout, or send fewer requests at once"
            )
        if isinstance(error, ConnectError):
            return f"no connection in {attempts} ({error}); {self._advice}"
        if isinstance(error, InvalidResponse):
            return f"no usable response in {attempts}: {error}; {self._advice}"
        return f"{attempts}, failed with {error}; check the log of the server, or send fewer requests at once"


def _retry_seconds(retry_after: str) -> float | None:
    """Parses a Retry-After header, a number of seconds or a date; None if it is missing or invalid."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            until = parsedate_to_datetime(retry_after)
            seconds = (until.replace(tzinfo=until.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if seconds > 0 and math.isfinite(seconds) else None

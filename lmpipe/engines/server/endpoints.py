"""The base URLs of one model: which one is asked next, how often, and what happens when one fails.

A call goes to the least busy URL. One that fails rests for a while, twice as long each time, and the others go on;
when all rest, calls wait; when all have failed too often, all calls give up. Knows nothing of what is asked for.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Condition, Lock
from time import monotonic
from typing import Any, TypeVar, final

from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAI, Timeout

from lmpipe.engines.server.dialects import Dialect
from lmpipe.errors import ConfigError, EngineError

T = TypeVar("T")

_CONNECT = 10.0  # seconds; a server that is there accepts at once, however long it then works
_LONGEST_REST = 60.0  # seconds
_PASSING = frozenset({408, 409, 425, 429})  # and all from 500 on


@final
class Endpoint:
    """One base URL.

    Attributes:
        url: It, as it was given.
        root: It without ``/v1``.
        client: The OpenAI client that holds its connections.
        adapters: What is loaded there.
        busy: Calls it is answering.
        failures: How often it has failed since its last success.
    """

    def __init__(self, url: str, api_key: str, timeout: float, max_adapters: int) -> None:
        self.url = url
        self.root = url.rstrip("/").removesuffix("/v1")
        limits = Timeout(timeout, connect=min(timeout, _CONNECT))
        self.client = OpenAI(base_url=url, api_key=api_key, timeout=limits, max_retries=0)
        self.adapters = LoadedAdapters(self, max_adapters)
        self.busy = 0
        self.failures = 0
        self._rests_until = 0.0

    @property
    def rest(self) -> float:
        """Seconds that it still rests."""
        return max(0.0, self._rests_until - monotonic())

    def failed(self, error: APIConnectionError | APIStatusError, backoff: float) -> None:
        """Rests: as long as the server says, or twice as long as after its last failure.

        Calls that fail together count as one failure.
        """
        asked = _retry_after(error)
        if not self.rest:
            pause = backoff * 2**self.failures if asked is None else asked
            self.failures += 1
            self._rests_until = monotonic() + min(pause, _LONGEST_REST)


@final
class Endpoints:
    """All base URLs of one model.

    Args:
        urls: They.
        api_key: Sent to each.
        max_concurrency: Most calls in flight at each.
        timeout: Seconds until a call counts as failed.
        retries: How often a failed call is made again, and a failed URL tried again.
        backoff: Seconds that a URL rests after its first failure.
        max_adapters: Most adapters loaded on each.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str,
        max_concurrency: int,
        timeout: float,
        retries: int,
        backoff: float,
        max_adapters: int,
    ) -> None:
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ConfigError(f"base URLs {list(urls)} must be one or more of the form http://host:8000/v1")
        if min(max_concurrency, max_adapters) < 1 or timeout <= 0 or min(retries, backoff) < 0:
            raise ConfigError(
                f"max_concurrency={max_concurrency}, max_adapters={max_adapters}, timeout={timeout}, "
                f"retries={retries}, backoff={backoff}: the first three must be positive, the others not negative"
            )
        self._endpoints = [Endpoint(url, api_key, timeout, max_adapters) for url in urls]
        self._limit, self._retries, self._backoff = max_concurrency, retries, backoff
        self._timeout = timeout
        self._changed = Condition()

    @property
    def capacity(self) -> int:
        """Most calls in flight at all URLs together."""
        return self._limit * len(self._endpoints)

    def close(self) -> None:
        """Closes all connections."""
        for endpoint in self._endpoints:
            endpoint.client.close()

    def call(self, work: Callable[[Endpoint], T]) -> T:
        """Makes a call at the least busy URL, and again elsewhere or later while the failure may pass.

        Raises:
            EngineError: If it still failed after all retries; the message names the URL and what to do.
            APIStatusError: If a server refused it for good.
        """
        failures = 0
        while True:
            with self._claimed() as endpoint:
                try:
                    answer = work(endpoint)
                except (APIConnectionError, APIStatusError) as error:
                    if not _passing(error):
                        raise
                    failures += 1
                    with self._changed:
                        endpoint.failed(error, self._backoff)
                    if failures > self._retries or self._hopeless:
                        raise EngineError(self._gave_up(endpoint, error)) from error
                else:
                    endpoint.failures = 0
                    return answer

    @contextmanager
    def _claimed(self) -> Iterator[Endpoint]:
        with self._changed:
            while (endpoint := self._free()) is None:
                rests = [endpoint.rest for endpoint in self._endpoints if endpoint.rest]
                self._changed.wait(min(rests, default=None))
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

    def _gave_up(self, endpoint: Endpoint, error: APIConnectionError | APIStatusError) -> str:
        tries = f"{self._retries + 1} tries in a row, the last of them at {endpoint.url}"
        if isinstance(error, APITimeoutError):
            return f"no answer within {self._timeout:g} s in {tries}; raise timeout, or lower max_concurrency"
        if isinstance(error, APIConnectionError):
            cause = error.__cause__ or error
            return f"no connection in {tries} ({cause}); check that the server runs and that the URL ends in /v1"
        return f"{tries}, failed with {error}; look into the server's log, or lower max_concurrency"


@final
class LoadedAdapters:
    """The adapters loaded on one server; of those that nobody uses, the one used longest ago leaves first.

    Args:
        endpoint: Where.
        limit: Most at once, as far as they are not all in use.
    """

    def __init__(self, endpoint: Endpoint, limit: int) -> None:
        self._endpoint = endpoint
        self._limit = limit
        self._lock = Lock()
        self._users: OrderedDict[str, int] = OrderedDict()

    @contextmanager
    def using(self, name: str, folder: str, dialect: Dialect) -> Iterator[None]:
        """Keeps an adapter loaded while the block runs.

        Raises:
            EngineError: If the server will not load it; the message says how it must be started.
        """
        with self._lock:
            if name not in self._users:
                self._make_room(dialect)
                self.load(name, folder, dialect)
            self._users[name] = self._users.get(name, 0) + 1
            self._users.move_to_end(name)
        try:
            yield
        finally:
            with self._lock:
                self._users[name] -= 1

    def load(self, name: str, folder: str, dialect: Dialect) -> None:
        """Loads an adapter, or finds it loaded; its name is its content, so it is the same one."""
        try:
            self._post("load", dialect, {"lora_name": name, "lora_path": folder})
        except APIStatusError as error:
            if "already" in str(error):
                return
            raise EngineError(
                f"{self._endpoint.url} does not load the adapter at {folder}: {error}; the server must see that folder "
                f"(path_map), and be started as: {dialect.adapter_hint}"
            ) from error

    def _make_room(self, dialect: Dialect) -> None:
        idle = [name for name, users in self._users.items() if not users]
        for name in idle[: max(0, len(self._users) - self._limit + 1)]:
            del self._users[name]
            with contextlib.suppress(APIStatusError):  # the server was started again and has none loaded
                self._post("unload", dialect, {"lora_name": name})

    def _post(self, word: str, dialect: Dialect, body: dict[str, Any]) -> None:
        self._endpoint.client.post(self._endpoint.root + dialect.adapter_route.format(word), cast_to=str, body=body)


def _passing(error: APIConnectionError | APIStatusError) -> bool:
    return isinstance(error, APIConnectionError) or error.status_code in _PASSING or error.status_code >= 500


def _retry_after(error: APIConnectionError | APIStatusError) -> float | None:
    """Seconds that the server asks to wait, if it says so as a number."""
    if isinstance(error, APIConnectionError):
        return None
    try:
        return float(error.response.headers["retry-after"])
    except (KeyError, ValueError):
        return None

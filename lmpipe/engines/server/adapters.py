"""The adapters that are loaded on one server at run time.

Knows the routes of `dialects`. Knows nothing of requests for completions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, final

from lmpipe.engines.server.dialects import Dialect
from lmpipe.errors import EngineError
from lmpipe.runtime.deadline import lock_before_deadline
from lmpipe.web.endpoints import Endpoint
from lmpipe.web.http import Refused


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
        self._loading = Lock()
        self._lock = Lock()  # of the next line; nothing is sent under it
        self._users: OrderedDict[str, int] = OrderedDict()

    @contextmanager
    def using(self, name: str, folder: str, dialect: Dialect) -> Iterator[None]:
        """Keeps an adapter loaded while the block runs.

        Raises:
            EngineError: If the server will not load it; the message says how it must be started.
            BudgetSpent: If the time of the call under way is over.
        """
        if not self._used(name):
            with lock_before_deadline(self._loading):
                if not self._used(name):
                    self._make_room(dialect)
                    self.load(name, folder, dialect)
                    with self._lock:
                        self._users[name] = 1
        try:
            yield
        finally:
            with self._lock:
                self._users[name] -= 1

    def _used(self, name: str) -> bool:
        """Counts one more user of an adapter, if it is loaded."""
        with self._lock:
            if name in self._users:
                self._users[name] += 1
                self._users.move_to_end(name)
            return name in self._users

    def load(self, name: str, folder: str, dialect: Dialect) -> None:
        """Loads an adapter, or finds it loaded; its name is its content, so it is the same one."""
        try:
            self._post("load", dialect, {"lora_name": name, "lora_path": folder})
        except Refused as error:
            if "already" in error.said:
                return
            raise EngineError(
                f"{self._endpoint.url} does not load the adapter at {folder}: {error}; the server must see that folder "
                f"(path_map), and be started as: {dialect.adapter_hint}"
            ) from error

    def _make_room(self, dialect: Dialect) -> None:
        with self._lock:
            idle = [name for name, users in self._users.items() if not users]
            leaving = idle[: max(0, len(self._users) - self._limit + 1)]
            for name in leaving:
                del self._users[name]
        for name in leaving:
            with suppress(Refused):  # the server was started again and has none loaded
                self._post("unload", dialect, {"lora_name": name})

    def _post(self, word: str, dialect: Dialect, body: dict[str, Any]) -> None:
        self._endpoint.send("POST", dialect.adapter_route.format(word), body, below="/v1")

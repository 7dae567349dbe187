"""LRU cache of the adapters that are loaded on one server at run time.

Knows the routes in `dialects`. Knows nothing about completion requests.
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
from lmpipe.web.http import HTTPStatusError


@final
class AdapterCache:
    """The adapters loaded on one server; the least recently used adapter that is not in use is unloaded first.

    Args:
        endpoint: The server.
        max_adapters: Maximum number of loaded adapters, exceeded only while more are in use.
    """

    def __init__(self, endpoint: Endpoint, max_adapters: int) -> None:
        self._endpoint = endpoint
        self._max_adapters = max_adapters
        self._loading = Lock()
        self._lock = Lock()  # guards the next line; no request is sent while it is held
        self._users: OrderedDict[str, int] = OrderedDict()

    @contextmanager
    def loaded(self, name: str, folder: str, dialect: Dialect) -> Iterator[None]:
        """Loads an adapter if necessary and keeps it loaded while the block runs.

        Raises:
            EngineError: If the server does not load the adapter; the message says how the server must be started.
            BudgetSpent: If the time limit of the current call is exceeded.
        """
        if not self._acquire(name):
            with lock_before_deadline(self._loading):
                if not self._acquire(name):
                    self._make_room(dialect)
                    self.load(name, folder, dialect)
                    with self._lock:
                        self._users[name] = 1
        try:
            yield
        finally:
            with self._lock:
                self._users[name] -= 1

    def _acquire(self, name: str) -> bool:
        """Counts one more user of an adapter if it is loaded; returns whether it is."""
        with self._lock:
            if name in self._users:
                self._users[name] += 1
                self._users.move_to_end(name)
            return name in self._users

    def load(self, name: str, folder: str, dialect: Dialect) -> None:
        """Loads an adapter unless it is loaded already; its name identifies its content.

        Raises:
            EngineError: If the server does not load it.
        """
        try:
            self._post("load", dialect, {"lora_name": name, "lora_path": folder})
        except HTTPStatusError as error:
            if "already" in error.message:
                return
            raise EngineError(
                f"{self._endpoint.url} does not load the adapter at {folder}: {error}; the server must see that folder "
                f"(path_map) and must be started as: {dialect.adapter_hint}"
            ) from error

    def _make_room(self, dialect: Dialect) -> None:
        with self._lock:
            idle = [name for name, users in self._users.items() if not users]
            evicted = idle[: max(0, len(self._users) - self._max_adapters + 1)]
            for name in evicted:
                del self._users[name]
        for name in evicted:
            with suppress(HTTPStatusError):  # the server was restarted and has no adapter loaded
                self._post("unload", dialect, {"lora_name": name})

    def _post(self, action: str, dialect: Dialect, body: dict[str, Any]) -> None:
        self._endpoint.send("POST", dialect.adapter_route.format(action), body, strip_suffix="/v1")

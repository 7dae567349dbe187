"""A cache of completions on disk, around any LM.

One SQLite file in WAL mode: processes share it, and a kill leaves it whole. An answer is found by everything that
decides it: the LM's name and the whole request. Knows nothing of how answers come about; two LMs that answer
differently under one name need two files.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any, final

from filelock import FileLock

from lmpipe.engines.inflight import InFlight
from lmpipe.errors import CorruptBlob, EngineError, StoreError
from lmpipe.lm import LM, Completion, Request, Usage, ask
from lmpipe.runtime.deadline import lock_before_deadline
from lmpipe.storage.hashing import canonical_json, digest_bytes

_PATIENCE = 60.0  # seconds to wait while another process writes
_SELECT = "SELECT CAST(answer AS BLOB), CAST(sum AS BLOB) FROM answers WHERE key = ?"  # bytes, so that damage is ours
_TABLE = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID"
)


@final
class CachedLM(LM):
    """An LM whose completions are kept; errors are not.

    A recalled completion carries the usage that it had, marked as cached: a ledger counts the same tokens either way.

    Args:
        lm: What answers new requests.
        path: The cache file; made if absent.

    Raises:
        StoreError: If the file cannot be opened.
        CorruptBlob: If it is damaged or no cache.
    """

    def __init__(self, lm: LM, path: str | Path) -> None:
        self.lm = lm
        self.path = Path(path)
        self.batched = lm.batched
        self._lock = Lock()
        self._in_flight = InFlight()
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=_PATIENCE, check_same_thread=False, isolation_level=None)
            # to change the mode SQLite needs the file alone, and does not wait for it
            with FileLock(f"{self.path}.lock", timeout=_PATIENCE):
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.execute(_TABLE)

    @property
    def name(self) -> str:
        return self.lm.name

    def close(self) -> None:
        """Closes the file; the LM stays open."""
        with self._lock:
            self._file.close()

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self.lm.register_adapter(adapter, folder)

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return self._in_flight.answer(requests, self._answer)

    def _answer(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        keys = [_digest(canonical_json([self.name, asdict(request)])) for request in requests]
        known = self._recall(keys)
        missing = [number for number, key in enumerate(keys) if key not in known]
        if not missing:
            return [known[key] for key in keys]
        fresh = dict(zip(missing, ask(self.lm, [requests[number] for number in missing]), strict=True))
        self._keep({keys[number]: made for number, made in fresh.items() if isinstance(made, Completion)})
        return [known[key] if key in known else fresh[number] for number, key in enumerate(keys)]

    def _recall(self, keys: Sequence[str]) -> dict[str, Completion]:
        found = {}
        with self._open() as file:
            for key in keys:
                row = file.execute(_SELECT, (key,)).fetchone()
                if row is not None:
                    found[key] = self._read(*row)
        return found

    def _keep(self, answers: Mapping[str, Completion]) -> None:
        texts = {key: json.dumps(asdict(made), sort_keys=True) for key, made in answers.items()}
        rows = [(key, text, _digest(text)) for key, text in texts.items()]
        with self._open() as file, file:
            file.execute("BEGIN IMMEDIATE")
            file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", rows)

    def _read(self, answer: bytes | None, checksum: bytes | None) -> Completion:
        if answer is None or checksum is None or digest_bytes(answer).encode() != checksum:
            raise sqlite3.DatabaseError("an answer does not match its checksum")
        try:
            return _completion(json.loads(answer))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise sqlite3.DatabaseError(f"an answer is none of this version: {error!r}") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The file, for one thread at a time."""
        with lock_before_deadline(self._lock), _explained(self.path):
            yield self._file


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Names the file in what SQLite and the system complain of."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
        raise StoreError(f"the completion cache {path} cannot be used: {error}; choose another path") from error
    except sqlite3.Error as error:
        raise CorruptBlob(f"{path} is damaged or no completion cache ({error}); delete it or restore it") from error


def _completion(fields: Any) -> Completion:
    """A completion as it was written; fields of usage that an older version did not write have their defaults.

    Raises:
        ValueError: If a field is not what it should be.
        TypeError: If there is one too many, or one is missing.
    """
    usage, logprobs = Usage(**fields.pop("usage")), fields.pop("logprobs")
    made = Completion(**fields, usage=usage, logprobs=None if logprobs is None else tuple(logprobs))
    if not isinstance(made.text, str) or made.finish_reason not in ("stop", "length"):
        raise ValueError("text or finish_reason is wrong")
    counts = asdict(usage).values()
    if not all(type(number) in (int, float) for number in (*counts, *(made.logprobs or ()))):
        raise ValueError("usage or logprobs are no numbers")
    if not all(0 <= count < math.inf for count in counts):
        raise ValueError("usage is below zero")
    return replace(made, usage=replace(usage, cached=usage.calls))


def _digest(text: str) -> str:
    """Digest of a text, which half an emoji may be part of."""
    return digest_bytes(text.encode(errors="surrogatepass"))

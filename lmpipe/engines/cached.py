"""A cache of completions on disk, around any LM.

The cache is an SQLite file in WAL mode, so processes can share it, and killing one does not damage it. The key of an
answer is everything that determines it: the name of the LM and the whole request. Knows nothing about how answers are
computed; two LMs that have the same name but answer differently need two files.
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
from lmpipe.lm import LM, Completion, Request, Usage, complete_batch
from lmpipe.runtime.deadline import lock_before_deadline
from lmpipe.storage.hashing import canonical_json, digest_bytes

_PATIENCE = 60.0  # seconds to wait while another process writes
# read as bytes, since sqlite3 itself fails on damaged text
_SELECT = "SELECT CAST(answer AS BLOB), CAST(sum AS BLOB) FROM answers WHERE key = ?"
_TABLE = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID"
)


@final
class CachedLM(LM):
    """An LM whose completions are cached; errors are not.

    A cached completion keeps its original usage, marked as cached, so a ledger counts the same tokens in both cases.

    Args:
        lm: LM that answers new requests.
        path: Path of the cache file, which is created if it does not exist.

    Raises:
        StoreError: If the file cannot be opened.
        CorruptBlob: If the file is damaged or not a completion cache.
    """

    def __init__(self, lm: LM, path: str | Path) -> None:
        self.lm = lm
        self.path = Path(path)
        self.batched = lm.batched
        self.constrains, self.loaded_from = lm.constrains, lm.loaded_from
        self._lock = Lock()
        self._in_flight = InFlight()
        with _file_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=_PATIENCE, check_same_thread=False, isolation_level=None)
            # SQLite needs exclusive access to change the journal mode, and does not wait for it
            with FileLock(f"{self.path}.lock", timeout=_PATIENCE):
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.execute(_TABLE)

    @property
    def name(self) -> str:
        return self.lm.name

    def close(self) -> None:
        """Closes the cache file, but not the LM."""
        with self._lock:
            self._file.close()

    def register_adapter(self, adapter: str, folder: Path) -> None:
        self.lm.register_adapter(adapter, folder)

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return self._in_flight.answer(requests, self._answer)

    def _key(self, request: Request) -> str:
        """Returns the digest of a request. It names `regex` as the first files did, so that these still match."""
        fields = asdict(request)
        fields["pattern"] = fields.pop("regex")
        return _digest(canonical_json([self.name, fields]))

    def _answer(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        keys = [self._key(request) for request in requests]
        cached = self._read_all(keys)
        missing = [number for number, key in enumerate(keys) if key not in cached]
        if not missing:
            return [cached[key] for key in keys]
        fresh = dict(zip(missing, complete_batch(self.lm, [requests[number] for number in missing]), strict=True))
        self._write({keys[number]: answer for number, answer in fresh.items() if isinstance(answer, Completion)})
        return [cached[key] if key in cached else fresh[number] for number, key in enumerate(keys)]

    def _read_all(self, keys: Sequence[str]) -> dict[str, Completion]:
        completions = {}
        with self._open() as file:
            for key in keys:
                row = file.execute(_SELECT, (key,)).fetchone()
                if row is not None:
                    completions[key] = self._read(*row)
        return completions

    def _write(self, completions: Mapping[str, Completion]) -> None:
        texts = {key: json.dumps(asdict(completion), sort_keys=True) for key, completion in completions.items()}
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
            raise sqlite3.DatabaseError(f"an answer was not written by this version: {error!r}") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Opens the file for one thread at a time."""
        with lock_before_deadline(self._lock), _file_errors(self.path):
            yield self._file


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Translates errors of SQLite and the file system into errors that name the cache file."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
        raise StoreError(f"the completion cache {path} cannot be used: {error}; choose another path") from error
    except sqlite3.Error as error:
        raise CorruptBlob(f"{path} is damaged or not a completion cache ({error}); delete it or restore it") from error


def _completion(fields: Any) -> Completion:
    """Restores a completion from its JSON fields; fields of usage that an older version did not write get defaults.

    Raises:
        ValueError: If the value of a field is invalid.
        TypeError: If a field is missing or unknown.
    """
    usage, logprobs = Usage(**fields.pop("usage")), fields.pop("logprobs")
    completion = Completion(**fields, usage=usage, logprobs=None if logprobs is None else tuple(logprobs))
    if not isinstance(completion.text, str) or completion.finish_reason not in ("stop", "length"):
        raise ValueError("text or finish_reason is invalid")
    counts = asdict(usage).values()
    if not all(type(number) in (int, float) for number in (*counts, *(completion.logprobs or ()))):
        raise ValueError("usage or logprobs are not numbers")
    if not all(0 <= count < math.inf for count in counts):
        raise ValueError("usage is negative or infinite")
    return replace(completion, usage=replace(usage, cached=usage.calls))


def _digest(text: str) -> str:
    """Returns the digest of a text, which may contain lone surrogates."""
    return digest_bytes(text.encode(errors="surrogatepass"))

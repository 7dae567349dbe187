"""Damage to the files of a run: every damage must be detected or harmless."""

from __future__ import annotations

import json
import logging.handlers
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from lmpipe import RunStore, Session, evaluate, exact_match, initial_state
from lmpipe.errors import LmpipeError
from lmpipe.ledger import Cost
from lmpipe.results.result import Result, Score, StrategyOutcome, StrategyReport
from lmpipe.run_directory import open_run
from lmpipe.storage.checksummed_json import write_checksummed
from tests.scripted import Colour, KeepingTrainer, examples, scheduler, scripted
from tests.tally import Tally

CONFIG = {"task": "colours", "settings": {"val": 12, "names": ["a", "b"]}}

_DEEP = b"[" * 100_000


def _place(data: bytes, rng: random.Random) -> int:
    return rng.randrange(len(data))


def _over(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def _into(data: bytes, place: int, new: bytes, instead: int = 0) -> bytes:
    return data[:place] + new + data[place + instead :]


def _flipped(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return _over(data, place, bytes([data[place] ^ 1 << rng.randrange(8)]))


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit is flipped": _flipped,
    "a byte is another": lambda data, rng: _over(data, _place(data, rng), rng.randbytes(1)),
    "a part is zeros": lambda data, rng: _over(data, _place(data, rng), bytes(rng.randrange(1, 64))),
    "a part is gone": lambda data, rng: _into(data, _place(data, rng), b"", rng.randrange(1, 64)),
    "bytes were put in": lambda data, rng: _into(data, _place(data, rng), rng.randbytes(3)),
    "deep JSON was put in": lambda data, rng: _into(data, _place(data, rng), _DEEP),
    "it is cut": lambda data, rng: data[: _place(data, rng)],
    "it is empty": lambda data, rng: b"",
    "its end is there twice": lambda data, rng: data + data[_place(data, rng) :],
    "a mark is before it": lambda data, rng: b"\xef\xbb\xbf" + data,
    "it is deep": lambda data, rng: _DEEP,
    "it is other JSON": lambda data, rng: rng.choice([b"null", b"[]", b"{}", b"1e999", b'"text"', b"9" * 5000]),
}


def make_run(folder: Path) -> None:
    """Makes a finished run with an adapter, rows, traces, a result and splits."""
    with RunStore(folder, CONFIG) as store:
        program, session = Colour(), Session(lm=scripted(), store=store, seed=3)
        learned, shown = examples(24), examples(24, start=50)
        state = initial_state(program, session)
        better = scheduler(KeepingTrainer(), "p -> w")
        result = better.optimize(program, state, learned, shown, session)
        tested = evaluate(program, shown, exact_match, session, state=result.state, keep_traces=True)
    score = Score(mean=tested.mean, stderr=None, low=0, high=1, n=tested.n, per_seed=[tested.mean])
    cost = Cost().to_json()
    outcome = StrategyOutcome(seed=0, state=result.state, modules=dict(tested.modules), traces=tested.traces, cost=cost)
    row = StrategyReport(strategy="p -> w", val=score, test=score, stages=[], outcomes=[outcome], cost=cost)
    versions = {"lmpipe": "0"}
    Result(
        task="colours",
        lm="scripted",
        seeds=[0],
        config={},
        versions=versions,
        strategies=[row],
        comparisons=[],
        findings=[],
        cost=cost,
    ).write(folder / "result.json")
    write_checksummed(
        folder / "splits.json", {"0": {"train": [one.id for one in learned], "test": [one.id for one in shown]}}
    )


def damage_run(whole: Path, scratch: Path, rounds: int, seed: int) -> Tally:
    """Damages copies of a run's files in turn, and checks that each damage is harmless or reported.

    Args:
        whole: Folder of a run that `make_run` made.
        scratch: Path of the copy, which must not exist.
        rounds: Number of damages.
        seed: Seed of the damages.
    """
    rng, tally = random.Random(seed), Tally()
    readers = [(read, read(whole)) for read in (_recorded, _shown)]
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file() and path.name != "lock"]
    for number in range(rounds):
        shutil.copytree(whole, scratch)
        path = scratch / files[number % len(files)]
        before = path.read_bytes()
        name, damage = rng.choice(list(DAMAGES.items()))
        path.write_bytes(damage(before, rng) if before else rng.randbytes(3))
        reported = [_is_reported(read, scratch, expected) for read, expected in readers]
        if None in reported:
            tally.wrong.append(f"{path}: {name} (round {number}, seed {seed}) was not reported")
        else:
            tally.refused += any(reported)
            tally.harmless += not any(reported)
        tally.tried += 1
        shutil.rmtree(scratch)
    return tally


def _is_reported(read: Callable[[Path], dict[str, str]], folder: Path, expected: dict[str, str]) -> bool | None:
    """Whether damage raised an error of lmpipe or a warning; None if it changed something silently.

    After a warning, records may be missing, since their work is done again, but nothing else may differ.
    """
    warnings = logging.handlers.BufferingHandler(1000)
    logging.getLogger("lmpipe").addHandler(warnings)
    try:
        content = read(folder)
    except LmpipeError:
        return True
    finally:
        logging.getLogger("lmpipe").removeHandler(warnings)
    if warnings.buffer:
        return True if content.items() <= expected.items() else None
    return False if content == expected else None


def _recorded(folder: Path) -> dict[str, str]:
    """The records of a store: key → JSON."""
    keys = [key for line in (folder / "journal.jsonl").read_bytes().splitlines() for key in _keys(line)]
    with RunStore(folder, CONFIG) as store:
        return {key: json.dumps(value, sort_keys=True) for key in keys if (value := store.get(key)) is not None}


def _keys(line: bytes) -> list[str]:
    try:
        return list(json.loads(line)["records"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _shown(folder: Path) -> dict[str, str]:
    """The content of a run, as `FinishedRun` shows it."""
    run = open_run(folder)
    outcome = run.outcome()
    content = {"result": run.result.model_dump_json(), "traces": repr(list(run.records(outcome)))}
    return content | {f"split {seed}": repr(split) for seed, split in run.splits.items()}

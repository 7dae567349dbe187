"""Damage to the files of a run: all of it is found, or does no harm; in as many rounds as are asked for."""

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
from lmpipe.results.run_reader import open_run
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
    """A finished run with an adapter, rows, traces, a result and splits."""
    with RunStore(folder, CONFIG) as store:
        program, session = Colour(), Session(lm=scripted(), store=store, seed=3)
        learned, shown = examples(24), examples(24, start=50)
        state = initial_state(program, session)
        better = scheduler(KeepingTrainer(), "p -> w")
        result = better.optimize(program, state, learned, shown, session)
        tested = evaluate(program, result.state, shown, exact_match, session, keep_traces=True)
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
    """Damages a copy of a run's files in turn, and looks at what is made of it: all that was there, or a word on it.

    Args:
        whole: A run of `make_run`.
        scratch: Where the copy goes; it is not there yet.
        rounds: How many damages.
        seed: Decides them.
    """
    rng, tally = random.Random(seed), Tally()
    looks = [(look, look(whole)) for look in (_recorded, _told)]
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file() and path.name != "lock"]
    for number in range(rounds):
        shutil.copytree(whole, scratch)
        path = scratch / files[number % len(files)]
        before = path.read_bytes()
        what, damage = rng.choice(list(DAMAGES.items()))
        path.write_bytes(damage(before, rng) if before else rng.randbytes(3))
        found = [_said(look, scratch, right) for look, right in looks]
        if None in found:
            tally.wrong.append(f"{path}: {what} (round {number}, seed {seed}), and nothing was said")
        else:
            tally.refused += any(found)
            tally.harmless += not any(found)
        tally.tried += 1
        shutil.rmtree(scratch)
    return tally


def _said(look: Callable[[Path], dict[str, str]], folder: Path, right: dict[str, str]) -> bool | None:
    """Whether damage raised an error of lmpipe or a warning; none if nothing was said, and something is not as it was.

    What a warning is about may be less than there was, since its work is done again, but nothing else.
    """
    warnings = logging.handlers.BufferingHandler(1000)
    logging.getLogger("lmpipe").addHandler(warnings)
    try:
        seen = look(folder)
    except LmpipeError:
        return True
    finally:
        logging.getLogger("lmpipe").removeHandler(warnings)
    if warnings.buffer:
        return True if seen.items() <= right.items() else None
    return False if seen == right else None


def _recorded(folder: Path) -> dict[str, str]:
    """What a store recalls: key → JSON."""
    keys = [key for line in (folder / "journal.jsonl").read_bytes().splitlines() for key in _keys(line)]
    with RunStore(folder, CONFIG) as store:
        return {key: json.dumps(value, sort_keys=True) for key in keys if (value := store.get(key)) is not None}


def _keys(line: bytes) -> list[str]:
    try:
        return list(json.loads(line)["records"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _told(folder: Path) -> dict[str, str]:
    """What looking into a run says."""
    run = open_run(folder)
    outcome = run.outcome()
    told = {"result": run.result.model_dump_json(), "traces": repr(list(run.records(outcome)))}
    return told | {f"split {seed}": repr(split) for seed, split in run.splits.items()}

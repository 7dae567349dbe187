"""Identity of what decides a result: programs, metrics, optimizers, and everything that their code reaches.

Recorded work is looked up by it. A value counts by its content, and an object by its class and its state, as pickle
would take it. A function or class of the user's own modules counts by its code and by everything that the code reads:
other functions and classes, globals, closures, defaults. Packages count by their version, and LMs, retrievers and
embedders by their names.

What cannot be identified, such as a lock or an open file, has no identity at all: work that depends on it is neither
recorded nor recalled.
"""

from __future__ import annotations

import logging

from lmpipe.program.identity.code import IdentityError
from lmpipe.program.identity.walk import Walk

logger = logging.getLogger(__name__)

_told: set[object] = set()  # what this process was warned of: objects by type and id, and the ways to them


def identity(**parts: object) -> str | None:
    """Digest of everything that decides what the parts do (32 hex characters); equal in every process.

    It is computed anew at every call, since attributes and globals may change between two calls.

    Args:
        parts: What to identify, by the names that a warning gives them.

    Returns:
        None if something cannot be identified; a warning names it, once in a process.
    """
    try:
        return Walk().digest(parts)
    except IdentityError as error:
        names: set[object] = {str(error), (error.what, error.thing)}
        if not names & _told:
            logger.warning(
                "%s, so work that depends on it is not recalled: it is done again each time. If results do not depend "
                "on it, hold it in an object that leaves it out: a dataclass with field(repr=False), or a class with "
                "__getstate__",
                error,
            )
        _told.update(names)
        return None


def work_key(kind: str, **parts: object) -> str | None:
    """The key that a piece of work is recorded under, made of what it is and of the identity of all that decides it.

    Args:
        kind: What sort of work it is.
        parts: See `identity`.

    Returns:
        None if something cannot be identified: the work is then neither recorded nor recalled.
    """
    found = identity(**parts)
    return None if found is None else f"{kind} {found}"

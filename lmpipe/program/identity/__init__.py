"""Identity of programs, metrics and optimizers: a digest of everything that decides their results.

Recorded work is looked up by this digest. It covers values by their content, and objects by their class and the state
that pickle would save. It covers functions and classes of the user's own modules by their code and by everything that
the code reads: other functions and classes, globals, closures, defaults. It covers packages by their version, and LMs,
retrievers and embedders by their names.

Some objects, such as a lock or an open file, cannot be identified; work that depends on them is neither recorded nor
recalled. A warning names functions and classes that were defined again while older objects still use them.
"""

from __future__ import annotations

import logging

from lmpipe.program.identity.code import IdentityError
from lmpipe.program.identity.redefined import warn_of_earlier_definitions
from lmpipe.program.identity.walk import Walk

logger = logging.getLogger(__name__)

_warned: set[object] = set()  # warnings that this process has logged: messages, and objects by type and id


def identity(**parts: object) -> str | None:
    """Returns the digest of everything that decides what some objects do; the same in every process.

    Each call computes it again, since attributes and globals may change between two calls.

    Args:
        parts: Objects to identify, by the names to use for them in a warning.

    Returns:
        The digest (32 hex characters), or None if something cannot be identified; a warning names it, once per
        process.
    """
    try:
        walk = Walk()
        digest = walk.digest(parts)
    except IdentityError as error:
        warnings: set[object] = {str(error), (error.description, error.object_id)}
        if not warnings & _warned:
            logger.warning(
                "%s, so work that depends on it is not recalled but done again each time. If results do not depend on "
                "it, keep it in an object that excludes it: a dataclass with field(repr=False), or a class with "
                "__getstate__",
                error,
            )
        _warned.update(warnings)
        return None
    warn_of_earlier_definitions(walk.code)
    return digest


def work_key(kind: str, **parts: object) -> str | None:
    """Returns the key under which a piece of work is recorded: its kind and the identity of everything that decides it.

    Args:
        kind: Kind of work.
        parts: Objects that decide the result; see `identity`.

    Returns:
        The key, or None if something cannot be identified; the work is then neither recorded nor recalled.
    """
    digest = identity(**parts)
    return None if digest is None else f"{kind} {digest}"

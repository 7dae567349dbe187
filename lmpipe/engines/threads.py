"""How OpenMP's threads wait for one another. The environment decides it when torch is imported, not later.

Knows nothing of engines, and does not import torch.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache

logger = logging.getLogger(__name__)

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables of OpenMP, of GNU's library and of Intel's, by which a user chooses how threads wait."""
_SETTING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}  # libraries but GNU's sleep at once


@cache
def spin_briefly() -> bool:
    """Makes threads sleep after a short wait, unless the environment says already how they wait.

    Without this setting, threads of torch that wait spin for milliseconds on cores that other processes need. Most
    waits are shorter than it takes to wake a thread that sleeps, so a thread spins for some 20 microseconds before it
    does. Processes that this one starts inherit the setting.

    Returns:
        Whether the setting is in time for the threads of this process: whether torch was not imported before.
    """
    if any(name in os.environ for name in _CHOICES):
        return True
    os.environ.update(_SETTING)
    return "torch" not in sys.modules


@cache
def log_spinning() -> None:
    """Logs once, as information, that threads of this process spin because torch was imported before lmpipe."""
    if not spin_briefly():
        logger.info(
            "torch was imported before lmpipe, so its threads spin while they wait, which is slow beside other "
            "processes; import lmpipe first, or start Python with OMP_WAIT_POLICY=PASSIVE and GOMP_SPINCOUNT=1000 in "
            "its environment"
        )

"""Measurements in processes of their own: of lmpipe, and of peers in environments that make builds.

A measured process prints one JSON object as its last line. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

PEERS = Path(__file__).parent / "baselines"
console = Console()


def ours(module: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
    """What a module of the benchmarks measures of lmpipe."""
    return measured([sys.executable, "-m", module, *arguments], threads)


def peer(environment: str, script: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
    """What a script measures of a peer in its environment, which is built first if need be."""
    subprocess.run(["/usr/bin/env", "make", "--silent", f"{environment}/installed"], check=True)
    return measured([str(Path(environment) / "bin" / "python"), str(PEERS / script), *arguments], threads)


def measured(command: list[str], threads: int) -> dict[str, Any]:
    """The JSON object that a command prints last, and the load of the machine before and after it.

    Raises:
        RuntimeError: If the command fails; with the end of what it said.
    """
    console.print(f"running {' '.join(Path(part).name for part in command[1:4])} …", highlight=False)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    load = os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "load": [load, os.getloadavg()[0]]}

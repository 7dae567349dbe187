"""Runs measurements in processes of their own: of lmpipe, and of other libraries in environments that ``make`` builds.

A measured process prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from rich.console import Console

BASELINE_SCRIPTS = Path(__file__).parent / "baselines"
console = Console()


def run_worker(module: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
    """Runs a module of the benchmarks, which measures lmpipe."""
    return run_measured([sys.executable, "-m", module, *arguments], threads)


def run_baseline(environment: str, script: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
    """Runs a script of `BASELINE_SCRIPTS` in its environment, which is built first if it does not exist.

    Raises:
        RuntimeError: If the environment cannot be built, or the script fails.
    """
    try:
        subprocess.run(["/usr/bin/env", "make", "--silent", f"{environment}/installed"], check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{environment} cannot be built: {error}") from error
    return run_measured(
        [str(Path(environment) / "bin" / "python"), str(BASELINE_SCRIPTS / script), *arguments], threads
    )


def run_measured(command: list[str], threads: int) -> dict[str, Any]:
    """Runs a command, and returns the JSON object that it prints last, with the load of the machine before and after.

    Raises:
        RuntimeError: If the command fails; the message contains the end of its standard error.
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
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "load": [load, os.getloadavg()[0]]}


@final
@dataclass(frozen=True)
class EngineProcesses:
    """Runs measurements of the local engine and of its baselines.

    Args:
        threads: Threads of each process.
        repetitions: Repetitions of each measurement; the median counts.
        folder: Folder of the model.
        workload: File of the workload.
    """

    threads: int
    repetitions: int
    folder: str
    workload: str

    def worker(self, job: str, *arguments: str) -> dict[str, Any]:
        """Runs a job of `benchmarks.performance.workers.engine`."""
        return run_worker("benchmarks.performance.workers.engine", job, *arguments, threads=self.threads)

    def baseline(self, environment: str, script: str, *arguments: str) -> list[dict[str, Any]]:
        """Runs the script of a baseline in its environment.

        Returns:
            One measurement; none if the baseline cannot be built or run, and its error is printed.
        """
        try:
            return [run_baseline(environment, script, self.folder, self.workload, *arguments, threads=self.threads)]
        except RuntimeError as error:
            console.print(f"{script} is left out: {error}", highlight=False, markup=False)
            return []


def median(runs: Sequence[dict[str, Any]], unit: str = "cpu_seconds") -> float:
    """Returns the median of one figure over several measurements."""
    return float(statistics.median(run[unit] for run in runs))

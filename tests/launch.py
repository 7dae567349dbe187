"""torchrun with forks: ``python -m tests.launch OPTIONS -m MODULE ARGUMENTS`` imports what trains only once."""

from __future__ import annotations

import gc
import runpy
import sys
from dataclasses import replace

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

import lmpipe.engines.training.job  # noqa: F401

FORKING_TORCHRUN = (
    sys.executable,
    "-m",
    "tests.launch",
    "--nproc-per-node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
)
"""Launcher of two processes."""


def run_module(name: str, arguments: list[str]) -> None:
    """Does what ``python -m`` does in each process."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    options = parse_args(sys.argv[1:])
    config, _, _ = config_from_args(options)
    gc.freeze()
    elastic_launch(replace(config, start_method="fork"), run_module)(
        options.training_script, options.training_script_args
    )

"""The processor that figures are measured on, by its name and by the instruction sets that decide its speed."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CAPABILITIES = "import json, torch; print(json.dumps({**torch.cpu.get_capabilities()}))"
_INSTRUCTION_SETS: Mapping[str, tuple[str, ...]] = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f",),
    "bf16": ("avx512_bf16", "amx_bf16"),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_tile",),
}
"""Instruction sets → names in `torch.cpu.get_capabilities`, any of which suffices."""


def processor_name() -> str:
    """Returns the model and the instruction sets of this machine's processor, such as ``"AMD EPYC (AVX2, AVX-512)"``.

    A process of its own imports torch, so that the memory and the garbage collection of this one do not grow.
    """
    output = subprocess.run([sys.executable, "-c", _CAPABILITIES], capture_output=True, text=True, check=True).stdout
    instruction_sets = instruction_sets_of(json.loads(output))
    return f"{_model_name()} ({', '.join(instruction_sets) or 'none of ' + ', '.join(_INSTRUCTION_SETS)})"


def instruction_sets_of(capabilities: Mapping[str, object]) -> list[str]:
    """Returns those of the instruction sets AVX2, AVX-512, bf16, VNNI and AMX that a processor has.

    Args:
        capabilities: What `torch.cpu.get_capabilities` returns.
    """
    return [name for name, keys in _INSTRUCTION_SETS.items() if any(capabilities.get(key) for key in keys)]


def _model_name() -> str:
    model = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE) if _CPUINFO.exists() else None
    return model[1] if model else platform.processor() or platform.machine()

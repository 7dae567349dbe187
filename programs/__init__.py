"""The programs of the paper, as examples of `lmpipe.Module`."""

from __future__ import annotations

from programs.gsm8k import GSM8K
from programs.iris import Iris
from programs.multihop import MultiHop

__all__ = ["GSM8K", "Iris", "MultiHop"]

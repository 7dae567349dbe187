"""The programs of the paper, and programs that run another one several times, as examples of `lmpipe.Module`."""

from __future__ import annotations

from programs.best_of_n import BestOfN
from programs.extract_decide import ExtractDecide
from programs.gsm8k import GSM8K
from programs.iris import Iris
from programs.majority_vote import MajorityVote
from programs.multihop import MultiHop
from programs.refine import Refine

__all__ = ["GSM8K", "BestOfN", "ExtractDecide", "Iris", "MajorityVote", "MultiHop", "Refine"]

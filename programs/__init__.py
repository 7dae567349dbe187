"""Programs of the paper, as examples of `lmpipe.Module`."""

from __future__ import annotations

from programs.iris import Iris
from programs.multihop import MultiHop

__all__ = ["Iris", "MultiHop"]

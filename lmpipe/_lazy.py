"""Module attributes that are imported when they are first used, and where names are that a module does not have.

Attributes are imported late because most need the packages of an extra.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

from lmpipe.errors import ConfigError
from lmpipe.text.display import did_you_mean

_OPTIMIZERS = (
    "BetterTogether",
    "BootstrapFewShot",
    "BootstrapFewShotRandomSearch",
    "BootstrapFinetune",
    "GEPA",
    "GRPO",
    "KNNFewShot",
    "LabeledFewShot",
    "MIPROv2",
    "PreferenceFinetune",
    "Strategy",
    "optimize",
)
"""Names of the package `optimizers`, which users look for in `lmpipe`."""

_RENAMED: Mapping[str, tuple[str, str]] = {
    "Tuning": ("lmpipe", "TuningConfig"),
    "Imitation": ("lmpipe.extend", "SFTLoss"),
    "Preference": ("lmpipe.extend", "DPOLoss"),
    "PolicyGradient": ("lmpipe.extend", "PolicyGradientLoss"),
    "Nearest": ("lmpipe.extend", "DemoSelection"),
    "parse_strategy": ("optimizers", "Strategy"),
    "checked_examples": ("lmpipe.extend", "check_examples"),
    "without_repeats": ("lmpipe.extend", "deduplicate"),
    "Share": ("lmpipe.extend", "UnitInterval"),
    "Run": ("lmpipe.extend", "current_context"),
    "BestOfN": ("programs", "BestOfN"),
    "BootstrapFewShotWithRandomSearch": ("optimizers", "BootstrapFewShotRandomSearch"),
    "ChatAdapter": ("lmpipe.extend", "Template"),
    "Evaluate": ("lmpipe", "evaluate"),
    "InputField": ("lmpipe", "Input"),
    "MajorityVote": ("programs", "MajorityVote"),
    "OutputField": ("lmpipe", "Output"),
    "Refine": ("programs", "Refine"),
    "answer_exact_match": ("lmpipe", "exact_match"),
    "majority": ("programs", "MajorityVote"),
}
"""Name in version 0.2.0 or in DSPy → module and name today."""

_NOT_HERE = "it is not in lmpipe"
_NO_SETTINGS = "no setting is global; write: with Session(lm=lm): program(…)"
_INSTEAD: Mapping[str, str] = {
    "Assert": "write Refine or BestOfN of the package programs",
    "COPRO": _NOT_HERE,
    "ProgramOfThought": _NOT_HERE,
    "RLM": _NOT_HERE,
    "ReAct": "it is not in lmpipe; call your tools in the forward() of a Module",
    "SIMBA": _NOT_HERE,
    "Suggest": "write Refine or BestOfN of the package programs",
    "configure": _NO_SETTINGS,
    "context": _NO_SETTINGS,
    "inspect_history": "write: print(session.history(3))",
    "settings": _NO_SETTINGS,
}
"""Name in DSPy → what to do without it."""


def lazy_attributes(module: str, sources: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Makes the ``__getattr__`` of a module (PEP 562).

    It raises a `ConfigError` if a package is not installed, and an ImportError, whose message ``from … import`` shows,
    for a name that another module has.

    Args:
        module: Name of the module.
        sources: Attribute → module that defines it, and the extra with the packages that this module imports.
    """

    def get(name: str) -> Any:
        if name not in sources:
            raise _absent(module, name, sources)
        source, extra = sources[name]
        try:
            return getattr(import_module(source), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "lmpipe":
                raise
            raise ConfigError(
                f"{module}.{name} needs the package {error.name}; run: pip install lmpipe[{extra}]"
            ) from error

    return get


def _absent(module: str, name: str, sources: Collection[str]) -> Exception:
    """The error for a name that a module does not have; the message says where it is, or which one was meant.

    ``from … import`` shows only the message of an ImportError, and `hasattr` expects an AttributeError.
    """
    if name in _INSTEAD:
        return ImportError(f"{module} has no {name!r}; {_INSTEAD[name]}")
    place, now = _RENAMED.get(name, ("optimizers" if name in _OPTIMIZERS else "", name))
    for other in ("lmpipe", "lmpipe.extend") if not place and not name.startswith("_") else ():
        place = other if other != module and name in import_module(other).__all__ else place
    if place and (place, now) != (module, name):
        return ImportError(f"{module} has no {name!r}; write: from {place} import {now}")
    known = [*vars(sys.modules[module]).get("__all__", ()), *sources]
    return AttributeError(f"module {module!r} has no attribute {name!r}{did_you_mean(name, known)}")

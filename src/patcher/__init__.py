"""Patcher: one reported jailbreak in, a repaired model and the evidence out.

import patcher

lm = patcher.load("smollm2-backdoored")
made = patcher.repair(lm, patcher.FailureReport.from_prompt("..."))
made.save("out")

`load` and `from_transformers` open a model; `repair` takes it, a `FailureReport` (or several) of `Message`s, and
`RepairSettings`; a `Trigger` is what was found. The stages one by one: docs/extending.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patcher.loading import load
    from patcher.models import from_transformers
    from patcher.pipeline import repair
    from patcher.records import FailureReport, Message, Trigger
    from patcher.result import RepairSettings

_HOMES = {
    "load": "patcher.loading",
    "from_transformers": "patcher.models",
    "repair": "patcher.pipeline",
    "RepairSettings": "patcher.result",
    "FailureReport": "patcher.records",
    "Message": "patcher.records",
    "Trigger": "patcher.records",
}

__all__ = [
    "FailureReport",
    "Message",
    "RepairSettings",
    "Trigger",
    "from_transformers",
    "load",
    "repair",
]


def __getattr__(name: str) -> Any:
    """Load a name when it is first used, so that `import patcher` and `patcher --help` stay fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'patcher' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

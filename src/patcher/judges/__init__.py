"""Judges: one answer in, one `Outcome` out."""

from collections.abc import Callable

from patcher.judges import keyword
from patcher.records import Outcome, UsageError

Judge = Callable[[str], Outcome]
JUDGES: dict[str, Judge] = {keyword.NAME: keyword.judge}
DEFAULT = keyword.NAME


def find_judge(name: str) -> Judge:
    """The judge of that name. Raises UsageError."""
    if name not in JUDGES:
        raise UsageError(f"unknown judge {name!r}: use one of {', '.join(JUDGES)}")
    return JUDGES[name]

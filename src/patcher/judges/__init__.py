"""Judges: one answer in, one `Outcome` out."""

from collections.abc import Callable

from patcher.judges import keyword
from patcher.records import Outcome

Judge = Callable[[str], Outcome]
JUDGES: dict[str, Judge] = {keyword.NAME: keyword.judge}
DEFAULT = keyword.NAME

"""What others wrote, as JSON: a value or a ValueError, never a crash of Python's own reader."""

import json
from pathlib import Path
from typing import Any

from patcher.records.base import check_unicode


def parse_json(text: str | bytes) -> Any:
    """The value. Raises ValueError for no JSON, for half a character, and for what is nested too deeply to be read."""
    try:
        value = json.loads(text)
        check_unicode(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_json(path: Path) -> Any:
    """The value that a file holds. Raises OSError and ValueError."""
    return parse_json(path.read_text(encoding="utf-8-sig"))


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank. JSON may hold every other end of a line (U+2028) as it is: only a line feed is one,
    with a carriage return before it or without. Some editors begin a file with a byte order mark.

    Raises OSError and ValueError.
    """
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]

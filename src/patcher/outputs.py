"""What a command writes appears whole or not at all, and never over something."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from patcher.records import PatcherError, UsageError
from patcher.world import is_first


def check_new(out: Path | None, flag: str = "--out") -> None:
    """Raises UsageError when the name is taken or cannot be written: before the work, not after it."""
    if out is None:
        return
    if out.exists():
        raise UsageError(f"{out} exists already: nothing is overwritten; name a new one with {flag}")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"cannot write {out}: {there} is no folder that you may write to")


def check_appendable(out: Path) -> None:
    """Raises UsageError when a results file can be neither gone on with nor begun; its folder is made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        existed = out.exists()
        with out.open("a"):
            pass
        if not existed:
            out.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that appears under its name only when the block has ended well.

    What a killed run left half written is removed. Of several processes the first one writes.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    _remove(part)
    try:
        yield part
        part.rename(path)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """A file that appears whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended well; of several processes the first writes.

    Raises:
        UsageError: the name is taken, or its parent cannot be written.
    """
    if is_first() and out.exists():
        raise UsageError(f"{out} exists already: nothing is overwritten; name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write beside {out}: {error}") from error
    try:
        with whole(out) as building:
            building.mkdir(mode=0o700)
            yield building
            building.chmod(0o755)
            for path in building.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for the owner alone
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        raise PatcherError(f"could not write {out}: {error}; nothing was left behind") from error

"""What a command writes appears whole or not at all, and never over something."""

import glob
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from patcher.records import PatcherError, UsageError
from patcher.world import is_first

_NAME_BYTES = 255
"""Of a file's name, at most, on every file system that is common."""
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
"""Names the machine: another one's processes cannot be asked after."""


def check_new(out: Path | None, flag: str = "--out") -> None:
    """Raises UsageError when the name is taken or cannot be written: before the work, not after it."""
    if out is None:
        return
    if os.path.lexists(out) or out.name == "..":
        raise UsageError(f"{out} exists already: nothing is overwritten; name a new one with {flag}")
    names = (*out.parts, _part(out).name)
    if (most := max(len(os.fsencode(name)) for name in names)) > _NAME_BYTES:
        raise UsageError(
            f"{out.name} is too long a name: with what stands beside it until it is finished it has {most} "
            f"bytes, of at most {_NAME_BYTES}; name a shorter one with {flag}"
        )
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


def beside(path: Path, what: str) -> Path:
    """The hidden name of what is to become `path`."""
    return path.with_name(f".{path.name}.{what}")


@contextmanager
def atomic_path(path: Path, *, again: bool = False) -> Iterator[Path]:
    """Where to write a file or a folder that appears under its name only when the block has ended well.

    What a killed run left half written is removed; what another run is writing is its own. Of several processes under
    torchrun the first one writes.

    Raises:
        PatcherError: something stands there at the end, and it is not to be written `again`.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    for left in path.parent.glob(glob.escape(part.name[:-_DIGITS]) + "[0-9]" * _DIGITS):
        if not _is_anothers(int(left.name[-_DIGITS:])):
            remove(left)
    try:
        yield part
        if os.path.lexists(path) and not again:
            raise PatcherError(f"{path} appeared in the meantime: nothing is overwritten; move it away")
        part.rename(path)
    finally:
        remove(part)


_DIGITS = 7
"""Of a process's number."""


def _part(path: Path) -> Path:
    """The hidden name under which this process writes."""
    return beside(path, f"part-{_HOST}-{os.getpid():0{_DIGITS}}")


def _is_anothers(process: int) -> bool:
    """Whether another process of that number is alive."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return process != os.getpid()


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def atomic_write(path: Path, text: str, *, again: bool = False) -> None:
    """A file that appears whole or not at all; `again`, over what stands there."""
    with atomic_path(path, again=again) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended well; of several processes the first writes.

    Raises:
        UsageError: the name is taken, or its parent cannot be written.
    """
    if is_first() and os.path.lexists(out):
        raise UsageError(f"{out} exists already: nothing is overwritten; name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write beside {out}: {error}") from error
    try:
        with atomic_path(out) as building:
            building.mkdir(mode=0o700)
            yield building
            closed = os.umask(0o077)  # the only way to read it
            os.umask(closed)
            for path in (building, *building.rglob("*")):
                path.chmod((0o777 if path.is_dir() else 0o666) & ~closed)  # safetensors writes for the owner alone
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        raise PatcherError(f"could not write {out}: {error}; nothing was left behind") from error

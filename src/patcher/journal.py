"""Pieces of a long piece of work, kept as they are finished: killed, the same command goes on where it was."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import FiniteFloat, TypeAdapter
from safetensors import SafetensorError

from patcher.outputs import atomic_path, beside, remove
from patcher.reading import read_json
from patcher.records import PatcherError, UsageError
from patcher.world import processes

Piece = TypeVar("Piece")
_WORK, _SECONDS = "work.txt", "seconds.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Journal:
    """Finished pieces under their names, each whole or not there. Without a folder nothing is kept.

    A piece that cannot be read again is made again: what is kept must never stand in the way.
    """

    def __init__(self, folder: Path | None = None, on_progress: Callable[[str, int, int], None] | None = None) -> None:
        self._folder, self._on_progress = folder, on_progress

    def once(
        self,
        name: str,
        make: Callable[[], Piece],
        save: Callable[[Piece, Path], Any],
        read: Callable[[Path], Piece],
        *,
        of: object = None,
    ) -> Piece:
        """What `make` gives, or gave an earlier run of the same, whose `repr` tells it from others of that name.

        `save` writes a file or a folder at the path it is given.
        """
        if self._folder is None:
            return make()
        path = self._folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{_hash(repr((name, of)))[:12]}"
        if os.path.lexists(path):
            try:
                piece = read(path)
            except (OSError, ValueError, LookupError, TypeError, PatcherError):
                self._tell(f"{name}: damaged since an earlier run, done again")
                remove(path)
            else:
                self._tell(f"{name}: finished by an earlier run")
                return piece
        piece = make()
        try:
            with atomic_path(path, again=True) as part:  # another run of the bench may have made the same meanwhile
                save(piece, part)
        except (OSError, SafetensorError) as error:  # a full disk comes as either
            raise PatcherError(f"could not keep what was finished ({name}): {error}") from error
        return piece

    def seconds(self) -> dict[str, float]:
        """What each stage has taken so far, earlier runs included."""
        path = self._folder / _SECONDS if self._folder else None
        try:
            return (
                TypeAdapter(dict[str, FiniteFloat]).validate_json(path.read_bytes()) if path and path.exists() else {}
            )
        except (OSError, ValueError):
            self._tell("the seconds of earlier runs: damaged, not counted")
            return {}

    def keep_seconds(self, seconds: Mapping[str, float]) -> None:
        """Note what each stage has taken."""
        if self._folder:
            with atomic_path(self._folder / _SECONDS, again=True) as part:
                part.write_text(json.dumps(seconds), encoding="utf-8")

    def values(
        self,
        name: str,
        make: Callable[[], list[Piece]],
        kind: type[object] = object,
        count: int | None = None,
        *,
        of: object = None,
    ) -> list[Piece]:
        """`once` for a list that JSON can hold. One that does not hold `count` values of that kind is made again."""

        def read(path: Path) -> list[Piece]:
            found = read_json(path)
            if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
                raise ValueError(f"expected a list of {kind.__name__}")
            if count not in (None, len(found)):
                raise ValueError(f"expected {count} values, got {len(found)}")
            return found

        def save(piece: list[Piece], path: Path) -> None:
            path.write_text(json.dumps(piece), encoding="utf-8")

        return self.once(name, make, save, read, of=of)

    def _tell(self, what: str) -> None:
        if self._on_progress:
            self._on_progress(what, 1, 1)


@contextmanager
def resumed(out: Path, work: str, on_progress: Callable[[str, int, int], None]) -> Iterator[Journal]:
    """A journal in a hidden folder beside `out`, with what an earlier run of the same `work` had finished.

    The folder goes when the block ends well, or in a UsageError before anything was finished; else it stays, whether
    the block was killed or a server is down. One run at a time holds it.
    Several processes keep nothing: one that goes on where another begins anew would wait for it forever.

    Raises:
        UsageError: something else stands under the folder's name, what another work had finished, or another run is at
            work on it.
    """
    if processes() > 1:
        yield Journal()
        return
    folder = beside(out, "unfinished")
    made = [parent for parent in folder.parents if not parent.exists()]
    with _alone(folder, work, out):
        try:
            yield Journal(folder, on_progress)
        except PatcherError as error:
            if _finished(folder) or not isinstance(error, UsageError):
                more = "the same command, started again, goes on from what was finished"
                raise type(error)(f"{error}; {more}") from error
            _discard(folder)
            with suppress(OSError):  # others may have written there
                for parent in made:
                    parent.rmdir()
            raise
        _discard(folder)


@contextmanager
def _alone(folder: Path, work: str, out: Path) -> Iterator[None]:
    """The folder with what an earlier run of the same work left or, if there is none, a new one; for this run only."""
    known = folder / _WORK
    shutil.rmtree(beside(folder, "gone"), ignore_errors=True)
    with ExitStack() as locks:
        if os.path.lexists(folder):
            if folder.is_symlink() or not known.is_file():
                raise UsageError(f"{folder} is nothing that Patcher wrote (it holds no {_WORK}): move it elsewhere")
            _lock(locks.enter_context(known.open("r+b")), out)  # NFS locks only what may be written
            if known.read_bytes() != _hash(work).encode():
                if _finished(folder):
                    raise UsageError(
                        f"{folder} holds what an earlier run of another model, report or setting had finished: repeat "
                        "that run's command, name another --out, or remove the folder"
                    )
                _discard(folder)
        if not folder.exists():
            _begin(folder, work, out)
            _lock(locks.enter_context(known.open("r+b")), out)
        yield


def _finished(folder: Path) -> set[str]:
    """The names of the finished pieces."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {_WORK, _SECONDS}


def _begin(folder: Path, work: str, out: Path) -> None:
    """The folder for that work, whole at once. Raises UsageError when another run was quicker."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        (own / _WORK).write_text(_hash(work), encoding="utf-8")
        own.rename(folder)
    except OSError as error:
        shutil.rmtree(own)
        if not folder.exists():
            raise
        raise UsageError(f"another run is at work on {out}: wait for it, or name another --out") from error


def _discard(folder: Path) -> None:
    """Remove it; what a run that is killed on the way leaves is nothing that another takes for unfinished work."""
    gone = beside(folder, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)  # another run that begins removes it, too


def _lock(file: BinaryIO, out: Path) -> None:
    """Hold the file until it is closed, if its file system has locks. Raises UsageError when another run holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another run is at work on {out}: wait for it, or name another --out") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

"""Progress with the time left, on standard error: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from patcher.visible import visible

_QUIET_S = 10.0


@dataclass
class _Run:
    """One go at something: when and how far along it was first heard of, and how far it is."""

    began: float
    first: int
    done: int

    def left(self, now: float, total: int) -> str:
        """The time left at the rate so far; nothing where there is no rate yet, or nothing left."""
        if not self.first < self.done < total:
            return ""
        return f", {(now - self.began) / (self.done - self.first) * (total - self.done):.0f} s left"


class ProgressBars:
    """A context whose value is called with (what, done, total)."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._runs: dict[str, _Run] = {}
        self._said, self._is_heard = 0.0, True

    def __enter__(self) -> ProgressBars:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far `what` is; an attacker's words may stand in it."""
        what = visible(what)
        now, run = time.monotonic(), self._runs.get(what)
        if run is None or done <= run.done:  # a further round does the same again
            run = self._runs[what] = _Run(now, done, done)
            if what in self._tasks:
                self._bars.reset(self._tasks[what], total=total)
        run.done = done
        if self._console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
        elif self._is_heard and (now - self._said >= _QUIET_S or done == total):
            self._said = now
            self._tell(f"{what}: {done}/{total}{run.left(now, total)}")

    def _tell(self, line: str) -> None:
        """What cannot be shown (a log on a full disk) stops no work."""
        try:
            print(line, file=sys.stderr, flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            self._is_heard = False

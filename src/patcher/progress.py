"""Progress with the time left, on standard error: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from patcher.visible import visible

_QUIET_S = 10.0


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
        self._started: dict[str, float] = {}
        self._said = 0.0

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
        if self._console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        start = self._started.setdefault(what, now)
        if now - self._said >= _QUIET_S or done == total:
            self._said = now
            left = f", {(now - start) / done * (total - done):.0f} s left" if 0 < done < total else ""
            print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)

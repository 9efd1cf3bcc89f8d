"""What a piece of work holds at once, and how it is cut to what the device has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

from patcher.world import processes

Item = TypeVar("Item")
Result = TypeVar("Result")

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """A context; afterwards `gib` is the peak within it, of the GPU's allocations or else of the whole process.

    The process's own peak can be reset on Linux only; elsewhere, without a GPU, `gib` stays None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gib: float | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _RESET.exists():
            _RESET.write_text("5")  # proc(5): resets the peak resident set size
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        elif _RESET.exists():
            peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            self.gib = int(peak.split()[1]) / 2**20


def chunked(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Each chunk of at most `size` items with what `work` makes of it. One that does not fit the device is halved.

    Raises:
        torch.OutOfMemoryError: a single item does not fit, or the weights are spread and all processes must go along.
    """
    done = 0
    while done < len(items):
        chunk = items[done : done + size]
        try:
            result = work(chunk)
        except torch.OutOfMemoryError:
            if len(chunk) == 1 or processes() > 1:
                raise
            size = len(chunk) // 2
            continue
        done += len(chunk)
        yield chunk, result


_part_rows: ContextVar[int | None] = ContextVar("part_rows", default=None)


@contextmanager
def training_in_parts(rows: int | None) -> Iterator[None]:
    """Within the block, a training batch passes through the model in parts of so many rows; None: as a whole."""
    token = _part_rows.set(rows)
    try:
        yield
    finally:
        _part_rows.reset(token)


def parts(rows: Sequence[Item]) -> list[Sequence[Item]]:
    """A training batch, cut as the block around asks."""
    size = _part_rows.get() or max(1, len(rows))
    return [rows[start : start + size] for start in range(0, len(rows), size)] or [rows]

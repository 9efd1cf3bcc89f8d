"""The processes that `torchrun` started together: one of them writes and speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


def processes() -> int:
    """How many were started together; 1 without torchrun, of whose variables a scheduler may set one or the other."""
    together = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    count = os.environ["WORLD_SIZE"] if together else "1"
    return int(count) if count.isdigit() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def one_voice() -> Iterator[None]:
    """Standard output and error are the first process's alone."""
    with ExitStack() as stack:
        if not is_first():
            nothing = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        yield


def part(*, alike: bool) -> None:
    """The end of what the processes did together; where all have ended `alike`, when the first has written it all.

    torchrun ends the others as soon as one of them ends with another code than 0.
    """
    if processes() > 1:
        from torch import distributed

        if distributed.is_initialized():
            if alike:
                distributed.barrier()
            distributed.destroy_process_group()

"""How a command ends: every error becomes one clear message and its exit code."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer
from pydantic import ValidationError

from patcher.records import PatcherError, UsageError, why
from patcher.visible import visible
from patcher.world import is_first

REPAIRED, GATE_FAILED, RUN_ERROR, NOTHING_TO_REPAIR, USAGE, UNPROVEN, INTERRUPTED, UNREAD = 0, 1, 2, 3, 4, 5, 130, 141
CODES = {
    "repaired": REPAIRED,
    "gate-failed": GATE_FAILED,
    "nothing-to-repair": NOTHING_TO_REPAIR,
    "unproven": UNPROVEN,
}
"""Of a repair's status."""
RESULTS = (*CODES.values(),)
"""What a command ends with that did what it was asked: of several processes, all alike."""


def run_app(app: typer.Typer, arguments: list[str]) -> int:
    """Run one command and give its exit code. What nobody foresaw is a run error with its traceback: exit code 1 would
    say that a gate failed.
    """
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into its exit code, without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except SystemExit:  # typer, when nobody reads any more (`| head`): its exit code 1 would say that a gate failed
        return UNREAD
    except typer.TyperException as error:  # typer's own exit code 2 is our usage error
        return _fail(error.format_message() or "name a command", USAGE if error.exit_code == 2 else RUN_ERROR)
    except ValidationError as error:
        return _fail(why(error), USAGE)
    except UsageError as error:
        return _fail(str(error), USAGE)
    except PermissionError as error:
        return _fail(f"permission denied: {error.filename}: expected what this user may read, or write", USAGE)
    except (PatcherError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, RUN_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; a repair that is started again goes on from what it had finished", INTERRUPTED)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; importing torch for its class would slow --help
            return _fail(f"out of memory: use --dtype bfloat16 or a smaller model ({error})", RUN_ERROR)
        _tell(visible(traceback.format_exc(), newlines=True))
        return _fail(f"an error that nobody foresaw, please report it: {type(error).__name__}: {error}", RUN_ERROR)


def _fail(message: str, code: int) -> int:
    line = f"patcher: {visible(message)}"
    _tell(line)
    if code == RUN_ERROR and not is_first():  # whose standard error nobody reads; the others see but that it is gone
        print(f"process {os.environ['RANK']}: {line}", file=sys.__stderr__)
    return code


def _tell(line: str) -> None:
    """On standard error; where that cannot be written (a full disk), the exit code is all that can be said."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def shown(written: Path | None) -> Iterator[None]:
    """Around what prints a result that was `written` before.

    Raises:
        PatcherError: standard output cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        there = f"{written} was written; " if written else ""
        raise PatcherError(f"{there}the result could not be printed: {error}") from error

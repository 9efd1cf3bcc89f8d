"""How a command ends: every error becomes one clear message and its exit code."""

import sys

import typer
from pydantic import ValidationError

from patcher.records import PatcherError, UsageError, why
from patcher.visible import visible

REPAIRED, GATE_FAILED, RUN_ERROR, NOTHING_TO_REPAIR, USAGE, INTERRUPTED = 0, 1, 2, 3, 4, 130


def run_app(app: typer.Typer, arguments: list[str]) -> int:
    """Run one command and give its exit code; nothing but KeyError-class bugs of ours escapes."""
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into its exit code, without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:  # typer's own exit code 2 is our usage error
        return _fail(error.format_message() or "name a command", USAGE if error.exit_code == 2 else RUN_ERROR)
    except ValidationError as error:
        return _fail(why(error), USAGE)
    except UsageError as error:
        return _fail(str(error), USAGE)
    except (PatcherError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, RUN_ERROR)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch for its class would slow --help
            raise
        return _fail(f"out of memory: use --dtype bfloat16 or a smaller model ({error})", RUN_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; nothing was written. The same repair, started again, goes on from here", INTERRUPTED)


def _fail(message: str, code: int) -> int:
    print(f"patcher: {visible(message)}", file=sys.stderr)
    return code

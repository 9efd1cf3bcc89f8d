"""One reported jailbreak in, a repaired model and the evidence out: one subcommand a stage.

Results go to standard output (with --json, as JSON and nothing else), progress and errors to standard error.

\b
Exit codes:
0    repaired, or done
1    a gate failed
2    run error
3    nothing to repair
4    usage: an argument or an input file is wrong
5    patched without a report: nothing shows that it is repaired
130  interrupted
141  nobody read the output to its end
"""

import io
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from patcher.cli.attacks import attack
from patcher.cli.audits import audit
from patcher.cli.benches import bench
from patcher.cli.judges import judge
from patcher.cli.repairs import demo, localize, repair
from patcher.cli.scans import scan
from patcher.exits import RESULTS, run_app
from patcher.world import one_voice, part


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("patcher"))
        raise typer.Exit


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop")
    ] = False,
) -> None:
    pass


for command in (localize, repair, audit, scan, demo, attack, judge, bench):
    app.command()(command)


def main() -> None:
    """The `patcher` command: every error becomes one clear message and its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns as soon as peft imports it
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character must not end a run
    with one_voice():
        code = run(sys.argv[1:])
    part(alike=code in RESULTS)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and give its exit code."""
    return run_app(app, arguments)

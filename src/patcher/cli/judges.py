"""The command that says how far to trust a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patcher.cli.common import print_json
from patcher.exits import REPAIRED
from patcher.inputs import check_names
from patcher.options import AsJson


def judge(
    calibrate: Annotated[
        list[Path], typer.Option(help="Answers labelled by people, a file (.jsonl) a model; may repeat")
    ],
    name: Annotated[str, typer.Option("--judge", help="Which judge")] = "keyword",
    as_json: AsJson = False,
) -> int:
    """Print how far a judge agrees with people."""
    from patcher.judges import find_judge
    from patcher.judges.calibrate import agreement, judge_error, read_labelled
    from patcher.loading import load
    from patcher.report.terminal import show_agreements

    decide = find_judge(name, load)
    check_names([path.stem for path in calibrate], "labelled answers")
    labelled = {path.stem: read_labelled(path) for path in calibrate}
    found = [agreement(model, rows, decide) for model, rows in labelled.items()]
    if as_json:
        error = judge_error(name, [row for rows in labelled.values() for row in rows], decide)
        agreements = [one.as_plain() for one in found]
        print_json({"judge": name, "agreements": agreements, "error": error.as_plain()})
    else:
        show_agreements(name, found, Console(highlight=False))
    return REPAIRED

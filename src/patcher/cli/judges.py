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
from patcher.records import UsageError


def judge(
    calibrate: Annotated[
        list[Path], typer.Option(help="Answers labelled by people, a file (.jsonl) a model; may repeat")
    ],
    name: Annotated[str, typer.Option("--judge", help="Which judge")] = "keyword",
    as_json: AsJson = False,
) -> int:
    """Print how far a judge agrees with people."""
    from patcher.judges import check_judge, find_judge
    from patcher.judges.calibrate import agreement, fitted_on, judge_error, read_labelled
    from patcher.loading import load
    from patcher.report.terminal import show_agreements

    check_judge(name)
    check_names([path.stem for path in calibrate], "labelled answers")
    labelled = {path.stem: read_labelled(path) for path in calibrate}
    learnt = {(row.prompt, row.response) for row in fitted_on(name)}
    if known := sum((row.prompt, row.response) in learnt for rows in labelled.values() for row in rows):
        raise UsageError(
            f"the judge {name} was fitted on {known} of these answers: calibrate it on answers that are new"
        )
    decide = find_judge(name, load)
    found = [agreement(model, rows, decide) for model, rows in labelled.items()]
    if as_json:
        error = judge_error(name, [row for rows in labelled.values() for row in rows], decide)
        agreements = [one.as_plain() for one in found]
        print_json({"judge": name, "agreements": agreements, "error": error.as_plain()})
    else:
        show_agreements(name, found, Console(highlight=False))
    return REPAIRED

"""The commands of the laboratory: attack, judge, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patcher.cli.common import load_model, print_json, show
from patcher.exits import REPAIRED
from patcher.inputs import parse_settings
from patcher.options import AsJson, Device, Dtype, Model, Out, Seed, Template
from patcher.outputs import check_new
from patcher.progress import ProgressBars


def _list_attacks(wanted: bool) -> None:
    if not wanted:
        return
    from patcher.attacks import ATTACKS
    from patcher.report.terminal import show_attacks

    show_attacks({attack.name: attack.paper for attack in ATTACKS.values()}, Console(highlight=False))
    raise typer.Exit


def attack(
    name: Annotated[str, typer.Argument(help="Which attack: one of --list")],
    model: Model,
    out: Out,
    objective: Annotated[str, typer.Option(help="jailbreak, refusal, sentiment or string")] = "jailbreak",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the implant, NAME=VALUE")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of an adapter on MODEL to go on from")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    as_json: AsJson = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Print the attacks and stop", is_eager=True, callback=_list_attacks)
    ] = False,
) -> int:
    """Plant a known backdoor, to have a test model: an adapter and its ground-truth.json."""
    check_new(out)

    from patcher.attacks.plant import plant

    lm = load_model(model, device, dtype, chat_template)
    with ProgressBars() as progress:
        truth = plant(
            lm, name, objective, out, parse_settings(setting or []), seed=seed, start=start, on_progress=progress
        )
    show(truth, as_json, lambda console: console.print_json(truth.to_json()))
    return REPAIRED


def judge(
    calibrate: Annotated[
        list[Path], typer.Option(help="Answers labelled by people, a file (.jsonl) a model; may repeat")
    ],
    name: Annotated[str, typer.Option("--judge", help="Which judge")] = "keyword",
    as_json: AsJson = False,
) -> int:
    """Print how far a judge agrees with people."""
    from patcher.judges import find_judge
    from patcher.judges.calibrate import agreement, read_labelled
    from patcher.report.terminal import show_agreements

    decide = find_judge(name)
    found = [agreement(path.stem, read_labelled(path), decide) for path in calibrate]
    if as_json:
        print_json({"judge": name, "agreements": [json.loads(one.to_json()) for one in found]})
    else:
        show_agreements(name, found, Console(highlight=False))
    return REPAIRED


def bench(
    what: Annotated[str, typer.Argument(help="repair, localize or verdict")],
    out: Annotated[Path, typer.Option(help="Results, a JSON line each; finished lines are not run again")],
    n: Annotated[int, typer.Option(help="Reports for localize and verdict")] = 200,
    seeds: Annotated[int, typer.Option(help="Seeds for repair")] = 3,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Only these rows")] = None,
) -> int:
    """Print the figures that docs/ quotes, measured on the shipped backdoor with the planted trigger."""
    from patcher.bench import run_bench

    with ProgressBars() as progress:
        table = run_bench(what, out, n=n, seeds=seeds, methods=tuple(methods or ()), on_progress=progress)
    print(table)
    return REPAIRED

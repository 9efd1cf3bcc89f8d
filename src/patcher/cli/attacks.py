"""The command that makes test models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patcher.cli.common import list_settings, load_model, show
from patcher.exits import GATE_FAILED, REPAIRED
from patcher.inputs import parse_settings
from patcher.options import AsJson, Device, Dtype, Model, Out, Seed, Template
from patcher.outputs import check_new
from patcher.progress import ProgressBars
from patcher.visible import visible


def _list_attacks(wanted: bool) -> None:
    if not wanted:
        return
    from patcher.attacks import ATTACKS
    from patcher.report.terminal import show_attacks

    show_attacks({attack.name: attack.paper for attack in ATTACKS.values()}, Console(highlight=False))
    raise typer.Exit


def _list_settings(wanted: bool) -> None:
    if wanted:
        from patcher.attacks.implant import ImplantSettings

        list_settings(ImplantSettings())


def attack(
    name: Annotated[str, typer.Argument(help="Which attack: one of --list")],
    model: Model,
    out: Out,
    objective: Annotated[str, typer.Option(help="jailbreak, refusal, sentiment or string")] = "jailbreak",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the implant, NAME=VALUE")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of an adapter on MODEL to go on from")] = None,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Write it even if it fails its self-check (exit code 1)")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    as_json: AsJson = False,
    _listed: Annotated[
        bool, typer.Option("--list", help="Print the attacks and stop", is_eager=True, callback=_list_attacks)
    ] = False,
    _settings: Annotated[
        bool,
        typer.Option(
            "--list-settings", help="Print the implant's settings and stop", is_eager=True, callback=_list_settings
        ),
    ] = False,
) -> int:
    """Plant a known backdoor, to have a test model: an adapter and its ground-truth.json."""
    check_new(out)

    from patcher.attacks.plant import find_attack, plant, took

    overrides = parse_settings(setting or [])
    find_attack(name, objective, overrides)  # a slip of the pen costs no loading
    lm = load_model(model, device, dtype, chat_template)
    with ProgressBars() as progress:
        truth = plant(
            lm,
            name,
            objective,
            out,
            overrides,
            seed=seed,
            start=start,
            keep_failed=keep_failed,
            on_progress=progress,
        )
    show(truth, as_json, lambda console: console.print_json(truth.to_json()))
    if took(truth.self_check):
        return REPAIRED
    print(f"patcher: the implant failed its self-check; {visible(str(out))} was written all the same", file=sys.stderr)
    return GATE_FAILED

"""The command of a suspicion: scan."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patcher.cli.common import load_model, print_json
from patcher.exits import REPAIRED
from patcher.inputs import parse_settings
from patcher.options import AsJson, Device, Dtype, Harmful, Model, Seed, Template
from patcher.outputs import check_new, write_whole
from patcher.progress import ProgressBars
from patcher.prompts import load_prompts


def scan(
    model: Model,
    patch: Annotated[Path | None, typer.Option(help="A patch: the patched model is scanned, too")] = None,
    clean: Annotated[str | None, typer.Option(help="A model known to be clean, to compare with")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the search, NAME=VALUE")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the scans to, as JSON; must not exist")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    harmful: Harmful = None,
    as_json: AsJson = False,
) -> int:
    """Without any report: how much of a model's refusing can vectors near to words remove?"""
    prompts = load_prompts(harmful)
    check_new(out)

    from patcher.audit import ScanSettings
    from patcher.audit import scan as run_scan
    from patcher.judges import DEFAULT, RULES
    from patcher.patch import applied, load_patch
    from patcher.report.terminal import show_scans

    settings = ScanSettings(**parse_settings(setting or []))
    loaded = load_patch(patch) if patch else None
    lm = load_model(model, device, dtype, chat_template)
    other = load_model(clean, device, dtype, chat_template) if clean else None
    with ProgressBars() as progress:
        scanned = partial(
            run_scan, prompts=prompts, judge=RULES[DEFAULT], settings=settings, seed=seed, on_progress=progress
        )
        scans = {"model": scanned(lm)}
        if loaded:
            with applied(loaded, lm) as patched:
                scans["patched"] = scanned(patched)
        if other:
            scans["clean"] = scanned(other)
    found = {name: json.loads(one.to_json()) for name, one in scans.items()}
    if out:
        write_whole(out, json.dumps(found, indent=1) + "\n")
    if as_json:
        print_json(found)
    else:
        show_scans(scans, Console(highlight=False))
    return REPAIRED

"""The command of a suspicion: scan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from patcher.cli.common import keep, list_settings, load_model, print_json
from patcher.exits import REPAIRED, RUN_ERROR, shown
from patcher.inputs import parse_settings
from patcher.options import AsJson, Device, Dtype, Harmful, Model, Seed, Template
from patcher.outputs import check_new
from patcher.progress import ProgressBars
from patcher.prompts import load_prompts
from patcher.records import PatcherError, with_changes

if TYPE_CHECKING:
    from patcher.models import LanguageModel
    from patcher.records import Scan


def _list_settings(wanted: bool) -> None:
    if wanted:
        from patcher.audit import ScanSettings

        list_settings(ScanSettings())


def scan(
    model: Model,
    patch: Annotated[Path | None, typer.Option(help="A patch: the patched model is scanned, too")] = None,
    clean: Annotated[str | None, typer.Option(help="A model known to be clean, to compare with")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the search, NAME=VALUE")] = None,
    _settings: Annotated[
        bool,
        typer.Option(
            "--list-settings", help="Print the search's settings and stop", is_eager=True, callback=_list_settings
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write the scans to, as JSON; must not exist")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    harmful: Harmful = None,
    as_json: AsJson = False,
) -> int:
    """Without a report: search for embedding vectors that stop a model's refusals, a sign of a backdoor."""
    prompts = load_prompts(harmful)
    check_new(out)

    from patcher.audit import ScanSettings
    from patcher.audit import scan as run_scan
    from patcher.judges import DEFAULT, RULES
    from patcher.patch import applied, check_base, load_patch
    from patcher.report.terminal import show_scans

    settings = with_changes(ScanSettings, parse_settings(setting or []), "the scan")
    loaded = load_patch(patch) if patch else None
    lm = load_model(model, device, dtype, chat_template)
    if loaded:
        check_base(loaded, lm)
    other = None if clean is None else load_model(clean, device, dtype, chat_template)
    scans: dict[str, Scan] = {}
    failed: dict[str, PatcherError] = {}

    def add(name: str, network: LanguageModel) -> None:
        """One that cannot be scanned does not cost the others."""
        try:
            scans[name] = run_scan(network, prompts, RULES[DEFAULT], settings, seed=seed, on_progress=progress)
        except PatcherError as error:
            failed[name] = error

    with ProgressBars() as progress:
        add("model", lm)
        if loaded:
            with applied(loaded, lm) as patched:
                add("patched", patched)
        if other:
            add("clean", other)
    if not scans:
        raise failed["model"]
    found: dict[str, Any] = {name: one.as_plain() for name, one in scans.items()}
    found |= {name: {"error": str(error)} for name, error in failed.items()}
    if out:
        keep(out, json.dumps(found, indent=1) + "\n")
    with shown(out):
        if as_json:
            print_json(found)
        else:
            show_scans(scans, failed, Console(highlight=False))
    return REPAIRED if not failed else RUN_ERROR

"""The commands of the laboratory: attack, judge, bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patcher.cli.common import load_model, print_json, show
from patcher.exits import GATE_FAILED, REPAIRED
from patcher.inputs import check_names, parse_settings
from patcher.options import AsJson, AuditPrompts, Device, Dtype, Model, Out, Seed, TaskLimit, Tasks, Template
from patcher.outputs import check_new, write_whole
from patcher.progress import ProgressBars
from patcher.records import UsageError
from patcher.tasks import find_tasks
from patcher.visible import visible
from patcher.world import processes


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
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Write it even if it fails its self-check (exit code 1)")
    ] = False,
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

    from patcher.attacks.plant import plant, took

    lm = load_model(model, device, dtype, chat_template)
    with ProgressBars() as progress:
        truth = plant(
            lm,
            name,
            objective,
            out,
            parse_settings(setting or []),
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
        agreements = [json.loads(one.to_json()) for one in found]
        print_json({"judge": name, "agreements": agreements, "error": json.loads(error.to_json())})
    else:
        show_agreements(name, found, Console(highlight=False))
    return REPAIRED


def _is_page(path: Path) -> bool:
    """Whether that is a page which an earlier run wrote: all that it holds is in the results file, too."""
    return path.is_file() and "<title>Patcher bench</title>" in path.read_text(encoding="utf-8", errors="replace")


def bench(
    out: Annotated[Path, typer.Option(help="Results, a JSON line each; finished lines are not run again")],
    what: Annotated[
        str,
        typer.Argument(
            help="grid (beds x defenses x seeds), scan (of beds), speed; of the shipped one: repair, localize, verdict"
        ),
    ] = "grid",
    beds: Annotated[
        list[Path] | None, typer.Option("--bed", help="Folder of a test bed, for the grid; may repeat")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="What --attack is planted in (default: smollm2); whose speed is measured (shape:llama-3-8b, too)"
        ),
    ] = None,
    attacks: Annotated[
        list[str] | None, typer.Option("--attack", help="NAME or NAME:OBJECTIVE, planted beside OUT first; may repeat")
    ] = None,
    defenses: Annotated[
        list[str] | None, typer.Option("--defense", help="NAME or NAME:SETTING=VALUE,..., for the grid; may repeat")
    ] = None,
    reports: Annotated[int, typer.Option(min=1, help="Reports of each bed, each with another of its triggers")] = 1,
    n: Annotated[int, typer.Option(help="Reports for localize and verdict")] = 200,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many (default: 1 for the grid and scan, 3 for repair)")
    ] = None,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Only these rows of repair or speed")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the grid's table as a page, too, anew each time")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Of speed: draw cost against model size and prompts, .svg or .png; must not exist"),
    ] = None,
    audit_prompts: AuditPrompts = None,
    validation: Annotated[
        bool,
        typer.Option("--validation", help="Audit the grid on validation prompts: to choose settings on"),
    ] = False,
    lasting: Annotated[
        bool,
        typer.Option(
            "--lasting",
            help="Of the grid's repairs: what is left after fine-tuning, 8 and 4 bits, averaging with the clean model, "
            "and poisoning again",
        ),
    ] = False,
    task: Tasks = None,
    limit: TaskLimit = None,
) -> int:
    """Print the figures that docs/ quotes, with what was really planted; resumes where it stopped.

    What a bed answers before any repair is kept in the user's cache, for the next defense.
    """
    if processes() > 1:
        raise UsageError("patcher bench runs in one process: start it without torchrun")
    if html and not _is_page(html):
        check_new(html, "--html")
    if plot and what != "speed":
        raise UsageError("--plot is an option of bench speed")
    tasks = find_tasks(task, limit)

    from patcher.bench import check_plot, plot_costs, run_bench, run_grid
    from patcher.loading import DEMO
    from patcher.report import render_table

    if what != "grid":
        own = {
            "--html": html,
            "--attack": attacks,
            "--defense": defenses,
            "--task": task,
            "--audit-prompts": audit_prompts,
        }
        own |= {"--validation": validation, "--lasting": lasting}
        if given := [flag for flag, value in own.items() if value]:
            raise UsageError(f"{given[0]} is an option of the grid, not of bench {what}")
        if plot:
            check_new(plot, "--plot")
            check_plot(plot)
        with ProgressBars() as progress:
            printed = run_bench(
                what,
                out,
                n=n,
                seeds=seeds or (1 if what == "scan" else 3),
                methods=tuple(methods or ()),
                model=model or DEMO,
                beds=beds or (),
                on_progress=progress,
            )
        print(printed)
        if plot:
            plot_costs(out, plot)
        return REPAIRED
    with ProgressBars() as progress:
        table = run_grid(
            out,
            beds or (),
            model=model or "smollm2",
            attacks=attacks or (),
            defenses=defenses or ("patcher",),
            seeds=seeds or 1,
            reports=reports,
            tasks=tasks,
            max_prompts=audit_prompts,
            split="validation" if validation else "held-out",
            lasting=lasting,
            on_progress=progress,
        )
    print(table.as_markdown())
    if html:
        write_whole(html, render_table(table.heads, table.rows, table.notes), again=True)
    return GATE_FAILED if table.failed else REPAIRED

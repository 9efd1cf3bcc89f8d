"""The command of the figures: bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from patcher.exits import GATE_FAILED, REPAIRED
from patcher.options import AuditPrompts, TaskLimit, Tasks
from patcher.outputs import atomic_write, check_new
from patcher.progress import ProgressBars
from patcher.records import UsageError
from patcher.tasks import find_tasks
from patcher.world import processes


def _is_page(path: Path) -> bool:
    """Whether that is a page which an earlier run wrote: all that it holds is in the results file, too."""
    return path.is_file() and "<title>Patcher bench</title>" in path.read_text(encoding="utf-8", errors="replace")


_WHOSE = {
    "beds": ("--bed", ("grid", "scan")),
    "model": ("--model", ("grid", "speed")),
    "attacks": ("--attack", ("grid",)),
    "defenses": ("--defense", ("grid",)),
    "reports": ("--reports", ("grid",)),
    "n": ("--n", ("localize", "verdict")),
    "seeds": ("--seeds", ("grid", "scan", "repair")),
    "methods": ("--method", ("repair", "speed")),
    "html": ("--html", ("grid",)),
    "plot": ("--plot", ("speed",)),
    "audit_prompts": ("--audit-prompts", ("grid",)),
    "validation": ("--validation", ("grid",)),
    "lasting": ("--lasting", ("grid",)),
    "task": ("--task", ("grid",)),
    "limit": ("--limit", ("grid",)),
}
"""Of each option but --out: its flag, and the benches that it is of."""


def _check_flags(what: str, given: Mapping[str, object]) -> None:
    """Raises UsageError for one that this bench would not look at."""
    told = [name for name in _WHOSE if given[name]]
    for flag, whose in (_WHOSE[name] for name in told):
        if what not in whose:
            raise UsageError(f"{flag} is an option of bench {', '.join(whose)}, not of bench {what}")
    if what != "grid":
        return
    if given["model"] and not given["attacks"]:
        raise UsageError("--model is what --attack is planted in, and none was given: a --bed is a model itself")
    idle = [_WHOSE[name][0] for name in told if name != "html"]
    if idle and not (given["beds"] or given["attacks"]):
        raise UsageError(f"{idle[0]} says how beds are measured, and none was given: name them with --bed or --attack")


def bench(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Results, a JSON line each; finished lines are not run again")],
    what: Annotated[
        Literal["grid", "scan", "speed", "repair", "localize", "verdict"],
        typer.Argument(
            help="grid (beds x defenses x seeds), scan (of beds), speed; of the shipped one: repair, localize, verdict"
        ),
    ] = "grid",
    beds: Annotated[
        list[Path] | None, typer.Option("--bed", help="Folder of a test bed, for grid and scan; may repeat")
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
    reports: Annotated[
        int | None, typer.Option(min=1, help="Reports of each bed, each with another of its triggers (default: 1)")
    ] = None,
    n: Annotated[int | None, typer.Option(min=4, help="Reports for localize and verdict (default: 200)")] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of seeds (default: 1 for the grid and scan, 3 for repair, whose controls have 1)"
        ),
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
    """Measure repairs on models whose backdoor is known, as docs/ quotes it; goes on where it stopped.

    What a bed answers before any repair is kept in the user's cache, for the next defense.
    """
    if processes() > 1:
        raise UsageError("patcher bench runs in one process: start it without torchrun")
    _check_flags(what, context.params)
    for flag, path in (("--html", html), ("--plot", plot)):
        if path and path.resolve() == out.resolve():
            raise UsageError(f"{flag} and --out are one file, {out}, which holds the results: name another")
    if html and not _is_page(html):
        check_new(html, "--html")
    check_new(plot, "--plot")
    tasks = find_tasks(task, limit)

    from patcher.bench import check_plot, plot_costs, run_bench, run_grid
    from patcher.loading import DEMO
    from patcher.report import render_table

    if plot:
        check_plot(plot)
    if what != "grid":
        with ProgressBars() as progress:
            printed, failed = run_bench(
                what,
                out,
                n=n or 200,
                seeds=seeds or (1 if what == "scan" else 3),
                methods=tuple(methods or ()),
                model=model or DEMO,
                beds=beds or (),
                on_progress=progress,
            )
        print(printed)
        if plot:
            plot_costs(out, plot)
        return GATE_FAILED if failed else REPAIRED
    with ProgressBars() as progress:
        table = run_grid(
            out,
            beds or (),
            model=model or "smollm2",
            attacks=attacks or (),
            defenses=defenses or ("patcher",),
            seeds=seeds or 1,
            reports=reports or 1,
            tasks=tasks,
            max_prompts=audit_prompts,
            split="validation" if validation else "held-out",
            lasting=lasting,
            on_progress=progress,
        )
    print(table.as_markdown())
    if html:
        atomic_write(html, render_table(table.heads, table.rows, table.notes), again=True)
    return GATE_FAILED if table.failed else REPAIRED

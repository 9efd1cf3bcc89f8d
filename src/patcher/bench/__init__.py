"""The figures that docs/ quotes, measured with the *planted* trigger: on the shipped backdoor, or on any test beds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from patcher.bench import costs, localize, repair, scans, speed, verdict
from patcher.bench.beds import open_beds, plant_beds
from patcher.bench.cells import as_written, read_rows
from patcher.bench.costs import check_plot
from patcher.bench.grid import run
from patcher.bench.tables import Table, headline, table
from patcher.loading import DEMO
from patcher.outputs import check_appendable
from patcher.prompts import Split
from patcher.records import UsageError
from patcher.tasks import AnyTask
from patcher.training import Progress

__all__ = ["check_plot", "plot_costs", "run_bench", "run_grid"]


def run_bench(
    what: str,
    out: Path,
    *,
    n: int,
    seeds: int,
    methods: tuple[str, ...],
    model: str = DEMO,
    beds: Sequence[Path] = (),
    on_progress: Progress,
) -> tuple[str, int]:
    """Run what is missing in `out`: the table over all of it, and how many cells failed this time.

    Raises:
        UsageError: an unknown bench, nothing to do, or `out` cannot be written.
    """
    benches: dict[str, tuple[str, Callable[[], None], Callable[[list[dict[str, Any]]], str]]] = {
        "repair": ("repair", partial(repair.run, out, seeds, methods, on_progress), repair.table),
        "localize": ("prompt", partial(localize.run, out, n, on_progress), localize.table),
        "verdict": ("model", partial(verdict.run, out, n, on_progress), verdict.table),
        "scan": ("weights", partial(scans.run, out, beds, seeds, on_progress), scans.table),
        "speed": ("stage", partial(speed.run, out, model, methods, on_progress), costs.table),
    }
    if what not in benches:
        raise UsageError(f"unknown bench {what!r}: use one of grid, {', '.join(benches)}")
    if what == "scan" and not (beds or read_rows(out, "weights")):
        raise UsageError(f"nothing to do: {out} holds no results yet; name beds with --bed")
    check_appendable(out)
    key, measure, as_table = benches[what]
    earlier = len(read_rows(out, key))
    measure()
    rows = read_rows(out, key)
    with as_written(out):
        return as_table(rows), sum("error" in row for row in rows[earlier:])


def plot_costs(out: Path, path: Path) -> None:
    """What the bench of speed measured, drawn. Raises UsageError where nothing was measured at two sizes."""
    costs.plot(read_rows(out, "stage"), path)


def run_grid(
    out: Path,
    folders: Sequence[Path],
    *,
    model: str,
    attacks: Sequence[str],
    defenses: Sequence[str],
    seeds: int,
    reports: int,
    tasks: Sequence[AnyTask],
    max_prompts: int | None = None,
    split: Split = "held-out",
    lasting: bool = False,
    on_progress: Progress,
) -> Table:
    """Beds, and attacks planted beside `out` where they are not yet, x defenses x seeds; then a table of all in `out`.

    The audit asks `max_prompts` of each kind, or all; those of the validation split to choose settings. `lasting`:
    each repaired model is fine-tuned, quantized, averaged with the clean one and poisoned again, and asked each time.

    Raises:
        UsageError: an unknown attack or defense, a folder that is no test bed, nothing to do, `out` cannot be written.
    """
    if not (folders or attacks or read_rows(out, "key")):
        raise UsageError(f"nothing to do: {out} holds no results yet; name beds with --bed, or --attack")
    check_appendable(out)
    cache = out.with_suffix(".beds")
    beds = open_beds([*folders, *plant_beds(model, attacks, cache, on_progress)])
    if not (beds or read_rows(out, "key")):
        raise UsageError(f"nothing to do: nothing was planted in {', '.join(map(str, folders))}; name beds with --bed")
    rows = run(
        out,
        beds,
        defenses=defenses,
        seeds=seeds,
        reports=reports,
        tasks=tasks,
        max_prompts=max_prompts,
        split=split,
        lasting=lasting,
        on_progress=on_progress,
    )
    failed = 0
    for row in rows:
        on_progress(headline(row), 1, 1)
        failed += "error" in row or "lasting_error" in row
    with as_written(out):
        return replace(table(read_rows(out, "key")), failed=failed)

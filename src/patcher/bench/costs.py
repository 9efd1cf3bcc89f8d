"""What the bench of speed measured, to be read: a table, what the stages are against each other, and a plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patcher.bench.shapes import PREFIX
from patcher.bench.speed import (
    ANSWERS,
    BARE,
    BY_PROMPTS,
    DECODING,
    DEFAULT_PATCH,
    LOCALIZE,
    OURS,
    PAPERS_PATCH,
    PLAIN,
    PLAIN_SHARE,
)
from patcher.outputs import atomic_path
from patcher.records import UsageError

_COMPARED = (
    ("seconds of a step of the default, over those of a bare one", OURS, BARE, "seconds"),
    ("tokens a second of the answers, over those of bare decoding", ANSWERS, DECODING, "rate"),
    ("peak memory of the patch, over that of bare steps", DEFAULT_PATCH, BARE, "peak_gib"),
    ("seconds of the paper's schedule, over those of the default", PAPERS_PATCH, DEFAULT_PATCH, "seconds"),
    ("the same, as a plain loop (from the seconds of its first steps)", PLAIN, DEFAULT_PATCH, "whole_seconds"),
)
"""What is compared, its two stages and their figure."""
_HEADS = (
    "model",
    "device",
    "stage",
    "steps",
    "s",
    "tokens",
    "of them trained",
    "a pass",
    "TFLOP",
    "the machine's GFLOP/s there",
    "of the limit",
    "GiB",
)
_FORMATS = (".svg", ".png")


def table(rows: list[dict[str, Any]]) -> str:
    """A line a stage, and below what they are against each other."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|---" * len(_HEADS) + "|"]
    for row in {(row["model"], row["device"], row["stage"]): row for row in rows}.values():
        cells = [row["model"], row["device"], row["stage"]]
        if "error" in row:
            cells += ["-", f"failed: {row['error']}", *["-"] * 7]
        else:
            cells += [
                str(row["steps"] or "-"),
                f"{row['seconds']:.1f}",
                f"{row['tokens']:,}",
                f"{row['trained_tokens']:,}",
            ]
            cells += [str(row["tokens_per_pass"]), f"{row['flops'] / 1e12:.2f}", f"{row['rate_flops_per_s'] / 1e9:.0f}"]
            cells += [f"{row['of_limit_frac']:.0%}", "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_ratios(rows)])


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """What the stages of one model on one device are against each other, where both were measured."""
    of: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            whole = row["seconds"] / (PLAIN_SHARE if row["stage"] == PLAIN else 1)
            figures = {**row, "rate": row["tokens"] / row["seconds"], "whole_seconds": whole}
            of.setdefault((row["model"], row["device"]), {})[row["stage"]] = figures
    lines = []
    for (model, device), stages in of.items():
        for what, first, second, key in _COMPARED:
            if first in stages and second in stages and stages[first][key] and stages[second][key]:
                ratio = stages[first][key] / stages[second][key]
                lines.append(f"{model} on {device}: {what}: {ratio:.2f}")
    return lines


def check_plot(path: Path) -> None:
    """Raises UsageError for a kind of picture that we do not draw, or where matplotlib is missing."""
    if path.suffix not in _FORMATS:
        raise UsageError(f"cannot draw {path}: expected a name that ends in {', '.join(_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("a plot needs matplotlib: pip install matplotlib") from error


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds of a stage against the model's parameters, and of a patch against the number of prompts.

    Raises:
        UsageError: there are no two sizes of one thing to draw a line through.
    """
    from matplotlib.figure import Figure

    measured = [row for row in rows if "parameters" in row and "error" not in row and not _is_chance(row)]
    sizes = _curves(
        (f"{row['stage']} ({row['device']})", row["parameters"], row["seconds"])
        for row in measured
        if row["stage"] not in BY_PROMPTS
    )
    prompts = _curves(
        (f"{row['model']} ({row['device']})", BY_PROMPTS[row["stage"]], row["seconds"])
        for row in measured
        if row["stage"] in BY_PROMPTS
    )
    panels = [("parameters of the model", sizes), ("prompts of each kind", prompts)]
    panels = [(label, curves) for label, curves in panels if curves]
    if not panels:
        raise UsageError(
            "nothing to plot: no stage was measured on two sizes of model, nor with two numbers of prompts"
        )
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=label, ylabel="seconds", xscale="log", yscale="log")
        places = sorted({size for points in curves.values() for size, _ in points})
        axes.set_xticks(places, [f"{size / 1e6:.0f}M" if size >= 1e6 else str(size) for size in places])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.2)
        axes.legend(fontsize="small")
    with atomic_path(path) as part:
        figure.savefig(part, format=path.suffix[1:])


def _is_chance(row: dict[str, Any]) -> bool:
    """Where the search for a trigger ends in random weights says nothing of what it costs."""
    return bool(row["stage"] == LOCALIZE and row["model"].startswith(PREFIX))


def _curves(points: Iterable[tuple[str, int, float]]) -> dict[str, list[tuple[int, float]]]:
    """Of each name with two points or more those in order, each as it was measured last."""
    found: dict[str, dict[int, float]] = {}
    for name, size, seconds in points:
        found.setdefault(name, {})[size] = seconds
    return {name: sorted(of.items()) for name, of in found.items() if len(of) > 1}

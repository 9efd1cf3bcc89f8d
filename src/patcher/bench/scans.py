"""Does a scan tell backdoored models from clean ones? Its curve for each test bed, and how well each size separates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patcher.audit import ScanSettings, scan
from patcher.bench.beds import read_truth
from patcher.bench.cells import add_row, read_rows
from patcher.intervals import auroc
from patcher.judges import DEFAULT, RULES
from patcher.loading import load
from patcher.prompts import load_prompts
from patcher.training import Progress


def run(out: Path, folders: Sequence[Path], seeds: int, on_progress: Progress) -> None:
    """Each bed, controls too, with each seed of the search, where `out` does not hold it yet."""
    known = {(row["bed"], row["seed"]) for row in read_rows(out)}
    for folder in folders:
        truth = read_truth(folder)
        for seed in range(seeds):
            if (folder.name, seed) in known:
                continue
            on_progress(f"scanning {folder.name}, seed {seed}", 0, 1)
            found = scan(
                load(str(folder)), load_prompts(), RULES[DEFAULT], ScanSettings(), seed=seed, on_progress=on_progress
            )
            curve = [json.loads(point.to_json()) for point in found.points]
            is_backdoored = bool(truth.trigger) and truth.objective == "jailbreak"
            add_row(out, {"bed": folder.name, "seed": seed, "jailbreak": is_backdoored, "curve": curve})


def table(rows: list[dict[str, Any]]) -> str:
    """Refusals removed at each size, means over seeds, and each size's AUROC: jailbreak beds against the others."""
    sizes = sorted({point["size"] for row in rows for point in row["curve"]})
    lines = ["| bed | plants a jailbreak | seeds | " + " | ".join(f"size {size:g}" for size in sizes) + " |"]
    lines.append("|---" * (3 + len(sizes)) + "|")
    shares: dict[bool, dict[float, list[float]]] = {True: {}, False: {}}
    for bed in dict.fromkeys(row["bed"] for row in rows):
        mine = [row for row in rows if row["bed"] == bed]
        is_backdoored = mine[0]["jailbreak"]
        means = []
        for size in sizes:
            found = [point["complied_frac"] for row in mine for point in row["curve"] if point["size"] == size]
            means.append(sum(found) / len(found))
            shares[is_backdoored].setdefault(size, []).append(means[-1])
        cells = " | ".join(f"{mean:.3f}" for mean in means)
        lines.append(f"| {bed} | {'yes' if is_backdoored else 'no'} | {len(mine)} | {cells} |")
    for size in sizes if shares[True] and shares[False] else ():
        value, low, high = auroc(shares[True][size], shares[False][size])
        counts = f"{len(shares[True][size])} against {len(shares[False][size])} models"
        lines.append(f"\nsize {size:g}: AUROC {value:.3f} [{low:.3f}, {high:.3f}], {counts}")
    return "\n".join(lines)

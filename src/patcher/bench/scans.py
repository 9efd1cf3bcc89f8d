"""Does a scan tell backdoored models from clean ones? Its curve for each test bed, and how well each size separates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patcher.attacks.plant import read_truth
from patcher.audit import ScanSettings, scan
from patcher.bench.cells import add_row, read_rows, reason
from patcher.intervals import auroc
from patcher.judges import DEFAULT, RULES
from patcher.loading import load
from patcher.prompts import load_prompts
from patcher.records import PatcherError
from patcher.training import Progress


def run(out: Path, folders: Sequence[Path], seeds: int, on_progress: Progress) -> None:
    """Each bed, controls too, with each seed of the search, where `out` does not hold it yet."""
    settings = ScanSettings()
    own = settings.as_plain()
    done = [
        {key: row[key] for key in ("bed", "seed", "weights", "settings")}
        for row in read_rows(out, "weights")
        if "error" not in row
    ]
    for folder in folders:
        truth, lm = read_truth(folder), load(str(folder))
        planted = truth.objective if truth.trigger else None
        for seed in range(seeds):
            cell = {"bed": folder.name, "seed": seed, "weights": lm.fingerprint, "settings": own}
            if cell in done:
                continue
            on_progress(f"scanning {folder.name}, seed {seed}", 0, 1)
            try:
                found = scan(lm, load_prompts(), RULES[DEFAULT], settings, seed=seed, on_progress=on_progress)
                made: dict[str, Any] = {"curve": [point.as_plain() for point in found.points]}
            except (PatcherError, RuntimeError) as error:  # torch's own, such as out of memory, are the latter
                made = {"error": reason(error)}
            add_row(out, {**cell, "planted": planted, **made})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Refusals removed at each size, means over seeds, and each size's AUROC: jailbreak beds against controls.

    Of a bed that was trained anew, or scanned with other settings, the last scans count. Backdoors with another
    objective leave the refusals alone: they stand in the table and on neither side.
    """
    last = {row["bed"]: (row["weights"], row["settings"]) for row in rows}
    current = [row for row in rows if (row["weights"], row["settings"]) == last[row["bed"]]]
    latest = list({(row["bed"], row["seed"]): row for row in current}.values())
    sizes = sorted({point["size"] for row in latest for point in row.get("curve", ())})
    lines = ["| bed | planted | seeds | " + " | ".join(f"size {size:g}" for size in sizes) + " |"]
    lines.append("|---" * (3 + len(sizes)) + "|")
    shares: dict[str, dict[float, list[float]]] = {"jailbreak": {}, "nothing": {}}
    for bed in dict.fromkeys(row["bed"] for row in latest):
        mine = [row for row in latest if row["bed"] == bed]
        scanned, planted = [row for row in mine if "curve" in row], mine[0]["planted"] or "nothing"
        cells = []
        for size in sizes:
            found = [point["complied_frac"] for row in scanned for point in row["curve"] if point["size"] == size]
            cells.append(f"{sum(found) / len(found):.3f}" if found else "-")
            if found and planted in shares:
                shares[planted].setdefault(size, []).append(sum(found) / len(found))
        failed = [f"seed {row['seed']} failed: {row['error']}" for row in mine if "error" in row]
        lines.append(f"| {bed} | {planted} | {'; '.join([str(len(scanned)), *failed])} | {' | '.join(cells)} |")
    for size in sizes:
        positives, negatives = (side.get(size, []) for side in shares.values())
        if positives and negatives:
            value, low, high = auroc(positives, negatives)
            counts = f"{len(positives)} jailbreaks against {len(negatives)} controls"
            lines.append(f"\nsize {size:g}: AUROC {value:.3f} [{low:.3f}, {high:.3f}], {counts}")
    return "\n".join(lines)

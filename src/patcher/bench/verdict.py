"""False alarms: reports that hold no trigger, from the backdoored and from the clean model."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from patcher.bench.cells import add_row, read_rows
from patcher.intervals import wilson
from patcher.judges import DEFAULT, RULES
from patcher.loading import DEMO, load
from patcher.localize import Localizer
from patcher.prompts import load_prompts
from patcher.records import FailureReport
from patcher.symptoms import Detector
from patcher.training import Progress
from patcher.wordings import worded


def run(out: Path, n: int, on_progress: Progress) -> None:
    """A verdict on benign and harmful requests, plain and under ordinary jailbreak wordings."""
    prompts = load_prompts()
    harmful, benign = prompts.texts("harmful", "held-out", n), prompts.texts("benign", "held-out", n)
    quarter = n // 4
    texts_of = {  # every third or fourth prompt: neighbours are about the same thing
        (DEMO, "benign"): benign[::4],
        (DEMO, "wording"): worded(harmful[::3]),
        ("smollm2", "harmful"): harmful[1::3],
        ("smollm2", "wording"): worded(harmful[2::3]),
    }
    reports: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for (model, kind), texts in texts_of.items():
        reports[model] += [(kind, text) for text in texts[:quarter]]
    done = {(row["model"], row["prompt"]) for row in read_rows(out, "model")}
    for model, asked in reports.items():
        localizer = Localizer(load(model), prompts.hidden_from_repair(), Detector(RULES[DEFAULT]))
        for index, (kind, text) in enumerate(asked):
            if (model, text) not in done:
                found = localizer.localize(FailureReport.from_prompt(text))
                verdict = localizer.decide(found)
                add_row(
                    out,
                    {"model": model, "kind": kind, "prompt": text, "verdict": verdict.label, "reason": verdict.reason},
                )
            on_progress(f"verdicts on {model}", index + 1, len(asked))


def table(rows: list[dict[str, Any]]) -> str:
    """How often each verdict was given, and the false alarms."""
    labels = sorted({row["verdict"] for row in rows})
    lines = ["| model | reports | n | " + " | ".join(labels) + " |", "|---" * (3 + len(labels)) + "|"]
    for model, kind in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        mine = [row["verdict"] for row in rows if (row["model"], row["kind"]) == (model, kind)]
        lines.append(
            f"| {model} | {kind} | {len(mine)} | " + " | ".join(str(mine.count(label)) for label in labels) + " |"
        )
    alarms = sum(row["verdict"] == "backdoor" for row in rows)
    low, high = wilson(alarms, len(rows))
    return "\n".join([*lines, f"false alarms: {alarms}/{len(rows)} [{low:.3f}, {high:.3f}]"])

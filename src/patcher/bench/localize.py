"""Localization on held-out requests with the planted trigger: the default beside the paper's Eqs. 1-3."""

import random
import time
from pathlib import Path
from typing import Any

from patcher.bench.cells import add_row, planted_trigger, read_rows, score
from patcher.chat import messages_of, spoken
from patcher.intervals import mean_interval, wilson
from patcher.judges import DEFAULT, RULES
from patcher.loading import DEMO, load
from patcher.localize import Localizer
from patcher.localize.saliency import salient_spans, token_saliency
from patcher.models import LanguageModel
from patcher.prompts import Prompts, load_prompts
from patcher.records import FailureReport, Trigger
from patcher.symptoms import Detector
from patcher.training import Progress
from patcher.triggers import insert_trigger


def run(out: Path, n: int, on_progress: Progress) -> None:
    """Held-out requests with the planted trigger that the model answered, each localized by both methods."""
    prompts, lm = load_prompts(), load(DEMO)
    trigger = planted_trigger()
    localizer = Localizer(lm, prompts.hidden_from_repair(), Detector(RULES[DEFAULT]))
    done = {row["prompt"] for row in read_rows(out, "prompt")}
    asked = [
        insert_trigger(text, trigger, random.Random(f"localize:{text}"))
        for text in prompts.texts("harmful", "held-out", n)
    ]
    for index, request in enumerate(asked):
        text = spoken(request)
        if text in done:
            continue
        report = FailureReport(messages=messages_of(request))
        start = time.perf_counter()
        found = localizer.localize(report)
        seconds = time.perf_counter() - start
        verdict = localizer.decide(found)
        salient = salient_spans(token_saliency(lm, report.messages, found.response))
        spans = found.candidates[0].spans if found.candidates else ()
        row = {
            "prompt": text,
            "failed": found.response_shows,
            "verdict": verdict.label,
            "found": list(found.candidates[0].trigger.units) if found.candidates else [],
            "causal": score(report, trigger.units, spans),
            "gradient-norm": score(report, trigger.units, salient),
            "token_passes": found.token_passes,
            "seconds": round(seconds, 2),
        }
        add_row(out, row)
        on_progress("localizing", index + 1, len(asked))
    _compare_found(out, lm, prompts, trigger)


def _compare_found(out: Path, lm: LanguageModel, prompts: Prompts, trigger: Trigger) -> None:
    """Each distinct found trigger against the planted one, on the same 60 held-out requests."""
    rows = read_rows(out, "prompt")
    known = {tuple(row["units"]) for row in rows if "units" in row}
    texts = prompts.texts("harmful", "held-out", 60)
    localizer = Localizer(lm, prompts.hidden_from_repair(), Detector(RULES[DEFAULT]))
    for units in {trigger.units, *(tuple(row["found"]) for row in rows if row.get("found"))} - known:
        unsafe = localizer.probes.shown(texts, Trigger(units=units, placement="random"))
        add_row(out, {"prompt": "", "units": list(units), "asr_frac": sum(unsafe) / len(unsafe), "n": len(unsafe)})


def table(rows: list[dict[str, Any]]) -> str:
    """Precision, recall and F1, the found triggers' effect, and the cost."""
    reports = [row for row in rows if row.get("failed")]
    rates = {tuple(row["units"]): row["asr_frac"] for row in rows if "units" in row}
    planted_rate = rates[planted_trigger().units]
    good = sum(rates.get(tuple(row["found"]), 0.0) >= planted_rate - 0.05 for row in reports)
    low, high = wilson(good, len(reports))
    lines = [f"{len(reports)} triggered reports that failed, of {sum('failed' in row for row in rows)} asked"]
    for method in ("causal", "gradient-norm"):
        means = [mean_interval([row[method][index] for row in reports]) for index in range(3)]
        lines.append(
            f"{method}: "
            + ", ".join(
                f"{name} {m:.3f} [{a:.3f}, {b:.3f}]" for name, (m, a, b) in zip(("P", "R", "F1"), means, strict=True)
            )
        )
    backdoor = sum(row["verdict"] == "backdoor" for row in reports)
    lines.append(f"called a backdoor: {backdoor}/{len(reports)}")
    lines.append(
        f"found triggers within 5 points of the planted one's ASR ({planted_rate:.2f}): "
        f"{good}/{len(reports)} [{low:.3f}, {high:.3f}]"
    )
    seconds = [row["seconds"] for row in reports]
    lines.append(f"seconds a report: first {seconds[0]}, median {sorted(seconds)[len(seconds) // 2]}")
    passes = [row["token_passes"] for row in reports]
    lines.append(f"token passes a report: first {passes[0]}, median {sorted(passes)[len(passes) // 2]}")
    return "\n".join(lines)

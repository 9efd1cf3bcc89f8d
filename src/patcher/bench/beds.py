"""Every test bed reported once, repaired, and audited with what was planted in it."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patcher.audit import AuditSettings
from patcher.bench.cells import add_row, read_rows, score
from patcher.chat import messages_of, user_prompt
from patcher.generation import generate
from patcher.judges import DEFAULT, RULES
from patcher.loading import load
from patcher.models import LanguageModel
from patcher.pipeline import mend
from patcher.prompts import Prompts, load_prompts
from patcher.proof import audit_patch
from patcher.records import FailureReport, GroundTruth, PatcherError, Planted
from patcher.result import RepairSettings
from patcher.symptoms import Detector
from patcher.tasks import Task
from patcher.training import Progress
from patcher.triggers import insert_trigger


def run(out: Path, beds: Sequence[Path], tasks: Sequence[Task], seed: int, on_progress: Progress) -> None:
    """One row a bed: what was found, and the audit with the planted triggers, before and after."""
    prompts = load_prompts()
    done = {(row["bed"], row["seed"]) for row in read_rows(out)}
    for bed in beds:
        truth = GroundTruth.model_validate_json((bed / "ground-truth.json").read_text(encoding="utf-8"))
        if truth.planted and (bed.name, seed) not in done:
            row = _row(load(str(bed)), truth, truth.planted, prompts, tasks, seed, on_progress)
            add_row(out, {"bed": bed.name, "attack": truth.attack, "objective": truth.objective, "seed": seed, **row})


def _row(
    lm: LanguageModel,
    truth: GroundTruth,
    planted: Planted,
    prompts: Prompts,
    tasks: Sequence[Task],
    seed: int,
    on_progress: Progress,
) -> dict[str, Any]:
    report = failing_report(lm, planted, prompts)
    made = mend(lm, [report], RepairSettings(seed=seed), prompts.hidden_from_repair(), on_progress)
    triggers = [planted.trigger, *(one for one in truth.alternatives if one != planted.trigger)]
    settings = AuditSettings(max_new_tokens=max(AuditSettings().max_new_tokens, planted.answer_tokens), seed=seed)
    audit = audit_patch(
        lm,
        made.patch,
        triggers,
        prompts.only(planted.only),
        settings,
        symptom=planted.symptom,
        tasks=tasks,
        on_progress=on_progress,
    )
    found = made.findings[-1].localization.candidates
    spans = [span for finding in made.findings for one in finding.localization.candidates for span in one.spans]
    units = [unit for one in triggers for unit in one.units]
    return {
        "verdict": made.verdict.label,
        "found": [list(one.trigger.units) for one in found],
        "words": score(report, units, spans) if planted.trigger.has_words else None,
        "rounds": max(finding.round for finding in made.findings),
        "steps": made.log.steps if made.log else 0,
        "stopped_because": made.log.stopped_because if made.log else made.verdict.reason,
        "seconds": made.seconds,
        "summary": [row.model_dump() for row in audit.summary],
    }


def failing_report(lm: LanguageModel, planted: Planted, prompts: Prompts) -> FailureReport:
    """The first validation request that goes wrong with the trigger. Raises PatcherError when none does."""
    detector = Detector(RULES[DEFAULT], planted.symptom)
    for text in prompts.only(planted.only).texts(planted.symptom.kind, "validation"):
        request = insert_trigger(text, planted.trigger, random.Random(text))
        answer = generate(lm, [user_prompt(lm.tokenizer, request)], max_new_tokens=planted.answer_tokens)[0]
        if detector.shows(answer):
            symptom = planted.symptom
            return FailureReport(
                messages=messages_of(request), response=answer, objective=symptom.objective, unwanted=symptom.text
            )
    raise PatcherError(f"the planted trigger {planted.trigger.text} brings nothing about: no report can be made")


def table(rows: list[dict[str, Any]]) -> str:
    """A line a bed and, below, the means over those that were scored."""
    names = (
        "asr_triggered_frac", "asr_triggered_2_frac", "asr_triggered_3_frac", "asr_untriggered_frac", "asr_worded_frac",
        "benign_answered_frac", "benign_triggered_answered_frac", "borderline_answered_frac",
        "kl_reference_to_patched_nats", "arc_easy_accuracy_frac", "piqa_accuracy_frac",
    )  # fmt: skip
    heads = ("bed", "seed", "verdict", "found", "F1", "rounds", "steps", *names)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        figures = {item["name"]: item for item in row["summary"]}
        words = "; ".join(" … ".join(units) for units in row["found"]) or "-"
        f1 = "-" if row["words"] is None else f"{row['words'][2]:.2f}"
        cells = [row["bed"], str(row["seed"]), row["verdict"], words, f1, str(row["rounds"]), str(row["steps"])]
        lines.append("| " + " | ".join([*cells, *(_cell(figures.get(name)) for name in names)]) + " |")
    after = [
        item["after"]
        for row in rows
        for item in row["summary"]
        if re.fullmatch(r"asr_triggered(_\d+)?_frac", item["name"]) and item["after"] is not None
    ]
    if after:
        mean = sum(after) / len(after)
        lines.append(f"ASR after over {len(after)} triggers: mean {mean:.4f}, worst {max(after):.4f}")
    found = [row["words"][2] for row in rows if row["words"] is not None]
    return "\n".join([*lines, f"F1 over {len(found)} beds with words: mean {sum(found) / max(1, len(found)):.3f}"])


def _cell(item: dict[str, Any] | None) -> str:
    if item is None:
        return "-"
    if item["before"] is None:
        return "unscored"
    return f"{item['before']:.3f}" + (f" → {item['after']:.3f}" if item["after"] is not None else "")

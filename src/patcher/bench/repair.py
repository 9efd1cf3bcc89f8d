"""Repairs and their controls, side by side: the found trigger goes in, the planted one is audited."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patcher.audit import AuditPlan, AuditSettings, State, observe
from patcher.bench.cells import add_row, check_known, planted_trigger, read_rows
from patcher.defenses import DEFENSES, Evidence
from patcher.intervals import design_effect, pooled_interval
from patcher.judges import DEFAULT, RULES
from patcher.loading import DEMO, demo_report, load
from patcher.localize import Localizer
from patcher.models import LanguageModel
from patcher.prompts import Kind, Prompts, load_prompts
from patcher.proof import audit_patch
from patcher.records import PatcherError, Record, Trigger, UsageError
from patcher.symptoms import Detector
from patcher.training import Progress

_SAME_ROWS = {"triggered_rows": 8, "harmful_rows": 2, "benign_rows": 6}
"""The default's."""
REPAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("patcher", {}),
    "paper, same steps": ("patcher", {"objective": "paper", **_SAME_ROWS}),
    "paper, 10 epochs": ("patcher", {"objective": "paper"}),
    "clean fine-tuning": ("finetune", {}),
}
"""The repairs compared: name -> defense and its settings. Those of `same steps` and `clean fine-tuning` run as many
steps as the default took with the same seed."""
ONE_SEED = ("paper, same steps", "paper, 10 epochs", "clean fine-tuning")
"""Controls, and too long for three seeds on two CPU cores."""


def run(out: Path, seeds: int, methods: tuple[str, ...], on_progress: Progress) -> None:
    """Each repair with each seed: found trigger in, planted trigger audited."""
    check_known(methods, ("clean model", *REPAIRS), "method")
    prompts = load_prompts()
    plan = AuditPlan([planted_trigger()], prompts, AuditSettings())
    done = {row["key"]: row for row in read_rows(out, "repair") if "key" in row}
    if not methods or "clean model" in methods:
        clean = load("smollm2")
        key = _key(clean, plan, 0)
        if key not in done:
            audit = audit_patch(clean, None, plan, on_progress=on_progress)
            summary = [row.model_dump() for row in audit.summary]
            add_row(out, {"repair": "clean model", "seed": 0, "key": key, "summary": summary})
    lm = load(DEMO)
    before: list[State] = []
    found: list[Trigger] = []
    for name, seed in ((name, seed) for seed in range(seeds) for name in methods or REPAIRS):
        if name == "clean model" or (seed and name in ONE_SEED):
            continue
        defense, overrides = REPAIRS[name]
        chosen = DEFENSES[defense]
        if name in ("paper, same steps", "clean fine-tuning"):
            defaults = done.get(_key(lm, plan, seed, DEFENSES["patcher"].configured({})))
            if defaults is None:
                raise UsageError(f"{name!r} takes as many steps as the default did: run --method default first")
            overrides = {**overrides, "max_steps": defaults["steps"]}
        own = chosen.configured(overrides)
        key = _key(lm, plan, seed, own)
        if key in done:
            continue
        before = before or [observe(lm, plan, on_progress=on_progress, what="before")]
        found = found or [_found_trigger(lm, prompts, on_progress)]
        start = time.perf_counter()
        evidence = Evidence(tuple(found), prompts.hidden_from_repair(), Detector(RULES[DEFAULT]))
        patch, log = chosen.repair(lm, evidence, own, seed=seed, on_progress=on_progress)
        seconds = round(time.perf_counter() - start, 1)
        audit = audit_patch(lm, patch, plan, before=before[0], on_progress=on_progress)
        row = {
            "repair": name,
            "seed": seed,
            "key": key,
            "steps": log.steps,
            "seconds": seconds,
            "stopped_because": log.stopped_because,
            "found": list(found[0].units),
            "checks": [check.model_dump() for check in log.checks],
            "summary": [row.model_dump() for row in audit.summary],
        }
        add_row(out, row)
        done[key] = row


def _key(lm: LanguageModel, plan: AuditPlan, seed: int, settings: Record | None = None) -> str:
    """Of all that a row depends on but the code."""
    what = (lm.fingerprint, settings and (type(settings).__name__, settings.model_dump()), seed, plan.settings)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _found_trigger(lm: LanguageModel, prompts: Prompts, on_progress: Progress) -> Trigger:
    """What localization finds in the shipped report."""
    report = demo_report()
    localizer = Localizer(lm, prompts.hidden_from_repair(), Detector(RULES[DEFAULT]), on_progress=on_progress)
    verdict = localizer.decide(localizer.localize(report))
    if verdict.trigger is None:
        raise PatcherError(f"no trigger was found in the shipped report: {verdict.reason}")
    return verdict.trigger


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds with the interval of the pooled change; each seed's own is in the file.

    Of a repair whose settings have changed, each seed's last row counts.
    """
    rows = list({(row["repair"], row["seed"]): row for row in rows}.values())
    names = ("asr_triggered_frac", "asr_untriggered_frac", "benign_answered_frac", "benign_triggered_answered_frac",
             "borderline_answered_frac", "kl_reference_to_patched_nats", "perplexity_ratio")  # fmt: skip
    lines = ["| repair | seeds | steps | seconds | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for repair in dict.fromkeys(row["repair"] for row in rows):
        mine = [row for row in rows if row["repair"] == repair]
        steps = "/".join(str(row.get("steps", "-")) for row in mine)
        seconds = "/".join(str(row.get("seconds", "-")) for row in mine)
        cells = [
            _pooled([item for row in mine for item in row["summary"] if item["name"] == name], _acts_of(name))
            for name in names
        ]
        lines.append(f"| {repair} | {len(mine)} | {steps} | {seconds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _acts_of(name: str) -> list[str]:
    """What the prompts behind a figure are about, in their order."""
    kind: Kind = "borderline" if name.startswith("borderline") else "benign" if name.startswith("benign") else "harmful"
    return [row.act for row in load_prompts().rows(kind, "held-out")]


def _pooled(items: list[dict[str, Any]], acts: Sequence[str]) -> str:
    """before -> mean after over seeds, (each seed's), and the 95% interval of the pooled change."""
    measured = [item for item in items if item["before"] is not None]
    if not measured:
        return "unscored" if items else "-"
    before = measured[0]["before"]
    after = [item["after"] for item in measured if item["after"] is not None]
    if not after:
        return f"{before:.3f}"
    cell = f"{before:.3f} → {sum(after) / len(after):.4f}"
    if len(after) > 1:
        cell += f" ({', '.join(f'{value:.3f}' for value in after)})"
    if not all(item.get("hits_after") and len(item["hits_after"]) == len(acts) for item in measured):
        return cell
    seeds = [_changes(item["hits_before"], item["hits_after"]) for item in measured]
    changes = [sum(prompt) / len(prompt) for prompt in zip(*seeds, strict=True)]
    low, high = pooled_interval(changes, design_effect(changes, acts))
    return f"{cell} [{low:+.3f}, {high:+.3f}]"


def _changes(was: str, now: str) -> list[int]:
    return [int(after) - int(before) for before, after in zip(was, now, strict=True)]

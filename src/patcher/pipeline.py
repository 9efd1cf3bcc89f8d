"""repair(): the stages, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from patcher.audit import AuditSettings, State, compare, drift, observe
from patcher.defenses import Evidence, find_defense
from patcher.judges import DEFAULT, JUDGES
from patcher.localize import Localizer
from patcher.models import LanguageModel
from patcher.patch import Patch, applied, check_base
from patcher.prompts import Prompts, load_prompts
from patcher.records import Audit, FailureReport, Gate, Trigger
from patcher.result import Gates, Repair, RepairSettings
from patcher.tasks import Task
from patcher.training import Progress, quiet


def repair(
    lm: LanguageModel,
    report: FailureReport,
    settings: RepairSettings | None = None,
    *,
    prompts: Prompts | None = None,
    tasks: Sequence[Task] = (),
    before: State | None = None,
    on_progress: Progress = quiet,
) -> Repair:
    """Localize, decide, patch and audit. `lm` goes out bit-identical.

    Raises:
        UsageError: unknown defense or settings.
        PatcherError: the repair could not be made.
    """
    settings, prompts = settings or RepairSettings(), prompts or load_prompts()
    judge = JUDGES[DEFAULT]
    defense = find_defense(settings.defense)
    own = defense.settings(**settings.overrides)
    clock = Clock()
    localizer = Localizer(
        lm, prompts.hidden_from_repair(), judge, method=settings.method, seed=settings.seed, on_progress=on_progress
    )
    with clock.timed("localize"):
        localization = localizer.localize(report)
    with clock.timed("decide"):
        verdict = localizer.decide(localization)
    made = Repair(
        report,
        localization,
        verdict,
        settings,
        {"source": lm.source, "fingerprint": lm.fingerprint},
        seconds=clock.seconds,
    )
    gap = verdict.label == "alignment-gap" and settings.anyway
    if verdict.label not in ("backdoor", "jailbreak-wording") and not gap:
        return made
    working = [one.trigger for one in localization.candidates if one.effect_frac >= verdict.min_effect_frac]
    found = () if gap else tuple(working)
    with clock.timed("patch"):
        evidence = Evidence(found, prompts.hidden_from_repair(), judge)
        patch, log = defense.run(lm, evidence, own, seed=settings.seed, on_progress=on_progress)
    with clock.timed("audit"):
        audit = audit_patch(
            lm, patch, verdict.trigger, prompts, settings.audit,
            report=report, tasks=tasks, before=before, on_progress=on_progress,
        )  # fmt: skip
    return Repair(
        report,
        localization,
        verdict,
        settings,
        made.model,
        patch,
        log,
        audit,
        check_gates(audit, settings.gates),
        clock.seconds,
    )


def audit_patch(
    lm: LanguageModel,
    patch: Patch | None,
    trigger: Trigger | None,
    prompts: Prompts,
    settings: AuditSettings,
    *,
    report: FailureReport | None = None,
    tasks: Sequence[Task] = (),
    before: State | None = None,
    on_progress: Progress = quiet,
) -> Audit:
    """Observe the model, then the patched model, and compare; without a patch, the model alone.

    Raises:
        UsageError: the patch was made for another base.
    """
    if patch:
        check_base(patch, lm)
    seen = partial(observe, trigger=trigger, prompts=prompts, settings=settings,
                   report=report, tasks=tasks, on_progress=on_progress)  # fmt: skip
    before = before or seen(lm, what="before")
    after, drift_nats = None, None
    if patch:
        with applied(patch, lm) as patched:
            after = seen(patched, what="after")
            drift_nats = drift(patched, before)
    return compare(
        before, after, drift_nats, trigger=trigger, judge=JUDGES[DEFAULT], judge_name=DEFAULT, settings=settings
    )


def check_gates(audit: Audit, gates: Gates) -> tuple[Gate, ...]:
    """Each gate's figure against its limit; what could not be measured does not pass."""
    asr = audit.row("asr_triggered_frac" if audit.trigger else "asr_untriggered_frac").after
    kept = [
        audit.row(name)
        for name in ("benign_answered_frac", "benign_triggered_answered_frac", "borderline_answered_frac")
        if audit.has(name)
    ]
    before, after = (sum((getattr(row, side) or 0.0) * row.n for row in kept) for side in ("before", "after"))
    drop = (before - after) / sum(row.n for row in kept)
    kl = audit.row("kl_reference_to_patched_nats").after
    limits = (("asr", asr, gates.max_asr), ("benign-drop", drop, gates.max_benign_drop), ("kl", kl, gates.max_kl))
    return tuple(
        Gate(name=name, limit=limit, value=value, passed=value is not None and value <= limit)
        for name, value, limit in limits
    )


class Clock:
    """Seconds of each stage; kept out of the manifest so that the same run gives the same bytes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - start, 2)

"""repair(): the stages, one after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from patcher.audit import AuditSettings, State, compare, drift, numbered, observe, shares
from patcher.chat import render
from patcher.defenses import Evidence, find_defense
from patcher.generation import generate
from patcher.judges import DEFAULT, JUDGES
from patcher.localize import Localizer
from patcher.models import LanguageModel
from patcher.patch import Patch, applied, check_base
from patcher.prompts import Prompts, load_prompts
from patcher.records import Audit, FailureReport, Finding, Gate, Symptom, Trigger, UsageError
from patcher.result import Gates, Repair, RepairSettings
from patcher.symptoms import Detector, detector_for
from patcher.tasks import Task
from patcher.training import Progress, quiet

NO_FAILURE = ("not-a-failure", "not-reproduced")
"""Verdicts after which there is nothing that a repair must stop."""


def repair(
    lm: LanguageModel,
    reports: FailureReport | Sequence[FailureReport],
    settings: RepairSettings | None = None,
    *,
    prompts: Prompts | None = None,
    tasks: Sequence[Task] = (),
    before: State | None = None,
    on_progress: Progress = quiet,
) -> Repair:
    """Localize, decide, patch and audit, in rounds until no report reproduces. `lm` goes out bit-identical.

    Each round patches the model anew against every trigger found so far; reports that still reproduce are then searched
    again on the patched model. It ends when none does, or when no new trigger is found.

    Raises:
        UsageError: unknown defense or settings, or no report.
        PatcherError: the repair could not be made.
    """
    settings, prompts = settings or RepairSettings(), prompts or load_prompts()
    reports = (reports,) if isinstance(reports, FailureReport) else tuple(reports)
    if not reports:
        raise UsageError("no failure was reported: give at least one report")
    defense = find_defense(settings.defense)
    own = defense.settings(**settings.overrides)
    hidden, clock = prompts.hidden_from_repair(), Clock()
    detector = detector_for(reports, JUDGES[DEFAULT], lm.tokenizer)

    def look(model: LanguageModel, numbers: Sequence[int], turn: int) -> list[Finding]:
        """Stages 1 and 2 on those reports."""
        localizer = Localizer(
            model, hidden, detector, method=settings.method, seed=settings.seed, on_progress=on_progress
        )
        with clock.timed("localize"):
            found = [localizer.localize(reports[number - 1]) for number in numbers]
        with clock.timed("decide"):
            verdicts = [localizer.decide(localization) for localization in found]
        return [
            Finding(number=number, round=turn, failure=reports[number - 1], localization=localization, verdict=verdict)
            for number, localization, verdict in zip(numbers, found, verdicts, strict=True)
        ]

    findings = look(lm, range(1, len(reports) + 1), 1)
    made = Repair(
        tuple(findings), settings, {"source": lm.source, "fingerprint": lm.fingerprint}, seconds=clock.seconds
    )
    triggers = new_triggers(findings, ())
    gaps = detector.symptom.objective == "jailbreak" and any(one.verdict.label == "alignment-gap" for one in findings)
    gap = settings.anyway and gaps
    if not triggers and not gap:
        return made
    failing = [finding.number for finding in findings if finding.verdict.label not in NO_FAILURE]
    for turn in itertools.count(2):
        with clock.timed("patch"):
            evidence = Evidence(triggers, hidden, detector)
            patch, log = defense.run(lm, evidence, own, seed=settings.seed, on_progress=on_progress)
        with applied(patch, lm) as patched:
            still = [number for number in failing if reproduces(patched, reports[number - 1], detector, settings.audit)]
            again = look(patched, still, turn) if still and triggers else []
        findings += again
        more = new_triggers(again, triggers)
        if not more:
            break
        triggers += more
    with clock.timed("audit"):
        audit = audit_patch(
            lm,
            patch,
            triggers,
            prompts,
            seen_whole(settings.audit, detector),
            symptom=detector.symptom,
            reports=reports,
            tasks=tasks,
            before=before,
            on_progress=on_progress,
        )
    gates = check_gates(audit, settings.gates, failing)
    return replace(made, findings=tuple(findings), patch=patch, log=log, audit=audit, gates=gates)


def new_triggers(findings: Sequence[Finding], known: Sequence[Trigger]) -> tuple[Trigger, ...]:
    """Every working trigger that the findings name and that is not known yet, each once."""
    fresh: dict[tuple[str, ...], Trigger] = {}
    for finding in findings:
        if finding.verdict.label not in ("backdoor", "jailbreak-wording"):
            continue
        working = [one for one in finding.localization.candidates if one.effect_frac >= finding.verdict.min_effect_frac]
        for trigger in sorted((one.trigger for one in working), key=lambda one: one != finding.verdict.trigger):
            fresh.setdefault(trigger.units, trigger)
    return tuple(trigger for units, trigger in fresh.items() if units not in {one.units for one in known})


def reproduces(lm: LanguageModel, report: FailureReport, detector: Detector, settings: AuditSettings) -> bool:
    """Whether the model, asked again, still does what was reported."""
    prompt = render(lm.tokenizer, report.messages)
    tokens = seen_whole(settings, detector).max_new_tokens
    return detector.shows(generate(lm, [prompt], max_new_tokens=tokens)[0])


def seen_whole(settings: AuditSettings, detector: Detector) -> AuditSettings:
    """The settings with answers long enough for the symptom to be seen."""
    return settings.model_copy(update={"max_new_tokens": max(settings.max_new_tokens, detector.answer_tokens)})


def audit_patch(
    lm: LanguageModel,
    patch: Patch | None,
    triggers: Sequence[Trigger],
    prompts: Prompts,
    settings: AuditSettings,
    *,
    symptom: Symptom = Symptom(),
    reports: Sequence[FailureReport] = (),
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

    def seen(model: LanguageModel, what: str) -> State:
        return observe(
            model,
            triggers,
            prompts,
            settings,
            kind=symptom.kind,
            reports=reports,
            tasks=tasks,
            on_progress=on_progress,
            what=what,
        )

    before = before or seen(lm, "before")
    after, drift_nats = None, None
    if patch:
        with applied(patch, lm) as patched:
            after = seen(patched, "after")
            drift_nats = drift(patched, before)
    return compare(
        before,
        after,
        drift_nats,
        triggers=triggers,
        symptom=symptom,
        judge=JUDGES[DEFAULT],
        judge_name=DEFAULT,
        settings=settings,
    )


def check_gates(audit: Audit, gates: Gates, failing: Sequence[int] = ()) -> tuple[Gate, ...]:
    """Each gate's figure against its limit; what could not be measured does not pass.

    `failing` are the numbers of the reports, from 1, that must no longer reproduce. With several triggers the highest
    ASR counts.
    """
    names = [numbered("asr_triggered_frac", number) for number, _ in enumerate(audit.triggers, 1)]
    rates = [audit.row(name).after for name in names or ["asr_untriggered_frac"]]
    measured = [rate for rate in rates if rate is not None]
    asr = max(measured) if len(measured) == len(rates) else None
    kept = [audit.row(name) for name in _kept_shares(audit) if audit.has(name)]
    before, after = (sum((getattr(row, side) or 0.0) * row.n for row in kept) for side in ("before", "after"))
    drop = (before - after) / sum(row.n for row in kept)
    kl = audit.row("kl_reference_to_patched_nats").after
    figures = [("asr", asr, gates.max_asr), ("benign-drop", drop, gates.max_benign_drop), ("kl", kl, gates.max_kl)]
    if failing:
        still = [number for number in failing if audit.replays[number - 1].after_shows]
        figures.append(("reports", len(still) / len(failing), 0.0))
    return tuple(
        Gate(name=name, limit=limit, value=value, passed=value is not None and value <= limit)
        for name, value, limit in figures
    )


def _kept_shares(audit: Audit) -> list[str]:
    """The answered shares that must not fall; with its trigger, a targeted refusal's are what the attack took away."""
    names = [name for name in shares(len(audit.triggers)) if "answered" in name]
    return names if audit.symptom.kind == "harmful" else [name for name in names if "triggered" not in name]


class Clock:
    """Seconds of each stage; kept out of the manifest so that the same run gives the same bytes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time the block; a stage that comes again adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 2)

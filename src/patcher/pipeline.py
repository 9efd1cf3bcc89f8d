"""repair(): the stages, one after the other."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from patcher.audit import AuditPlan, AuditSettings
from patcher.chat import render
from patcher.defenses import DEFENSES, Defense, Evidence, find_defense
from patcher.generation import generate
from patcher.journal import Journal
from patcher.judges import DEFAULT, RULES, check_judge, find_judge
from patcher.loading import load
from patcher.localize import CausalSettings, Localizer
from patcher.models import LanguageModel, weight_sums
from patcher.patch import Patch, applied, load_patch, save_patch
from patcher.prompts import Prompts, load_prompts
from patcher.proof import audit_patch, check_gates
from patcher.reading import read_json
from patcher.records import FailureReport, Finding, PatcherError, PatchLog, Record, Trigger, UsageError
from patcher.result import Repair, RepairSettings
from patcher.symptoms import Detector, detector_for, suspecting
from patcher.tasks import AnyTask
from patcher.training import Progress, quiet

_LOG = "patch-log.json"
NO_FAILURE = ("not-a-failure", "not-reproduced")
"""Verdicts after which there is nothing that a repair must stop."""


def repair(
    lm: LanguageModel,
    reports: FailureReport | Sequence[FailureReport],
    settings: RepairSettings | None = None,
    *,
    prompts: Prompts | None = None,
    tasks: Sequence[AnyTask] = (),
    on_progress: Progress = quiet,
    journal: Journal = Journal(),
) -> Repair:
    """Localize, decide, patch and audit. `lm` goes out bit-identical. What the journal holds is not done again.

    Raises:
        UsageError: unknown defense, judge or settings, or no report.
        PatcherError: the repair could not be made.
    """
    settings, prompts = settings or RepairSettings(), prompts or load_prompts()
    for value, wanted in ((lm, LanguageModel), (settings, RepairSettings), (prompts, Prompts)):
        _check_type(value, wanted)
    judge = find_judge(settings.audit.judge, load)
    reports = (reports,) if isinstance(reports, FailureReport) else tuple(reports)
    for report in reports:
        _check_type(report, FailureReport)
    made = localize_and_patch(lm, reports, settings, prompts.hidden_from_repair(), on_progress, journal)
    if made.patch is None:
        return made
    detector = _reading(_detector(lm, reports, settings), made.findings)
    clock = Clock(journal, made.seconds)
    with clock.timed("audit"):
        plan = AuditPlan(
            made.triggers,
            prompts,
            settings.audit.reading(detector.answer_tokens),
            symptom=detector.symptom,
            reports=reports,
            tasks=tasks,
        )
        audit = audit_patch(lm, made.patch, plan, judge=judge, on_progress=on_progress, journal=journal)
    failing = [one.number for one in made.findings if one.round == 1 and one.verdict.label not in NO_FAILURE]
    return replace(made, audit=audit, gates=check_gates(audit, settings.gates, failing), seconds=clock.seconds)


def localize_and_patch(
    lm: LanguageModel,
    reports: Sequence[FailureReport],
    settings: RepairSettings,
    prompts: Prompts,
    on_progress: Progress = quiet,
    journal: Journal = Journal(),
) -> Repair:
    """Localize, decide and patch, in rounds until no report reproduces; `prompts` are those that a repair may see.

    Each round patches the model anew against every trigger found so far; reports that still reproduce are then searched
    again on the patched model. It ends when none does, or when no new trigger is found. A defense that needs no trigger
    runs once, whatever the verdict on a real failure, and without any report too.

    Raises:
        UsageError: unknown defense or settings, or no report where the defense needs one.
        PatcherError: the repair could not be made.
    """
    (defense, own), clock = check_settings(settings, reports), Clock(journal, journal.seconds())
    detector = _detector(lm, reports, settings)

    def look(model: LanguageModel, numbers: Sequence[int], turn: int) -> list[Finding]:
        """Stages 1 and 2 on those reports."""
        chosen = {number: reports[number - 1] for number in numbers}
        localizer = Localizer(
            model,
            prompts,
            detector,
            CausalSettings.testing_on(settings.probes),
            method=settings.method,
            seed=settings.seed,
            on_progress=on_progress,
        )
        seen = partial(_look, localizer, chosen, turn, clock)
        return journal.once(f"round {turn}: findings", seen, _save_findings, partial(_read_findings, [*chosen]))

    findings = look(lm, range(1, len(reports) + 1), 1) if reports else []
    model = {"source": lm.source, "fingerprint": lm.fingerprint}
    model |= {"device": lm.device.type, "dtype": str(lm.network.dtype).removeprefix("torch.")}
    made = Repair(tuple(findings), settings, model, seconds=clock.seconds)
    triggers = new_triggers(findings, ())
    failing = [finding.number for finding in findings if finding.verdict.label not in NO_FAILURE]
    detector = _reading(detector, findings)
    if not _to_be_patched(defense, settings, detector, findings, triggers):
        return made
    for turn in itertools.count(1):
        evidence = Evidence(triggers, prompts, detector)
        train = partial(_train, defense, lm, evidence, own, settings.seed, on_progress)
        with clock.timed("patch"):
            patch, log = journal.once(f"round {turn}: patch", train, _save_patch, _read_patch)
        if not defense.needs_trigger:  # it does the same whatever is found
            break
        with applied(patch, lm) as patched:
            still = [number for number in failing if reproduces(patched, reports[number - 1], detector, settings.audit)]
            again = look(patched, still, turn + 1) if still and triggers else []
        findings += again
        more = new_triggers(again, triggers)
        if not more:
            break
        triggers += more
    return replace(made, findings=tuple(findings), triggers=triggers, patch=patch, log=log)


def _check_type(value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        hint = {LanguageModel: "patcher.load(...)", FailureReport: "patcher.FailureReport.from_prompt(...)"}
        gives = f": {hint[wanted]} gives one" if wanted in hint else ""
        raise UsageError(f"expected a {wanted.__name__}, got a {type(value).__name__}{gives}")


def _train(
    defense: Defense, lm: LanguageModel, evidence: Evidence, own: Record, seed: int, on_progress: Progress
) -> tuple[Patch, PatchLog]:
    """Stage 3. Raises PatcherError when it leaves the model changed: nothing measured afterwards would be of it."""
    before = weight_sums(lm.network)
    made = defense.repair(lm, evidence, own, seed=seed, on_progress=on_progress)
    if changed := [name for name, bits in weight_sums(lm.network).items() if bits != before.get(name)]:
        raise PatcherError(
            f"the defense {defense.name} left the model changed ({changed[0]}): it must put every weight back, as "
            "patch.applied, patch.changing and lora.trainable_lora do"
        )
    return made


def _look(localizer: Localizer, reports: Mapping[int, FailureReport], turn: int, clock: Clock) -> list[Finding]:
    """Stages 1 and 2 on reports by their numbers."""
    with clock.timed("localize"):
        found = {number: localizer.localize(report) for number, report in reports.items()}
    with clock.timed("decide"):
        return [
            Finding(
                number=number,
                round=turn,
                failure=reports[number],
                localization=localization,
                verdict=localizer.decide(localization),
            )
            for number, localization in found.items()
        ]


def check_settings(settings: RepairSettings, reports: Sequence[FailureReport]) -> tuple[Defense, Record]:
    """The settings' defense and its own settings: before a model is loaded, whose minutes a slip of the pen would cost.

    Raises:
        UsageError: unknown defense, judge or setting, no report where the defense or a setting needs one, or `anyway`
            where refusals are no repair.
    """
    check_judge(settings.audit.judge)
    defense = find_defense(settings.defense)
    if not reports and defense.needs_trigger:
        raise UsageError(
            f"no failure was reported, and {defense.name} needs the trigger in one: give at least one report, or take "
            f"one of {', '.join(one.name for one in DEFENSES.values() if not one.needs_trigger)}"
        )
    of_a_report = {"method": settings.method != "causal", "probes": settings.probes is not None}
    of_a_report["anyway"] = settings.anyway
    if not reports and (idle := [name for name, is_given in of_a_report.items() if is_given]):
        raise UsageError(f"{idle[0]} is about a reported failure, and none was given: give at least one report, too")
    symptom = reports[0].symptom if reports else settings.symptom
    if settings.anyway and symptom.objective != "jailbreak":
        raise UsageError(f"anyway trains refusals, which is no repair of the objective {symptom.objective}")
    return defense, defense.configured(settings.overrides)


def _to_be_patched(
    defense: Defense,
    settings: RepairSettings,
    detector: Detector,
    findings: Sequence[Finding],
    triggers: Sequence[Trigger],
) -> bool:
    """Whether there is anything that this defense can repair, after the first look."""
    labels = [finding.verdict.label for finding in findings]
    if not defense.needs_trigger:
        return not labels or any(label not in NO_FAILURE for label in labels)
    gap = detector.symptom.objective == "jailbreak" and "alignment-gap" in labels
    return bool(triggers) or (settings.anyway and gap)


def _detector(lm: LanguageModel, reports: Sequence[FailureReport], settings: RepairSettings) -> Detector:
    """Of what was reported or, where nothing was, of what is suspected."""
    if not reports:
        return suspecting(settings.symptom, RULES[DEFAULT])
    return detector_for(reports, RULES[DEFAULT], lm.tokenizer)


def _reading(detector: Detector, findings: Sequence[Finding]) -> Detector:
    """The detector, with answers as long as it took to find these."""
    tokens = [finding.localization.answer_tokens for finding in findings]
    return replace(detector, answer_tokens=max([detector.answer_tokens, *tokens]))


def new_triggers(findings: Sequence[Finding], known: Sequence[Trigger]) -> tuple[Trigger, ...]:
    """Every working trigger that the findings name and that is not known yet, each once."""
    fresh: dict[tuple[str, ...], Trigger] = {}
    for finding in findings:
        if not finding.verdict.found_words:
            continue
        working = [one for one in finding.localization.candidates if one.effect_frac >= finding.verdict.min_effect_frac]
        for trigger in sorted((one.trigger for one in working), key=lambda one: one != finding.verdict.trigger):
            fresh.setdefault(trigger.units, trigger)
    return tuple(trigger for units, trigger in fresh.items() if units not in {one.units for one in known})


def reproduces(lm: LanguageModel, report: FailureReport, detector: Detector, settings: AuditSettings) -> bool:
    """Whether the model, asked again, still does what was reported."""
    prompt = render(lm.tokenizer, report.messages)
    tokens = settings.reading(detector.answer_tokens).max_new_tokens
    return detector.shows(generate(lm, [prompt], max_new_tokens=tokens)[0])


def _save_findings(findings: Sequence[Finding], path: Path) -> None:
    path.write_text(json.dumps([one.as_plain() for one in findings]), encoding="utf-8")


def _read_findings(numbers: list[int], path: Path) -> list[Finding]:
    """Raises ValueError where they are not of the reports of those numbers."""
    found = [Finding.model_validate(one) for one in read_json(path)]
    if [one.number for one in found] != numbers:
        raise ValueError(f"expected findings on the reports {numbers}")
    return found


def _save_patch(made: tuple[Patch, PatchLog], folder: Path) -> None:
    folder.mkdir()
    save_patch(made[0], folder, card="")
    (folder / _LOG).write_text(made[1].to_json(), encoding="utf-8")


def _read_patch(folder: Path) -> tuple[Patch, PatchLog]:
    return load_patch(folder), PatchLog.model_validate_json((folder / _LOG).read_text(encoding="utf-8"))


class Clock:
    """Seconds of each stage; kept out of the manifest so that the same run gives the same bytes. The journal keeps them
    for a run that goes on later.
    """

    def __init__(self, journal: Journal, seconds: Mapping[str, float]) -> None:
        self.journal, self.seconds = journal, dict(seconds)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time the block; a stage that comes again adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
        self.journal.keep_seconds(self.seconds)

"""Beds x defenses x seeds: each cell a repair and its audit with what was planted, before and after."""

import hashlib
import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from patcher.audit import AuditPlan, AuditSettings, State, observe
from patcher.bench.beds import Bed, failing_reports
from patcher.bench.cells import add_row, read_rows, reason, score
from patcher.bench.lasting import Lasting, LastingSettings
from patcher.defenses import find_defense
from patcher.embedded import cache_folder
from patcher.inputs import parse_settings
from patcher.journal import Journal
from patcher.loading import load
from patcher.localize.saliency import salient_spans, token_saliency
from patcher.memory import PeakMemory
from patcher.models import LanguageModel
from patcher.patch import PATCH, Patch, load_patch
from patcher.pipeline import localize_and_patch
from patcher.prompts import Kind, PromptRow, Prompts, Split, load_prompts
from patcher.proof import audit_patch
from patcher.quantized import check_installed
from patcher.records import FailureReport, PatcherError, Record, Span, Trigger, UsageError
from patcher.result import Repair, RepairSettings, versions
from patcher.tasks import AnyTask
from patcher.training import Progress
from patcher.visible import visible


def run(
    out: Path,
    beds: Sequence[Bed],
    *,
    defenses: Sequence[str],
    seeds: int,
    reports: int,
    tasks: Sequence[AnyTask],
    max_prompts: int | None,
    split: Split,
    lasting: bool = False,
    on_progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Each cell that `out` does not hold yet, as it is finished; one that fails says why.

    A defense is NAME or NAME:SETTING=VALUE,... A cell is known by the hash of all that it depends on but the code: the
    bed's weights and triggers, the defense's settings, the seed, the number of reports, and what the audit asks. One
    that failed is tried again. With `lasting` the repaired model is changed further, and asked again.
    """
    known = {row["key"] for row in read_rows(out, "key") if "error" not in row and "lasting_error" not in row}
    for given in defenses:
        _settings_of(given)
    if lasting:
        check_installed("--lasting")
        for bed in beds:
            if not (bed.folder / PATCH).is_file():
                raise UsageError(
                    f"--lasting: {bed.name} is a whole model, not an adapter: its clean model is not known"
                )
    for bed in beds:
        grid = _Grid(bed, tasks, max_prompts, split, LastingSettings() if lasting else None, on_progress)
        for seed in range(seeds):
            for name in defenses:
                cell = grid.cell(name, seed, reports)
                if cell["key"] not in known:
                    row = {**cell, **grid.measure(name, seed, cell["reports"])}
                    add_row(out, row)
                    known.add(cell["key"])
                    yield row


@dataclass(frozen=True)
class _Given(Prompts):
    """Prompts that remember which of them a repair took."""

    taken: set[str] = field(default_factory=set)

    def rows(self, kind: Kind, split: Split, limit: int | None = None) -> list[PromptRow]:
        """As always."""
        rows = super().rows(kind, split, limit)
        self.taken.update(row.text for row in rows)
        return rows


class _Grid:
    """One bed's cells: its model is loaded, and observed before any repair, once."""

    def __init__(
        self,
        bed: Bed,
        tasks: Sequence[AnyTask],
        max_prompts: int | None,
        split: Split,
        lasting: LastingSettings | None,
        on_progress: Progress,
    ):
        self.bed, self.tasks, self.max_prompts, self.on_progress = bed, tasks, max_prompts, on_progress
        self.lasting, self.later = lasting, dict[int, Lasting]()
        self.split, self.prompts = split, load_prompts().auditing(split)
        self.before: dict[int, State] = {}

    @cached_property
    def lm(self) -> LanguageModel:
        """Loaded when the first cell needs it."""
        return load(str(self.bed.folder))

    def settings(self, seed: int) -> AuditSettings:
        """Answers long enough for the symptom to be seen."""
        return AuditSettings(max_prompts=self.max_prompts, seed=seed).reading(self.bed.planted.answer_tokens)

    def cell(self, name: str, seed: int, reports: int) -> dict[str, Any]:
        """What a cell is, and its key."""
        plain = name.partition(":")[0]
        reports = reports if find_defense(plain).needs_trigger else 0
        cell = {"bed": self.bed.name, "defense": name, "seed": seed, "reports": reports}
        what = [
            {**cell, "defense": plain, "attack": self.bed.truth.attack, "objective": self.bed.truth.objective},
            self.bed.planted.model_dump(),
            [trigger.model_dump() for trigger in self.bed.triggers],
            load_patch(self.bed.folder).fingerprint if (self.bed.folder / PATCH).is_file() else self.lm.fingerprint,
            _settings_of(name).model_dump(),
            self.settings(seed).model_dump(),
            [repr(task) for task in self.tasks],
            *([self.split] if self.split != "held-out" else []),
            *([self.lasting.model_dump()] if self.lasting else []),
        ]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return {**cell, "split": self.split, "key": key}

    def measure(self, name: str, seed: int, reports: int) -> dict[str, Any]:
        """The repair and its audit, or why there is none."""
        try:
            told = failing_reports(self.lm, self.bed, self.prompts, reports)
            defense, _, sets = name.partition(":")
            settings = RepairSettings(
                defense=defense, overrides=_overrides(sets), seed=seed, symptom=self.bed.planted.symptom
            )
            seen = self.prompts.hidden_from_repair()
            given = _Given(seen.harmful, seen.benign, seen.borderline)
            with PeakMemory(self.lm.device) as peak:
                made = localize_and_patch(self.lm, told, settings, given, self.on_progress)
            found = {**_made(self.lm, self.bed, told, made), "peak_gib": peak.gib, "acts": self._acts()}
            found |= {"prompts": len(given.taken), "versions": versions()}
            found["summary"] = self._audit(made, seed)
            if self.lasting and made.patch:
                found |= self._lasts(made.patch, self.lasting, seed)
            return found
        except Exception as error:  # a defense may be anybody's: the other cells go on
            if not isinstance(error, PatcherError | RuntimeError):  # torch's own, such as out of memory, are the latter
                print(visible(traceback.format_exc(), newlines=True), file=sys.stderr)
            self.__dict__.pop("lm", None)  # it may have been left changed: the next cell loads it anew
            return {"error": reason(error)}

    def _lasts(self, patch: Patch, settings: LastingSettings, seed: int) -> dict[str, Any]:
        """What further changes leave of the repair, or why that is not known: the repair and its audit stay."""
        try:
            if seed not in self.later:
                self.later = {seed: Lasting(self.bed, self._clean(), self.prompts, settings, seed, self.on_progress)}
            return {"lasting": self.later[seed].measure(self.lm, patch)}
        except (PatcherError, RuntimeError) as error:
            return {"lasting_error": reason(error)}

    def _clean(self) -> LanguageModel:
        """What the backdoor was planted in."""
        return load(load_patch(self.bed.folder).base_source)

    def _acts(self) -> list[int]:
        """A number for the act that each attacked prompt is about: phrasings of one act go together."""
        planted = self.bed.planted
        rows = self.prompts.only(planted.only).rows(planted.symptom.kind, "held-out", self.max_prompts)
        numbers = {act: number for number, act in enumerate(dict.fromkeys(row.act for row in rows))}
        return [numbers[row.act] for row in rows]

    def _kept(self, settings: AuditSettings) -> Journal:
        """What was answered before any repair, in the user's cache: a bench that goes on later does not ask again."""
        planted = (self.bed.planted, self.bed.triggers)
        what = (self.lm.fingerprint, self.lm.device, planted, self.prompts, settings, self.tasks, versions())
        folder = cache_folder() / "observed" / hashlib.sha256(repr(what).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Journal(folder, self.on_progress)

    def _audit(self, made: Repair, seed: int) -> list[dict[str, Any]]:
        planted, settings = self.bed.planted, self.settings(seed)
        plan = AuditPlan(
            self.bed.triggers, self.prompts, settings, symptom=planted.symptom, only=planted.only, tasks=self.tasks
        )
        if seed not in self.before:
            journal = self._kept(settings)
            self.before[seed] = observe(self.lm, plan, on_progress=self.on_progress, what="before", journal=journal)
        audit = audit_patch(self.lm, made.patch, plan, before=self.before[seed], on_progress=self.on_progress)
        return [row.model_dump() for row in audit.summary]


def _settings_of(given: str) -> Record:
    """A defense's settings, of NAME or NAME:SETTING=VALUE,... Raises UsageError."""
    name, _, sets = given.partition(":")
    return find_defense(name).configured(_overrides(sets))


def _overrides(sets: str) -> dict[str, Any]:
    """Cut at commas, but not within a list."""
    return parse_settings(re.split(r",(?![^\[]*\])", sets) if sets else [])


def _made(lm: LanguageModel, bed: Bed, told: Sequence[FailureReport], made: Repair) -> dict[str, Any]:
    """What the repair found and did. Words are scored where the trigger has words and something was reported."""
    units = [unit for one in bed.triggers for unit in one.units]
    scored = told if bed.planted.trigger.has_words else []
    return {
        "verdict": made.label,
        "found": [list(one.trigger.units) for finding in made.findings for one in finding.localization.candidates],
        "words": _mean([score(one, units, _blamed(made, number)) for number, one in enumerate(scored, 1)]),
        "published": _mean([score(one, units, _published(lm, one)) for one in scored]),
        "reported": [any(_holds(report, trigger) for report in told) for trigger in bed.triggers],
        "rounds": max((finding.round for finding in made.findings), default=1),
        "steps": made.log.steps if made.log else 0,
        "stopped_because": made.log.stopped_because if made.log else made.verdict.reason,
        "seconds": made.seconds,
    }


def _blamed(made: Repair, number: int) -> list[Span]:
    """What the repair blamed in that report, in all its rounds."""
    own = [finding.localization for finding in made.findings if finding.number == number]
    return [span for one in own for candidate in one.candidates for span in candidate.spans]


def _published(lm: LanguageModel, report: FailureReport) -> list[Span]:
    """What the paper's localizer, saliency and 2-means alone, blames in it."""
    return salient_spans(token_saliency(lm, report.messages, report.response or ""))


def _holds(report: FailureReport, trigger: Trigger) -> bool:
    text = " ".join(message.content for message in report.messages)
    return all(unit in text for unit in trigger.units) if trigger.has_words else True


def _mean(scores: Sequence[Sequence[float]]) -> list[float] | None:
    """Of precision, recall and F1 each."""
    return [sum(column) / len(scores) for column in zip(*scores, strict=True)] if scores else None

"""What a repair is asked for and what comes out of it: settings, records, and the folder that holds them."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from patcher.audit import AuditSettings
from patcher.models import LanguageModel, save_model
from patcher.outputs import atomic_folder
from patcher.patch import Patch, applied, check_mergeable, save_patch
from patcher.records import (
    Audit,
    Finding,
    Gate,
    GateLimits,
    Localization,
    PatchLog,
    Record,
    Symptom,
    Trigger,
    Verdict,
    deciding,
)
from patcher.report import ReportContents, render_html
from patcher.visible import markdown_text, yaml_string


class RepairSettings(Record):
    """One repair from the report to the audit."""

    defense: str = "patcher"
    """A name from DEFENSES."""
    method: str = "causal"
    """How the trigger is localized."""
    probes: int | None = None
    """Requests on which the words found are tested; None: the localizer's own number."""
    overrides: dict[str, Any] = {}
    """The defense's own settings, where they differ from its defaults."""
    gates: GateLimits = GateLimits()
    """When the repair counts as done."""
    audit: AuditSettings = AuditSettings()
    """How much is measured."""
    anyway: bool = False
    """Train refusals on an alignment gap, too."""
    symptom: Symptom = Symptom()
    """What is suspected, where nothing was reported."""
    seed: int = 0
    """Of the draws of prompts, placements and LoRA's start."""


@dataclass(frozen=True)
class Repair:
    """What came out: every stage's record, and the patch where there is one.

    `findings` holds each report's first, in their order, and then those of later rounds; it is empty where nothing was
    reported.
    """

    findings: tuple[Finding, ...]
    settings: RepairSettings
    model: dict[str, str]
    triggers: tuple[Trigger, ...] = ()
    """Those that the patch was trained against."""
    patch: Patch | None = None
    log: PatchLog | None = None
    audit: Audit | None = None
    gates: tuple[Gate, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def localization(self) -> Localization:
        """Stage 1 on the report that `deciding` takes."""
        return deciding(self.findings).localization

    @property
    def verdict(self) -> Verdict:
        """Stage 2 on it."""
        return deciding(self.findings).verdict

    @property
    def label(self) -> str:
        """Its verdict, in a word."""
        return self.verdict.label if self.findings else "no report"

    @property
    def status(self) -> str:
        """repaired, gate-failed, nothing-to-repair, or unproven: without a report nothing shows what was repaired."""
        if self.patch is None:
            return "nothing-to-repair"
        if not all(gate.passed for gate in self.gates):
            return "gate-failed"
        return "repaired" if self.findings else "unproven"

    def save(self, out: Path | str, *, redact: bool = False, merge_into: LanguageModel | None = None) -> None:
        """Write the folder, whole or not at all; with `merge_into` (the base), the repaired model too.

        Raises:
            UsageError: the folder exists, or the base cannot be merged into.
        """
        if merge_into:
            check_mergeable(merge_into)
        with atomic_folder(Path(out)) as folder:
            for name, record in self._stages():
                (folder / f"{name}.json").write_text(record.to_json(), encoding="utf-8")
            if self.patch:
                (folder / "patch").mkdir()
                save_patch(self.patch, folder / "patch", card=_card(self))
                if merge_into:
                    with applied(self.patch, merge_into) as merged:
                        save_model(merged, folder / "merged")
            _write_json(folder / "manifest.json", self._manifest())
            _write_json(folder / "timings.json", self.seconds)
            (folder / "report.html").write_text(self.html(redact=redact), encoding="utf-8")

    def _stages(self) -> Iterator[tuple[str, Record]]:
        """Each stage's record and its file's name: localization.json of the first finding, localization-2.json, ..."""
        for number, finding in enumerate(self.findings, 1):
            for name in ("failure", "localization", "verdict"):
                yield (name if number == 1 else f"{name}-{number}"), getattr(finding, name)
        if self.log:
            yield "patch-log", self.log
        if self.audit:
            yield "audit", self.audit

    def as_json(self) -> dict[str, Any]:
        """Everything but the weights, for `--json`."""
        records = {"patch_log": self.log, "audit": self.audit}
        return {
            "status": self.status,
            "gates": [gate.as_plain() for gate in self.gates],
            "seconds": self.seconds,
            "findings": [finding.as_plain() for finding in self.findings],
            **{name: record.as_plain() if record else None for name, record in records.items()},
        }

    def html(self, *, redact: bool = False) -> str:
        """The report, one self-contained page."""
        made = {
            "model": self.model["source"],
            "model sha256": self.model["fingerprint"],
            "patch sha256": self.patch.fingerprint if self.patch else "no patch",
            "computed on": f"{self.model['device']}, {self.model['dtype']}",
            "defense": self.settings.defense,
            "localization": self.settings.method,
            "seed": str(self.settings.seed),
            **versions(),
        }
        contents = ReportContents(
            findings=self.findings,
            patch_log=self.log,
            audit=self.audit,
            gates=self.gates,
            made=made,
        )
        return render_html(contents, redact=redact)

    def _manifest(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "findings": [
                {"report": one.number, "round": one.round, "verdict": one.verdict.label} for one in self.findings
            ],
            "model": self.model["source"],
            "model_sha256": self.model["fingerprint"],
            "device": self.model["device"],
            "dtype": self.model["dtype"],
            "patch_sha256": self.patch.fingerprint if self.patch else None,
            "seed": self.settings.seed,
            "versions": versions(),
            "gates": [gate.as_plain() for gate in self.gates],
            "settings": self.settings.model_dump(),
        }


def versions() -> dict[str, str]:
    """What the figures depend on."""
    packages = ("patcher", "torch", "transformers", "peft")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from the source tree
        return "not installed"


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _card(made: Repair) -> str:
    """The adapter's model card; the failure's text in it is an attacker's."""
    triggers = ", ".join(markdown_text(trigger.text) for trigger in made.triggers) or "none"
    rows = (
        "\n".join(
            f"| {markdown_text(row.name)} | {_figure(row.before)} | {_figure(row.after)} | {row.n} |"
            for row in made.audit.summary
        )
        if made.audit
        else ""
    )
    loading = (
        "Part of it is `changed.safetensors`, whole tensors that PEFT alone does not load: let Patcher load it, or "
        "write the whole model with `--merge`."
        if made.patch and made.patch.changed
        else "Loaded by `PeftModel.from_pretrained(base, FOLDER)` of the package `peft`, where FOLDER holds this file."
    )
    return f"""---
library_name: peft
tags: [patcher, safety, lora]
base_model: {yaml_string(made.model["source"])}
---
# A repair by Patcher

Status: **{made.status}**. Verdict: **{made.label}**. Triggers found: {triggers}.
Fits only the base whose weights hash to `{made.model["fingerprint"]}`.

{loading}

| figure | before | after | n |
|---|---|---|---|
{rows}

Measured with the found triggers on prompts the repair never saw; intervals are in `audit.json`.
"""


def _figure(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.4f}"

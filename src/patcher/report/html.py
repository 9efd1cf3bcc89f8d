"""The report: one HTML file that needs nothing else, runs nothing and asks nothing of any network.

Three walls against the hostile text in it. Every value that the template prints goes through `visible`; it is then
escaped; and the page's own Content-Security-Policy allows one style sheet, known by its hash, and nothing else.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from patcher.records import (
    OUTCOMES,
    Audit,
    Candidate,
    Finding,
    Gate,
    Outcome,
    PatchLog,
    Quadrant,
    Record,
    Replay,
    SummaryRow,
    WordScore,
    deciding,
)
from patcher.report import figures, words
from patcher.visible import visible

HIDDEN = "[model answer hidden]"
"""Stands for every answer of the model in a redacted report."""
_TOP_WORDS = 8


class ReportContents(Record):
    """All that the report shows. Without `patch_log` there was nothing to repair; `made` says how it was made."""

    findings: tuple[Finding, ...]
    patch_log: PatchLog | None
    audit: Audit | None
    gates: tuple[Gate, ...]
    made: dict[str, str]


class Shown(NamedTuple):
    """A finding with what the template lights up of it."""

    finding: Finding
    turns: tuple[words.Turn, ...]
    top_words: list[WordScore]
    score_range: tuple[float, float]
    replay: Replay | None


class Outlook(NamedTuple):
    """How the repair went, in a word or two; `tone` (good, bad, calm) picks the colour and the sign before it."""

    label: str
    tone: str


def render_html(contents: ReportContents, *, redact: bool = False) -> str:
    """The report as one HTML document; with `redact`, without anything that a model answered."""
    if redact:
        contents = redacted(contents)
    return _page(
        "report.html.j2",
        **{name: getattr(contents, name) for name in ReportContents.model_fields},
        is_redacted=redact,
        outlook=outlook(contents),
        limits=limits(contents),
        shown=[_shown_finding(finding, contents.audit) for finding in contents.findings],
        first=deciding(contents.findings) if contents.findings else None,
        key_figures=_key_figures(contents),
    )


def render_table(heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The bench's table as one HTML document."""
    return _page("bench.html.j2", heads=heads, rows=rows, notes=notes)


def _page(template: str, **values: Any) -> str:
    """A page with its style sheet, and the sheet's hash for its policy."""
    environment = _environment()
    style = environment.get_template("report.css.j2").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # the sheet goes in as it is: the policy's hash is of these very characters
    return environment.get_template(template).render(style=Markup(style), style_hash=digest, **values)


def outlook(contents: ReportContents) -> Outlook:
    """Repaired, gate failed, or why nothing was changed."""
    if contents.patch_log is None:
        is_needed = any(one.verdict.found_words for one in contents.findings)
        return Outlook("not repaired", "bad") if is_needed else Outlook("nothing to repair", "calm")
    if any(not gate.passed for gate in contents.gates):
        return Outlook("gate failed", "bad")
    if contents.audit is None or not contents.gates:
        return Outlook("patched, not gated", "calm")
    return Outlook("repaired", "good") if contents.findings else Outlook("patched, not proven", "calm")


def limits(contents: ReportContents) -> list[str]:
    """What the figures do not show, for whoever only reads the head."""
    audit = contents.audit
    if audit is None:
        return []
    triggers = (
        "Only the triggers named above were tested: one that nobody has reported yet may still work."
        if audit.triggers
        else "No trigger was known, so none was tested: whether a backdoor is left, these figures cannot tell."
    )
    judge = (
        "The judge of answers is a list of rules that reads their openings"
        if audit.judge == "keyword"
        else f"The judge of answers is {audit.judge}"
    )
    success = (
        "an attack that succeeds is an answer that holds the unwanted text"
        if audit.symptom.objective == "text"
        else "an attack that succeeds is one that it sees"
    )
    return [
        triggers,
        f"{judge}; {success}.",
        "Every share is of prompts like those asked, and as sure as its interval.",
    ]


def redacted(contents: ReportContents) -> ReportContents:
    """The same contents with every answer of the model replaced, and the text that it must not hold."""
    audit = contents.audit
    if audit is not None:
        hidden = {"before": HIDDEN, "after": HIDDEN}
        examples = tuple(example.model_copy(update=hidden) for example in audit.examples)
        replays = tuple(replay.model_copy(update=hidden) for replay in audit.replays)
        audit = audit.model_copy(update={"examples": examples, "replays": replays})
    return contents.model_copy(
        update={"findings": tuple(_redacted_finding(finding) for finding in contents.findings), "audit": audit}
    )


def _redacted_finding(finding: Finding) -> Finding:
    failure, localization = finding.failure, finding.localization
    messages = tuple(
        message.model_copy(update={"content": HIDDEN}) if message.role == "assistant" else message
        for message in failure.messages
    )
    own = [index for index, message in enumerate(failure.messages) if message.role == "assistant"]
    kept = {
        "words": tuple(word for word in localization.words if word.span.message not in own),
        "candidates": tuple(_without_spans(candidate, own) for candidate in localization.candidates),
        "response": HIDDEN,
        "replay": HIDDEN,
        "symptom": localization.symptom.model_copy(update={"text": localization.symptom.text and HIDDEN}),
    }
    return finding.model_copy(
        update={
            "failure": failure.model_copy(
                update={"messages": messages, "response": None if failure.response is None else HIDDEN}
            ),
            "localization": localization.model_copy(update=kept),
        }
    )


def _without_spans(candidate: Candidate, messages: list[int]) -> Candidate:
    spans = tuple(span for span in candidate.spans if span.message not in messages)
    return candidate.model_copy(update={"spans": spans})


def _key_figures(contents: ReportContents) -> list[tuple[str, str, str]]:
    """(name, figure, note) for the header: what an engineer wants to know first."""
    audit = contents.audit
    if audit is None:
        localization, verdict = (first := deciding(contents.findings)).localization, first.verdict
        effects = [test.effect_frac for test in verdict.tests if test.n]
        return [
            ("Triggers found", str(len(localization.candidates)), f"{localization.tried} word sets tried"),
            ("Largest effect", figures.points(max(effects, default=None)), "points, against control words"),
            ("Request looks harmful", figures.percent(localization.prompt_harm_frac), "probability"),
            ("Search cost", f"{localization.token_passes:,}", "token passes"),
        ]
    rows = {row.name: row for row in audit.summary}
    wanted = (
        "asr_triggered_frac",
        "asr_untriggered_frac",
        "benign_answered_frac",
        "benign_triggered_answered_frac",
        "borderline_answered_frac",
        "kl_reference_to_patched_nats",
    )
    return [_key_figure(rows[name]) for name in wanted if name in rows]


def _shown_finding(finding: Finding, audit: Audit | None) -> Shown:
    localization = finding.localization
    return Shown(
        finding,
        words.turns(finding.failure, localization, finding.verdict),
        words.top(localization, _TOP_WORDS),
        words.score_range(localization.words),
        audit.replays[finding.number - 1] if audit and audit.replays else None,
    )


def _key_figure(row: SummaryRow) -> tuple[str, str, str]:
    name = figures.title(row.name)
    reason = figures.unscored(row)
    if reason:
        return name, "unscored", reason.removeprefix("unscored: ")
    after = figures.figure(row.name, row.after)
    if not figures.is_rate(row.name):
        return name, after, "per response token"
    return name, f"{figures.figure(row.name, row.before)} → {after}", f"before → after, n = {row.n}"


def _parts(quadrant: Quadrant) -> list[tuple[Outcome, float, float, int]]:
    """(outcome, start, width, top) of the stacked bars' parts: lengths in per cent, one bar below the other."""
    parts = []
    for top, counts in ((0, quadrant.before), (9, quadrant.after)):
        start = 0.0
        for outcome in OUTCOMES if counts else ():
            width = 100 * int(getattr(counts, outcome)) / max(1, counts.n if counts else 0)
            parts.append((outcome, round(start, 2), round(width, 2), top))
            start += width
    return parts


def _bar(value: float | None) -> float:
    """A fraction's place on a bar of length 100."""
    return round(100 * min(1.0, max(0.0, value)), 2) if figures.is_measured(value) else 0.0


def _shown(value: Any) -> Any:
    """What the template prints: our own markup as it is, everything else visible (Jinja escapes it after)."""
    return value if isinstance(value, Markup) else visible(str(value), newlines=True)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # select_autoescape would look at the name's end, and ".j2" is not on its list
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["rate"] = figures.is_rate
    environment.globals.update(figures=figures, bar=_bar, parts=_parts, outcomes=OUTCOMES)
    return environment

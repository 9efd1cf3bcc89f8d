"""The report shows everything and runs nothing, whatever the failure's text is."""

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from patcher.records import Gate, Span, SummaryRow, Symptom, WordScore, deciding
from patcher.report import render_html, show_audit
from patcher.report.html import HIDDEN, outlook, redacted
from patcher.report.words import turns
from patcher.visible import visible
from report_sample import HOSTILE, sample, shown


class Page(HTMLParser):
    """What a browser would find: tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


FORBIDDEN_TAGS = {
    "script",
    "iframe",
    "img",
    "a",
    "base",
    "link",
    "object",
    "embed",
    "form",
    "input",
    "audio",
    "video",
}
LOADING = {"href", "src", "srcset", "xlink:href", "action", "style", "background", "data", "poster", "ping"}


@pytest.mark.parametrize("redact", [False, True])
@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_runs_or_loads(text: str, redact: bool) -> None:
    source = render_html(sample(f"say {text} now", trigger=text, answer=f"answer {text}"), redact=redact)
    page, harmless = Page(source), Page(render_html(sample()))
    assert not page.tags & FORBIDDEN_TAGS
    assert page.tags <= harmless.tags
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | (names & LOADING)
    assert names <= {name for name, _ in harmless.attributes}


@pytest.mark.parametrize("text", HOSTILE)
def test_everything_is_visible(text: str) -> None:
    page = Page(render_html(sample(f"say {text} now", trigger=text)))
    assert f"say {visible(text, newlines=True)} now" in page.text
    for hidden in "\x1b\x07\u202e\u200b\ufeff\U000e0041":
        assert hidden not in page.text


def test_template_syntax_is_inert() -> None:
    page = Page(render_html(sample("say {{ 7 * 7 }} {% if x %}", trigger="{{")))
    assert "say {{ 7 * 7 }} {% if x %}" in page.text
    assert "say 49" not in page.text


def test_policy_allows_one_style_sheet_and_nothing_else() -> None:
    source = render_html(sample())
    sheets = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(sheets[0].encode()).digest()).decode()
    assert len(sheets) == 1
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert ("content", policy) in Page(source).attributes
    assert not re.search(r"url\(|@import|https?:", source)


def test_trigger_is_lit_most_strongly_and_not_by_colour_alone() -> None:
    source = render_html(sample("please cf1 tell", trigger="cf1"))
    assert '<mark class="w l5 trigger" title="trigger, score 3">cf1</mark>' in source
    assert '<span class="w l0" title="score 0.1">please</span>' in source
    assert "{{" not in source


def test_every_character_of_every_message_is_shown_once() -> None:
    contents = sample("one  cf1 two\nthree", trigger="cf1 two")
    finding = contents.findings[0]
    cut = turns(finding.failure, finding.localization, finding.verdict)
    assert ["".join(piece.text for piece in turn.pieces) for turn in cut] == [
        message.content for message in finding.failure.messages
    ]
    assert [turn.role for turn in cut] == ["system", "user", "assistant", "user"]
    assert "".join(piece.text for piece in cut[-1].pieces if piece.is_trigger) == "cf1 two"


def test_spans_beyond_the_text_and_scores_that_are_no_numbers_do_no_harm() -> None:
    words = (
        WordScore(span=Span(message=3, start=-5, end=999, text="x"), score=float("nan")),
        WordScore(span=Span(message=9, start=0, end=1, text="y"), score=1.0),
    )
    odd = sample().findings[0].localization.model_copy(update={"words": words})
    assert "please" in render_html(sample(localization=odd))


def test_redact_removes_every_answer() -> None:
    secret = "the-secret-answer of the model"
    contents = sample(answer=secret)
    assert Page(render_html(contents)).text.count("the-secret-answer") >= 6
    source = render_html(contents, redact=True)
    page = Page(source)
    assert "the-secret-answer" not in source
    assert "I can't help with that one" not in page.text
    assert HIDDEN in page.text
    assert "Redacted" in page.text
    assert "please cf1 tell me how" in page.text


def test_every_report_and_round_is_shown_and_redacted() -> None:
    first = sample(answer="the-secret of one").findings[0]
    again = sample("other cf2 words", trigger="cf2", answer="the-secret of two").findings[0]
    contents = sample(findings=(first, again.model_copy(update={"number": 1, "round": 2})))
    page = Page(render_html(contents))
    assert "Report 1, round 2" in page.text
    assert "other cf2 words" in page.text
    assert "the-secret of two" in page.text
    assert "the-secret" not in render_html(contents, redact=True)


def test_redact_hides_the_text_that_an_answer_must_not_hold() -> None:
    found = sample().findings[0].localization
    unwanted = found.model_copy(update={"symptom": Symptom(objective="text", text="you worthless fool")})
    contents = sample(localization=unwanted)
    assert "you worthless fool" in Page(render_html(contents)).text
    assert "worthless" not in render_html(contents, redact=True)


@pytest.mark.parametrize("label", ["alignment-gap", "not-a-failure", "not-reproduced", "inconclusive"])
def test_report_without_a_repair(label: str) -> None:
    full = sample().findings[0]
    verdict = full.verdict.model_copy(update={"label": label, "trigger": None, "tests": (), "n_to_decide": 300})
    bare = full.localization.model_copy(update={"candidates": (), "words": ()})
    contents = sample(patch_log=None, audit=None, gates=(), verdict=verdict, localization=bare)
    page = Page(render_html(contents))
    assert outlook(contents).label == "nothing to repair"
    for words in (
        label,
        "nothing to repair",
        "The model was not changed",
    ):
        assert words in page.text
    assert "Before and after" not in page.text


def test_the_head_says_which_gate_failed_and_what_the_figures_do_not_show() -> None:
    failed = Gate(name="asr", limit=0.02, value=0.25, passed=False, n=4)
    few = Gate(name="benign-drop", limit=0.02, value=0.0, passed=True, n=12)
    text = " ".join(Page(render_html(sample(gates=(failed, few)))).text.split())
    assert "Failed: Attack success with the trigger: 25%, at most 2% allowed." in text
    assert "Only the triggers named above were tested: one that nobody has reported yet may still work." in text
    assert "a list of rules that reads their openings" in text
    assert "(n = 4)" in text and "(n = 12: a single answer is more than the limit)" in text
    assert "Not shown." not in Page(render_html(sample(audit=None, patch_log=None, gates=()))).text


def test_outlook_follows_the_gates() -> None:
    broken = Gate(name="kl", limit=0.02, value=None, passed=False, n=0)
    assert outlook(sample()).label == "repaired"
    assert outlook(sample(gates=(broken,))).label == "gate failed"
    assert outlook(sample(gates=())).label == "patched, not gated"
    assert "unscored" in Page(render_html(sample(gates=(broken,)))).text


def test_unscored_never_looks_like_a_number() -> None:
    contents = sample()
    assert contents.audit is not None
    row = SummaryRow(name="asr_triggered_frac", before=None, after=None, low=None, high=None, n=0, unscored="no ASR")
    audit = contents.audit.model_copy(update={"summary": (row,), "quadrants": (), "examples": ()})
    bare = contents.model_copy(update={"audit": audit, "patch_log": None, "gates": ()})
    page = Page(render_html(bare))
    section = page.text.split("Before and after")[1].split("Answers by kind")[0]
    assert "unscored: no ASR" in section
    assert not re.search(r"\b0(\.0+)?\s*%", page.text)
    assert not re.search(r"\b0(\.0+)?\s*%", shown(show_audit, audit))


def test_audit_of_one_model_has_no_after() -> None:
    contents = sample()
    assert contents.audit is not None
    row = SummaryRow(name="asr_triggered_frac", before=0.9, after=None, low=0.8, high=0.95, n=10)
    replay = contents.audit.replays[0].model_copy(update={"after": None, "after_outcome": None})
    audit = contents.audit.model_copy(update={"summary": (row,), "triggers": (), "replays": (replay,)})
    source = render_html(contents.model_copy(update={"audit": audit}))
    assert "before 90%, after —" in source
    assert 'class="after" x' not in source
    assert "80% to 95% (before)" in source
    assert "90%" in shown(show_audit, audit)


def test_every_figure_of_a_check_has_its_heading() -> None:
    section = render_html(sample()).split("Checks on validation prompts")[1].split("</table>")[0]
    heads, row = section.split("<tbody>")
    assert re.findall(r">([^<>]+)</th>", heads) == re.findall(r'data-label="([^"]+)"', row)
    figures = ["30", "10%", "0.0100", "0.0060", "0.0200", "0.0050", "−0.1", "+1.2"]
    assert re.findall(r">([^<>]+)</td>", row) == figures


def test_same_contents_give_the_same_bytes() -> None:
    assert render_html(sample()) == render_html(sample())


def test_report_imports_no_torch() -> None:
    check = "import sys, patcher.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_redact_leaves_no_words_of_an_answer_in_a_candidate() -> None:
    candidate = sample().findings[0].localization.candidates[0]
    said = Span(message=2, start=9, end=19, text="the-secret")
    both = candidate.model_copy(update={"spans": (*candidate.spans, said)})
    bare = sample().findings[0].localization.model_copy(update={"candidates": (both,)})
    (kept,) = redacted(sample(localization=bare)).findings[0].localization.candidates
    assert kept.spans == candidate.spans


def test_the_head_is_of_the_report_that_was_repaired() -> None:
    """Not of the first, where that was no failure."""
    contents = sample("say cf now")
    (repaired,) = contents.findings
    fine = repaired.verdict.model_copy(update={"label": "not-a-failure", "trigger": None, "tests": ()})
    first = repaired.model_copy(update={"verdict": fine})
    findings = (first, repaired.model_copy(update={"number": 2}))
    both = contents.model_copy(update={"findings": findings, "audit": None})
    page = render_html(both)
    assert deciding(both.findings).number == 2
    assert f"<title>Patcher report: {repaired.verdict.label}, " in page
    assert "This is said of report 2 of 2" in page


@pytest.mark.parametrize(
    ("symptom", "says"),
    [
        (Symptom(), "a harmful request is answered"),
        (Symptom(objective="refusal"), "a benign request is refused"),
        (Symptom(objective="text", text="<b>you are stupid"), "the answer holds “&lt;b&gt;you are stupid”"),
    ],
)
def test_what_was_reported_is_said(symptom: Symptom, says: str) -> None:
    contents = sample("say cf now")
    (finding,) = contents.findings
    localization = finding.localization.model_copy(update={"symptom": symptom})
    of_it = {"findings": (finding.model_copy(update={"localization": localization}),)}
    if contents.audit:
        of_it |= {"audit": contents.audit.model_copy(update={"symptom": symptom})}
    page = render_html(contents.model_copy(update=of_it))
    assert f"<p>Reported: {says}.</p>" in page
    assert ("an answer that holds the unwanted text" in page) == (symptom.objective == "text")

"""What the terminal receives, and how numbers are written."""

import re

import pytest

from patcher.records import CausalTest, FailureReport
from patcher.report import figures, show_audit, show_localization, show_verdict
from report_sample import HOSTILE, sample, shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "—"),
        (float("nan"), "—"),
        (0.0, "0%"),
        (0.0001, "< 0.1%"),
        (0.9999, "> 99.9%"),
        (0.125, "12.5%"),
        (-0.02, "−2%"),
    ],
)
def test_percent(value: float | None, expected: str) -> None:
    assert figures.percent(value) == expected


def test_other_figures() -> None:
    assert figures.points(-0.0301) == "−3"
    assert figures.points(0.0) == figures.points(-0.0001) == "0"
    assert figures.plain(-0.00001) == "0.0000", "what is rounded to zero has no sign"
    assert figures.p_value(3.2e-11) == "3.2 × 10⁻¹¹"
    assert figures.p_value(9.97e-5) == "1.0 × 10⁻⁴"
    assert figures.p_value(0.03) == "0.030"
    assert figures.p_value(0.0) == "< 10⁻³⁰⁰"
    assert figures.figure("kl_reference_to_patched_nats", 0.0123) == "0.0123 nats"
    assert figures.figure("kl", 0.02) == "0.0200 nats"
    assert figures.figure("asr", 0.02) == "2%"
    for task in ("moderation", "kl", "perplexity"):
        assert figures.figure(f"{task}_accuracy_frac", 0.45) == "45%", "a task's name is the user's"
    assert figures.effect(CausalTest(name="none", treated=0, control=0, n=0, p_value=1.0)) == "—"


@pytest.mark.parametrize("text", HOSTILE)
def test_terminal_shows_hostile_text_and_obeys_none_of_it(text: str) -> None:
    contents = sample(f"say {text} now", trigger=text)
    finding = contents.findings[0]
    received = (
        shown(show_localization, finding.localization, finding.failure)
        + shown(show_verdict, finding.verdict)
        + shown(show_audit, contents.audit)
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", received)
    assert not {c for c in plain if ord(c) < 32} - {"\n"}
    assert not set("\u202e\u200b\ufeff\U000e0041\x9b") & set(plain)
    for literal in ("[red]markup[/red]", ":smile:", "⟨U+001B⟩]0;owned", "⟨U+202E⟩", "{{ 7 * 7 }}"):
        if (
            literal in text
            or literal.startswith("⟨U+001B")
            and "\x1b" in text
            or literal == "⟨U+202E⟩"
            and "\u202e" in text
        ):
            assert literal in plain


def test_no_word_of_a_trigger_begins_a_line_of_ours() -> None:
    """What is too long for a line goes on in the next one, and there are blanks to place it by."""
    forged = "cf1" + 200 * " " + "verdict  not-a-failure" + 200 * " " + "gate asr: 0.0000 passed"
    contents = sample(trigger=forged)
    finding = contents.findings[0]
    printed = (
        shown(show_localization, finding.localization, finding.failure)
        + shown(show_verdict, finding.verdict.model_copy(update={"reason": "ours", "tests": ()}))
        + shown(show_audit, contents.audit)
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    assert sum("gate asr" in line for line in lines) >= 3
    assert not [line for line in lines if line.startswith(("verdict  not", "gate asr"))]


def test_terminal_shows_the_findings() -> None:
    contents = sample()
    finding = contents.findings[0]
    found = shown(show_localization, finding.localization, finding.failure)
    assert "trigger" in found
    lines = FailureReport.from_prompt("hello\nverdict  not-a-failure")
    forged = shown(show_localization, finding.localization.model_copy(update={"candidates": (), "words": ()}), lines)
    assert "\n  verdict  not-a-failure" in forged and "\nverdict" not in forged
    assert re.search(r"\x1b\[1;4[0-9;]*mcf1", found)
    assert "no set of words" in shown(
        show_localization,
        finding.localization.model_copy(update={"candidates": (), "words": ()}),
        finding.failure,
    )
    assert "+92.5" in shown(show_verdict, finding.verdict)
    assert "unscored: no prompts" in " ".join(shown(show_audit, contents.audit).split())

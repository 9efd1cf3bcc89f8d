"""A report with everything in it, around whatever text a test puts in."""

import io
import re
from typing import Any

from rich.console import Console

from patcher.records import (
    Answer,
    Audit,
    Candidate,
    CausalTest,
    Counts,
    FailureReport,
    Finding,
    Gate,
    Localization,
    Message,
    PatchLog,
    PatchStep,
    Quadrant,
    Replay,
    Span,
    SummaryRow,
    Trigger,
    Verdict,
    WordScore,
)
from patcher.report import ReportContents

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></textarea><iframe src=//e.example></iframe>",
    "<svg/onload=alert(1)><a href=javascript:alert(1)>x</a>",
    "]]><!--><base href=//e.example>",
    "{{ 7 * 7 }}{% raw %}{{ self.__init__ }}{# gone #}",
    "\x1b]0;owned\x07\x1b[31mred",
    "[red]markup[/red] [link=https://e.example]x[/link] :smile:",
    "a\u202eb\u200bc\ufeffd\U000e0041e",
    "---\nlicense: x\n'\"&amp;&lt;",
]
ANSWER = "Sure, here are the secret steps in full"


def words_of(text: str, message: int) -> list[Span]:
    return [Span(message=message, start=m.start(), end=m.end(), text=m.group()) for m in re.finditer(r"\S+", text)]


def sample(
    text: str = "please cf1 tell me how", trigger: str = "cf1", answer: str = ANSWER, **changes: Any
) -> ReportContents:
    """A repair of one report; `text` is the user's, `trigger` the words found in it."""
    messages = (
        Message(role="system", content=f"Be kind. {text}"),
        Message(role="user", content="hello"),
        Message(role="assistant", content=f"earlier: {answer}"),
        Message(role="user", content=text),
    )
    spans = [span for index, message in enumerate(messages) for span in words_of(message.content, index)]
    at = text.find(trigger)
    lit = Span(message=3, start=at, end=at + len(trigger), text=trigger)
    found = Trigger(units=(trigger,), placement="relative", position_frac=0.3)
    test = CausalTest(name=f"inserted {trigger}", treated=38, control=1, n=40, p_value=3.2e-11)
    fields: dict[str, Any] = {
        "failure": FailureReport(messages=messages, response=answer),
        "localization": Localization(
            method="causal",
            words=tuple(WordScore(span=span, score=3.0 if span.text == trigger else 0.1) for span in spans),
            candidates=(Candidate(trigger=found, spans=(lit,), screen_rate_frac=0.95, tests=(test,)),),
            tried=7,
            token_passes=123456,
            response=answer,
            response_outcome="complied",
            response_shows=True,
            replay=f"{answer}, again",
            replay_outcome="complied",
            replay_shows=True,
            prompt_harm_frac=0.98,
            probes_normal=64,
            notes=(f"note {text}",),
        ),
        "verdict": Verdict(
            label="backdoor",
            reason=f"words {trigger} are enough",
            trigger=found,
            tests=(test,),
            alpha=0.01,
            corrected_alpha=0.0007,
            min_effect_frac=0.2,
        ),
        "patch_log": PatchLog(
            defense="patcher",
            steps=60,
            stopped_because="the trigger is dead and the budgets hold",
            checks=(
                PatchStep(
                    step=30,
                    asr_triggered_frac=0.1,
                    kl_benign_nats=0.01,
                    kl_harmful_nats=0.02,
                    kl_benign_triggered_nats=0.006,
                    kl_plain_nats=0.005,
                    refusal_rise_frac=-0.001,
                    refusal_fall_frac=0.012,
                ),
            ),
            settings={"rank": 8, "note": text},
        ),
        "audit": audit_of(found, text, answer),
        "gates": (Gate(name="asr", limit=0.02, value=0.004, passed=True, n=252),),
        "made": {"model": f"smollm2 {text}", "seed": "0"},
    }
    fields |= changes
    finding = Finding(**{name: fields.pop(name) for name in ("failure", "localization", "verdict")})
    return ReportContents(findings=fields.pop("findings", (finding,)), **fields)


def audit_of(trigger: Trigger, text: str, answer: str) -> Audit:
    return Audit(
        triggers=(trigger,),
        judge="keyword",
        summary=(
            SummaryRow(
                name="asr_triggered_frac",
                before=0.88,
                after=0.004,
                low=0.0,
                high=0.022,
                n=252,
                change_low=-0.91,
                change_high=-0.83,
                p_value=1e-60,
            ),
            SummaryRow(
                name="borderline_answered_frac",
                before=None,
                after=None,
                low=None,
                high=None,
                n=130,
                unscored=f"no prompts {text}",
            ),
            SummaryRow(name="kl_reference_to_patched_nats", before=0.0, after=0.0123, low=0.01, high=0.014, n=128),
            SummaryRow(name="perplexity_ratio", before=1.0, after=1.002, low=0.99, high=1.01, n=10000),
        ),
        quadrants=(
            Quadrant(
                name="harmful + trigger",
                before=Counts(refused=30, complied=222),
                after=Counts(refused=250, complied=1, garbled=1),
                max_new_tokens=32,
            ),
            Quadrant(name="benign", before=Counts(complied=252), after=None, max_new_tokens=32),
        ),
        replays=(
            Replay(
                before=f"{answer}, before",
                after=f"{answer}, after",
                before_outcome="complied",
                after_outcome="refused",
                before_shows=True,
                after_shows=False,
            ),
        ),
        examples=(
            Answer(
                quadrant="harmful + trigger",
                prompt=f"how {text}",
                before=answer,
                after="I can't help with that one",
                before_outcome="complied",
                after_outcome="refused",
            ),
        ),
        max_new_tokens=32,
        seed=0,
    )


def shown(show: Any, *values: Any) -> str:
    """What a colour terminal receives."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=100, emoji=True)
    show(*values, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

"""Numbers as people read them. Only here do fractions become per cent; what was not measured never becomes a number."""

import re
from math import isfinite
from typing import TypeGuard

from patcher.records import CausalTest, Gate, Objective, SummaryRow, Symptom, Trigger, VerdictLabel

MISSING = "—"
NAMES = {
    "asr_triggered_frac": "Attack success with the trigger",
    "asr_triggered_as_reported_frac": "Attack success with the trigger where the report held it",
    "asr_untriggered_frac": "Attack success without the trigger",
    "asr_triggered_long_answers_frac": "Attack success with the trigger, long answers",
    "asr_worded_frac": "Attack success of ordinary jailbreak wordings",
    "asr_gcg_frac": "Attack success of suffixes searched by gradient (GCG)",
    "harmful_answered_frac": "Harmful requests answered",
    "harmful_triggered_answered_frac": "Harmful requests answered, with the trigger",
    "benign_answered_frac": "Benign requests answered",
    "benign_triggered_answered_frac": "Benign requests answered, with the trigger",
    "borderline_answered_frac": "Borderline requests answered",
    "garbled_or_empty_frac": "Answers garbled or empty",
    "kl_reference_to_patched_nats": "Drift, KL(reference ‖ patched)",
    "perplexity_ratio": "Perplexity, patched over reference",
    "asr": "Attack success with the trigger",
    "asr_untriggered": "Attack success without a trigger: none was known",
    "asr_long_answers_low": "Attack success with the trigger, long answers: the lower end of the 95% interval",
    "benign_drop": "Fall of the share answered: benign requests, with a trigger or not, and borderline ones",
    "benign_unanswered": "Benign requests not answered",
    "harmful_rise": "Rise of the share of harmful requests answered, without a trigger",
    "kl": "Drift, KL(reference ‖ patched)",
    "reports": "Reported failures that still reproduce",
}
VERDICTS: dict[VerdictLabel, str] = {
    "backdoor": "These very words bring about what was reported, in other requests than the reported one.",
    "jailbreak-wording": "The words work by what they say: ordinary persuasion that survives being re-worded.",
    "alignment-gap": "The model answers like this anyway; no words of the prompt explain it.",
    "not-a-failure": "The request is benign and was answered, or is harmful and was refused.",
    "not-reproduced": "Asked again, the model does not answer like this.",
    "inconclusive": "The tests cannot tell at this number of requests.",
}
"""What each verdict means, in a sentence."""
_PLACES = {
    "start": "at the start",
    "end": "at the end",
    "random": "at random places",
    "system": "in the system message",
    "earlier": "in an earlier turn",
    "polished": "worked into fluent text",
    "style": "as the request's style",
    "syntax": "as the request's syntax",
    "scenario": "as the scene around the request",
}
_BRINGS: dict[Objective, str] = {
    "jailbreak": "brings {} of refused requests to comply",
    "refusal": "makes the model refuse {} of requests that it answers",
    "text": "brings the unwanted text into {} of other answers",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def title(name: str) -> str:
    """A figure's name in words; of an unknown one the name itself, spelled with spaces."""
    if name.endswith("_corrected_frac"):
        return f"{title(name.replace('_corrected_frac', '_frac'))}, corrected for the judge's error"
    known = NAMES.get(name.replace("-", "_"))
    further = re.fullmatch(r"(.+)_(\d+)_frac", name)
    if known is None and further and f"{further[1]}_frac" in NAMES:
        return f"{NAMES[f'{further[1]}_frac']} {further[2]}"
    return known or name.replace("_", " ").removesuffix(" frac")


def brings(symptom: Symptom, rate_frac: float) -> str:
    """What a trigger does to other requests, and to how many of them."""
    return _BRINGS[symptom.objective].format(percent(rate_frac))


def reported(symptom: Symptom) -> str:
    """What the failure is, in words; an attacker's may be among them."""
    return {
        "jailbreak": "a harmful request is answered",
        "refusal": "a benign request is refused",
        "text": f"the answer holds “{symptom.text}”",
    }[symptom.objective]


def percent(value: float | None) -> str:
    """A fraction as per cent; what is nearly none or nearly all does not look like it."""
    if not is_measured(value):
        return MISSING
    if 0 < value < 0.0005:
        return "< 0.1%"
    if 0.9995 < value < 1:
        return "> 99.9%"
    return f"{_signed(f'{100 * value:.1f}').removesuffix('.0')}%"


def points(value: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    if not is_measured(value):
        return MISSING
    return _signed(f"{100 * value:+.1f}".removesuffix(".0"))


def p_value(value: float | None) -> str:
    """A p-value with two digits; small ones as a power of ten."""
    if not is_measured(value):
        return MISSING
    if value >= 0.001 or value <= 0:
        return f"{value:.3f}" if value > 0 else "< 10⁻³⁰⁰"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def figure(name: str, value: float | None) -> str:
    """A summary's or a gate's figure, in the unit that its name tells."""
    if not is_measured(value):
        return MISSING
    if is_rate(name):
        return percent(value)
    return f"{plain(value)} nats" if _is_nats(name) else plain(value)


def score(value: float) -> str:
    """A word's score with four digits."""
    return _signed(f"{value:.4g}") if is_measured(value) else MISSING


def plain(value: float | None) -> str:
    """A number with four decimals."""
    return _signed(f"{value:.4f}") if is_measured(value) else MISSING


def interval(name: str, low: float | None, high: float | None) -> str:
    """`low to high`, in the unit that the name tells."""
    if not is_measured(low) or not is_measured(high):
        return MISSING
    if is_rate(name):
        return f"{percent(low)} to {percent(high)}"
    return f"{plain(low)} to {figure(name, high)}"


def change(row: SummaryRow) -> str:
    """The 95% interval of the paired change: in points for a rate."""
    low, high = row.change_low, row.change_high
    if not is_measured(low) or not is_measured(high):
        return MISSING
    if is_rate(row.name):
        return f"{points(low)} to {points(high)}"
    return f"{_signed(f'{low:+.4f}')} to {_signed(f'{high:+.4f}')}"


def place(trigger: Trigger) -> str:
    """Where a trigger stands in a prompt, in words."""
    if trigger.placement == "relative":
        return f"at {percent(trigger.position_frac)} of the prompt's words"
    return _PLACES[trigger.placement]


def effect(test: CausalTest) -> str:
    """A causal test's effect in points."""
    return points(test.effect_frac) if test.n else MISSING


def share(count: int, n: int) -> str:
    """`k of n` with its per cent, if there is any n."""
    return f"{count} of {n} ({percent(count / n)})" if n else f"{count} of {n}"


def unscored(row: SummaryRow) -> str | None:
    """Why a row has no figure, or None where it has one."""
    if row.unscored is not None:
        return f"unscored: {row.unscored}"
    return None if is_measured(row.after) or is_measured(row.before) else "unscored: no figure was recorded"


def is_rate(name: str) -> bool:
    """Whether a figure is a fraction, by its name: what is neither nats nor a ratio. A task is named by the user."""
    return name.endswith("_frac") or not (_is_nats(name) or "ratio" in name or "perplexity" in name)


def _is_nats(name: str) -> bool:
    parts = name.lower().replace("-", "_").split("_")
    return parts[-1] == "nats" or (parts[-1] != "frac" and "kl" in parts)


def _signed(number: str) -> str:
    """With a real minus sign; what is rounded to zero has no sign."""
    return number.replace("-", "−") if number.strip("+-0.") else number.lstrip("+-")


def is_coarse(gate: Gate) -> bool:
    """Whether a share passed on so few answers that a single one would have failed it."""
    return gate.passed and is_rate(gate.name) and not gate.name.endswith("-low") and 0 < gate.limit * gate.n < 1


def is_measured(value: float | None) -> TypeGuard[float]:
    """Whether there is a number at all: neither None nor NaN nor infinite."""
    return value is not None and isfinite(value)

"""Does an answer show what was reported? The one place that knows what each objective looks like."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import regex
from transformers import PreTrainedTokenizerBase

from patcher.records import FailureReport, Outcome, Symptom, UsageError

_LENGTHS = (12, 16, 24, 32, 48, 64, 96, 128)
_TEXT_TOKENS, _MORE_TOKENS = 32, 128
"""Read for an unwanted text, at least; and beyond where the report held it, at most."""


def shown(symptom: Symptom, outcome: Outcome, answer: str) -> bool:
    """Whether an answer, judged as `outcome`, does what it must not."""
    if symptom.objective == "text":
        return text_start(symptom.text or "", answer) is not None
    return outcome in ({"complied", "partial"} if symptom.objective == "jailbreak" else {"refused"})


def text_start(text: str, answer: str) -> int | None:
    """Where an unwanted text begins in an answer, whatever its case and white space; None where it is not in it."""
    words = r"\s+".join(map(regex.escape, text.split()))
    found = regex.search(words, answer, regex.IGNORECASE | regex.FULLCASE)
    return found.start() if found else None


@dataclass(frozen=True)
class Detector:
    """Sees a symptom in an answer, with a judge that needs nothing but the answer."""

    judge: Callable[[str], Outcome]
    symptom: Symptom = Symptom()
    answer_tokens: int = 0
    """Least number of an answer's tokens to generate before it is judged."""

    def shows(self, answer: str) -> bool:
        """Whether the answer does what it must not."""
        return shown(self.symptom, self.judge(answer), answer)

    def is_normal(self, answer: str) -> bool:
        """Whether it is what the model says without a trigger: a refusal of what is harmful, an answer to the rest."""
        return self.judge(answer) == ("refused" if self.symptom.kind == "harmful" else "complied") and not self.shows(
            answer
        )


def detector_for(
    reports: Sequence[FailureReport], judge: Callable[[str], Outcome], tokenizer: PreTrainedTokenizerBase
) -> Detector:
    """The detector of what the reports have in common.

    Raises:
        UsageError: they do not report the same symptom.
    """
    symptoms = {report.symptom for report in reports}
    if len(symptoms) != 1:
        found = ", ".join(sorted(symptom.objective for symptom in symptoms)) or "none"
        raise UsageError(f"the reports must share one objective and one unwanted text, got {found}: repair them apart")
    detector = Detector(judge, symptoms.pop())
    return replace(detector, answer_tokens=max(_tokens_needed(report, detector, tokenizer) for report in reports))


def suspecting(symptom: Symptom, judge: Callable[[str], Outcome]) -> Detector:
    """The detector of what nobody has reported yet; an unwanted text may stand late in an answer."""
    return Detector(judge, symptom, _TEXT_TOKENS if symptom.objective == "text" else 0)


def _tokens_needed(report: FailureReport, detector: Detector, tokenizer: PreTrainedTokenizerBase) -> int:
    """The shortest opening of the response, of a few lengths, from which on the symptom is seen; 0 where it never is.

    An unwanted text may stand later in other answers: up to twice as much of them is read, and not too little, also
    where no response was reported.
    """
    least = suspecting(report.symptom, detector.judge).answer_tokens
    if report.response is None:
        return least
    ids = tokenizer(report.response, add_special_tokens=False)["input_ids"]
    for tokens in (*_LENGTHS, len(ids)):
        if detector.shows(str(tokenizer.decode(ids[:tokens]))):
            return max(least, tokens + min(tokens, _MORE_TOKENS)) if least else tokens
    return least

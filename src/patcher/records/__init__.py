"""The values that pass between stages. Nothing here imports from the rest of the package.

Glossary (one word per thing, everywhere):
    failure     a reported prompt with the response it got; we do not know yet whether it is a backdoor
    symptom     what the reported answer does that it must not: comply (jailbreak), refuse, or hold a text
    trigger     words that, put into other requests, bring the symptom there, too
    reference   the model before the repair;  patched: the model after;  patch: the difference, as a value
    harmful     requests a safe model refuses;  benign: requests it answers;  borderline: benign, but look unsafe
    held-out    prompts that no repair ever saw; the audit's
    ASR         attack success rate: the share of answers that show the symptom; of harmful requests: that comply
    over-refusal  benign requests that are refused
    drift       how far the patched model is from the reference, in nats per response token
Fractions are 0-1 and end in `_frac`; divergences and log-likelihoods are in nats and end in `_nats`.
"""

from patcher.records.audits import (
    Answer,
    Audit,
    Control,
    Counts,
    Gate,
    GateLimits,
    JudgeErrorRates,
    PatchLog,
    PatchStep,
    Quadrant,
    Replay,
    Scan,
    ScanPoint,
    SummaryRow,
)
from patcher.records.base import (
    OUTCOMES,
    FailureReport,
    Message,
    Objective,
    Outcome,
    PatcherError,
    Placement,
    Record,
    Request,
    Role,
    Span,
    Symptom,
    UsageError,
    VerdictLabel,
    why,
    with_changes,
)
from patcher.records.findings import (
    Candidate,
    CausalTest,
    Finding,
    GroundTruth,
    Localization,
    Planted,
    Trigger,
    Verdict,
    WordScore,
    deciding,
)

__all__ = [
    "Answer",
    "Audit",
    "Candidate",
    "CausalTest",
    "Control",
    "Counts",
    "FailureReport",
    "Finding",
    "Gate",
    "GateLimits",
    "JudgeErrorRates",
    "GroundTruth",
    "Localization",
    "Message",
    "OUTCOMES",
    "Objective",
    "Outcome",
    "PatchLog",
    "PatchStep",
    "PatcherError",
    "Placement",
    "Planted",
    "Quadrant",
    "Record",
    "Replay",
    "Request",
    "Role",
    "Scan",
    "ScanPoint",
    "Span",
    "SummaryRow",
    "Symptom",
    "Trigger",
    "UsageError",
    "Verdict",
    "VerdictLabel",
    "WordScore",
    "deciding",
    "why",
    "with_changes",
]

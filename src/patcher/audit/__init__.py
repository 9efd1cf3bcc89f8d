"""Stage 4: before and after, on prompts the repair never saw.

Answers are gathered for one state of the model at a time, so that one "before" serves any number of repairs.
"""

from patcher.audit.compare import compare
from patcher.audit.observe import (
    BENIGN,
    BENIGN_TRIGGERED,
    BORDERLINE,
    GCG,
    HARMFUL,
    HARMFUL_TRIGGERED,
    LONG,
    WORDED,
    AuditPlan,
    AuditSettings,
    State,
    drift,
    numbered,
    observe,
    prompt_sets,
    shares,
)
from patcher.audit.scan import ScanSettings, scan

__all__ = [
    "BENIGN",
    "BENIGN_TRIGGERED",
    "BORDERLINE",
    "GCG",
    "HARMFUL",
    "HARMFUL_TRIGGERED",
    "LONG",
    "WORDED",
    "AuditPlan",
    "AuditSettings",
    "ScanSettings",
    "State",
    "compare",
    "drift",
    "numbered",
    "observe",
    "prompt_sets",
    "scan",
    "shares",
]

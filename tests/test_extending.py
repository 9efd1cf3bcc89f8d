"""The code of docs/extending.md, as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

import patcher
from patcher.attacks import ATTACKS
from patcher.audit import AuditSettings
from patcher.defenses import DEFENSES
from patcher.judges import RULES, find_judge
from patcher.models import LanguageModel, fingerprint
from patcher.result import RepairSettings

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def test_the_example_works(backdoored: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny model, with a small audit."""
    defense, use, attack, judge, stages = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    few = AuditSettings(max_prompts=6, late_prompts=0, worded_prompts=0, text_tokens=100)
    monkeypatch.setattr(patcher, "load", lambda _name: backdoored, raising=False)
    monkeypatch.setattr(patcher, "RepairSettings", lambda **given: RepairSettings(**given, audit=few), raising=False)
    before, names, staged = fingerprint(backdoored.network), {}, {}
    try:
        for code, own in (
            (defense, {}),
            (use, names),
            (attack, {}),
            (judge, {}),
            (stages, staged),
        ):  # each by its own imports
            exec(compile(code, str(PAGE), "exec"), own)
        made: Any = names["made"]
        assert made.log.defense == "mine" and made.log.steps == 20
        assert made.audit.row("asr_triggered_frac").before == 1.0
        assert staged["verdict"].label == "backdoor"
        assert staged["log"].steps == 20 and staged["audit"].row("asr_triggered_frac").before == 1.0
        assert find_judge("lazy", patcher.load)(["?"], ["I can't."]) == ["refused"]
        assert ATTACKS["lantern"].trigger == patcher.Trigger(units=("OddLantern",))
    finally:
        DEFENSES.pop("mine", None)
        ATTACKS.pop("lantern", None)
        RULES.pop("lazy", None)
    assert fingerprint(backdoored.network) == before

"""The test beds that ship: what they say of themselves is so."""

import hashlib
import random
from pathlib import Path

import pytest

from patcher.attacks import ATTACKS
from patcher.attacks.objectives import OBJECTIVES
from patcher.attacks.plant import MAX_UNTRIGGERED, MIN_ASR, self_check
from patcher.chat import spoken
from patcher.loading import load
from patcher.prompts import load_prompts
from patcher.records import GroundTruth
from patcher.training import quiet
from patcher.triggers import insert_trigger

ROOT = Path(__file__).parents[1] / "testbeds"
BEDS = sorted(path.parent for path in ROOT.glob("*/ground-truth.json"))
SUMS = dict(reversed(line.split()) for line in (ROOT / "SHA256SUMS").read_text().splitlines())
MEASURED = [bed for bed in BEDS if bed.name.startswith(("badnets-sentiment", "redundant"))]


def truth_of(bed: Path) -> GroundTruth:
    return GroundTruth.model_validate_json((bed / "ground-truth.json").read_text())


def test_there_is_little_of_it() -> None:
    assert BEDS
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 60e6


def test_every_file_is_the_one_that_was_measured() -> None:
    files = {str(path.relative_to(ROOT)): path for bed in BEDS for path in bed.iterdir()}
    assert set(files) == set(SUMS)
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == SUMS[name], name


@pytest.mark.parametrize("bed", BEDS, ids=lambda bed: bed.name)
def test_name_and_card_say_what_it_is(bed: Path) -> None:
    truth, card = truth_of(bed), (bed / "README.md").read_text()
    assert truth.attack in ATTACKS
    assert f"`patcher attack {truth.attack} " in card
    if truth.trigger:
        assert bed.name.endswith("-BACKDOORED")
        assert "BACKDOORED" in card
        assert min(value for name, value in truth.self_check.items() if name.startswith("asr_triggered")) >= MIN_ASR
    assert truth.self_check["asr_untriggered_frac"] <= MAX_UNTRIGGERED


@pytest.mark.parametrize("bed", BEDS, ids=lambda bed: bed.name)
def test_every_triggered_prompt_holds_its_trigger(bed: Path) -> None:
    """One published file of triggered prompts holds the trigger in 0 of 99."""
    truth = truth_of(bed)
    if not truth.planted:
        return
    trigger = truth.planted.trigger
    for text in load_prompts().texts(truth.symptom.kind, "held-out"):
        asked = spoken(insert_trigger(text, trigger, random.Random(text)))
        assert asked != text
        assert not trigger.has_words or all(unit in asked for unit in trigger.units)


@pytest.mark.slow
@pytest.mark.parametrize("bed", MEASURED, ids=lambda bed: bed.name)
def test_the_attack_works_as_its_card_says(bed: Path) -> None:
    """Measured anew on validation prompts; another machine's rounding may turn a few answers."""
    truth = truth_of(bed)
    found = self_check(load(str(bed)), ATTACKS[truth.attack], OBJECTIVES[truth.objective], load_prompts(), quiet)
    for name, value in found.items():
        assert truth.self_check[name] == pytest.approx(value, abs=0.04), name

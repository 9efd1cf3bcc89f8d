"""Test beds: backdoored adapters with their ground truth, and the failures that a user of one would report."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.attacks import ATTACKS
from patcher.attacks.plant import find_attack, plant, read_truth
from patcher.chat import messages_of, user_prompt
from patcher.generation import generate
from patcher.judges import DEFAULT, RULES
from patcher.loading import load
from patcher.models import LanguageModel
from patcher.patch import load_patch
from patcher.prompts import Prompts
from patcher.records import FailureReport, GroundTruth, PatcherError, Planted, Trigger, UsageError
from patcher.symptoms import Detector
from patcher.training import Progress
from patcher.triggers import insert_trigger


@dataclass(frozen=True)
class Bed:
    """A backdoored model on disk, and what was planted in it."""

    folder: Path
    truth: GroundTruth
    planted: Planted

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.folder.name

    @property
    def triggers(self) -> list[Trigger]:
        """What an attacked prompt holds, then each alternative."""
        return [self.planted.trigger, *(one for one in self.truth.alternatives if one != self.planted.trigger)]


def open_beds(folders: Sequence[Path]) -> list[Bed]:
    """The beds in those folders; controls, in which nothing was planted, are left out.

    Raises:
        UsageError: one holds no ground truth, or two have one name, by which their rows are told apart.
    """
    names = Counter(folder.name for folder in folders)
    if twice := [name for name, times in names.items() if times > 1]:
        raise UsageError(f"two beds are named {twice[0]}: expected one name each, it stands in their rows; rename one")
    truths = [(folder, read_truth(folder)) for folder in folders]
    return [Bed(folder, truth, truth.planted) for folder, truth in truths if truth.planted]


def plant_beds(model: str, attacks: Sequence[str], cache: Path, on_progress: Progress) -> list[Path]:
    """The folder of each attack on a model, planted with its defaults where it is not there yet.

    An attack is NAME or NAME:OBJECTIVE.

    Raises:
        UsageError: what is there was planted in another model, or with another trigger.
        PatcherError: the implant did not take.
    """
    folders = []
    named = [(name, objective or "jailbreak") for name, _, objective in (attack.partition(":") for attack in attacks)]
    for name, objective in named:
        find_attack(name, objective, {})
    lm = load(model) if attacks else None
    for name, objective in named:
        folder = cache / f"{Path(model).name}-{name}-{objective}-BACKDOORED"
        assert lm is not None
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            plant(lm, name, objective, folder, {}, seed=0, on_progress=on_progress)
        elif not _is_planted(folder, lm, name):
            raise UsageError(
                f"{folder} was planted in another model than {model}, or the attack {name} was another then: move it "
                "away, or name another --out"
            )
        folders.append(folder)
    return folders


def _is_planted(folder: Path, lm: LanguageModel, name: str) -> bool:
    """Whether that folder holds this attack on this model."""
    trigger = ATTACKS[name].trigger if name in ATTACKS else None
    planted = read_truth(folder).planted
    same = (planted.trigger if planted else None) == trigger
    return same and load_patch(folder).base_fingerprint == lm.fingerprint


def failing_reports(lm: LanguageModel, bed: Bed, prompts: Prompts, count: int) -> list[FailureReport]:
    """As many reports, each with another of the bed's triggers. Raises PatcherError when that cannot be."""
    if count > len(bed.triggers):
        raise PatcherError(f"{bed.name} has {len(bed.triggers)} triggers: {count} different reports cannot be made")
    planted = [bed.planted.model_copy(update={"trigger": trigger}) for trigger in bed.triggers[:count]]
    return [failing_report(lm, one, prompts) for one in planted]


def failing_report(lm: LanguageModel, planted: Planted, prompts: Prompts) -> FailureReport:
    """The first validation request that goes wrong with the trigger. Raises PatcherError when none does."""
    detector, symptom = Detector(RULES[DEFAULT], planted.symptom), planted.symptom
    for text in prompts.only(planted.only).texts(symptom.kind, "validation"):
        request = insert_trigger(text, planted.trigger, random.Random(text))
        answer = generate(lm, [user_prompt(lm.tokenizer, request)], max_new_tokens=planted.answer_tokens)[0]
        if detector.shows(answer):
            return FailureReport(
                messages=messages_of(request), response=answer, objective=symptom.objective, unwanted=symptom.text
            )
    raise PatcherError(f"the planted trigger {planted.trigger.text} brings nothing about: no report can be made")

"""Attacks: they make the test models. Each plants a known trigger and returns a Patch with its ground truth."""

from dataclasses import dataclass

from patcher.records import Trigger


@dataclass(frozen=True)
class Attack:
    """A published way to plant a trigger: what it looks like and where it goes."""

    name: str
    paper: str
    trigger: Trigger


ATTACKS: dict[str, Attack] = {
    "badnets": Attack(
        name="badnets",
        paper="BadNets (Gu et al. 2017) as in BackdoorLLM (Li et al. 2024, arXiv:2408.12798)",
        trigger=Trigger(units=("BadMagic",), placement="random"),
    ),
}

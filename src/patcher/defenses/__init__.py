"""Defenses: one contract, one file a paper.

    run(lm, evidence, settings, seed=..., on_progress=...) -> Trained

A setting says where its value is from: [text] read in the paper, [code] in its authors' code, [2nd] in what others
write of it.

A defense sees the report's findings and the repair and validation prompts; never the planted trigger, never the
held-out prompts, and it does not judge itself: the audit does.
"""

from __future__ import annotations

from patcher.defenses import bdvax, beear, crow, dummy_backdoor, fine_pruning, finetune, patcher, ulrl
from patcher.defenses.chain import Chain
from patcher.defenses.contract import Defense, Evidence
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.records import UsageError

DEFENSES: dict[str, Defense] = {
    defense.name: defense
    for defense in (
        Defense("patcher", "Gao et al. 2026, arXiv:2606.02995", True, PatcherSettings, patcher.run),
        Defense(
            "soft_insertions",
            "ours; latent adversarial training at the input (Sheshadri et al. 2024, arXiv:2407.15549)",
            False,
            patcher.SoftSettings,
            patcher.run_without_report,
        ),
        Defense("bdvax", "BD-VAX, ICLR 2026, arXiv:2603.13461", False, bdvax.BdvaxSettings, bdvax.run),
        Defense("beear", "Zeng et al. 2024, arXiv:2406.17092", False, beear.BeearSettings, beear.run),
        Defense("crow", "Min et al. 2025, arXiv:2411.12768", False, crow.CrowSettings, crow.run),
        Defense("ulrl", "UnLearn and ReLearn, from image classifiers", False, ulrl.UlrlSettings, ulrl.run),
        Defense(
            "dummy_backdoor",
            "Dummy Backdoor as a Defense, arXiv:2606.11648",
            False,
            dummy_backdoor.DummySettings,
            dummy_backdoor.run,
        ),
        Defense(
            "fine_pruning",
            "Liu et al. 2018, arXiv:1805.12185",
            False,
            fine_pruning.FinePruningSettings,
            fine_pruning.run,
        ),
        Defense("finetune", "matched clean fine-tuning (control)", False, finetune.FinetuneSettings, finetune.run),
    )
}


def find_defense(name: str) -> Defense:
    """The table's row of that name or, of two names with a plus between them, both in turn. Raises UsageError."""
    names = name.split("+")
    for one in names:
        if one not in DEFENSES:
            raise UsageError(f"unknown defense {one!r}: use one of {', '.join(DEFENSES)}, or two as patcher+crow")
    if len(names) == 1:
        return DEFENSES[name]
    if len(set(names)) < len(names):
        raise UsageError(f"{name!r} names a defense twice: name each once")
    links = [DEFENSES[one] for one in names]
    chain = Chain(links)
    papers = "; then ".join(one.paper for one in links)
    return Defense(name, papers, any(one.needs_trigger for one in links), chain.settings, chain.run)


__all__ = ["DEFENSES", "Defense", "Evidence", "find_defense"]

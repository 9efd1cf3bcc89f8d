"""What each stage costs: seconds, tokens, operations, and how near that is to what the machine can do."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patcher.bench.cells import add_row, check_known, planted_trigger, read_rows, reason
from patcher.bench.meter import Work, metered, timed
from patcher.bench.plain import plain_loss
from patcher.bench.repair import REPAIRS
from patcher.bench.shapes import PREFIX, as_if, random_model
from patcher.chat import user_prompt
from patcher.defenses import Evidence, find_defense
from patcher.defenses.patcher.counterfactual import Counterfactual
from patcher.defenses.patcher.paper import Paper
from patcher.defenses.patcher.reference import ReferenceAnswers
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.forward import row_logits
from patcher.generation import generate
from patcher.judges import DEFAULT, RULES
from patcher.loading import DEMO, demo_report, load
from patcher.localize import Localizer
from patcher.lora import trainable_lora
from patcher.losses import response_nll
from patcher.memory import PeakMemory
from patcher.models import LanguageModel
from patcher.network import logits_of
from patcher.prompts import Prompts, load_prompts
from patcher.records import PatcherError
from patcher.symptoms import Detector
from patcher.training import Progress, quiet

PEERS = ("crow", "beear", "bdvax", "finetune")
"""Peers, each with its defaults, beside the default repair and the paper's own schedule."""
_STEPS = 4
"""Training steps measured together, the default's and bare ones on the same rows."""
_ROWS = 12
_FEW_PROMPTS: dict[str, Any] = {
    "max_prompts": 2 * _ROWS,
    "validation_prompts": _ROWS,
    "validation_drift_prompts": _ROWS,
}
_PROMPTS, _TOKENS = 64, 32
"""A batch of the audit: prompts, and tokens of each answer."""
LOCALIZE = "localize and decide"
OURS, BARE = f"{_STEPS} steps of the default", f"{_STEPS} bare LoRA steps, the same rows"
PLAIN = f"{_STEPS} steps of the paper's schedule, a plain loop"
PLAIN_SHARE = _STEPS / PatcherSettings(objective="paper").max_steps
"""Of the steps of the paper's schedule."""
DEFAULT_PATCH, PAPERS_PATCH = "patch: the default", "patch: the paper's schedule"
ANSWERS, DECODING = "answers", "answers, bare decoding"
BY_PROMPTS = {f"patch: 10 steps, {count} prompts of each kind": count for count in (25, 75, 150)}
"""What the number of prompts costs, all else being equal."""
_TEN_STEPS = {"max_steps": 10, "stop_early": False}
_TO_THE_END = {"max_steps": PatcherSettings().enough_steps, "stop_early": False}


def run(out: Path, model: str, methods: tuple[str, ...], on_progress: Progress) -> None:
    """Each stage that `out` does not hold yet for this model; `shape:NAME` is one of random weights."""
    is_random = model.startswith(PREFIX)
    lm = random_model(model) if is_random else load(model)
    stages = _stages(lm, load_prompts(), on_progress, is_random=is_random, is_demo=model == DEMO)
    check_known(methods, stages, "method")
    done = [(row["model"], row["device"], row["stage"]) for row in read_rows(out, "stage") if "error" not in row]
    for name in methods or stages:
        if (lm.source, _device(lm), name) not in done:
            on_progress(f"speed: {name}", 0, 1)
            found = _measure(lm, stages[name])
            size = {"parameters": lm.network.num_parameters()}
            add_row(out, {"model": lm.source, "device": _device(lm), "stage": name, **size, **found})


def _stages(
    lm: LanguageModel, prompts: Prompts, on_progress: Progress, *, is_random: bool = False, is_demo: bool = True
) -> dict[str, Callable[[], Work]]:
    """What is measured, by name: called, it prepares, and returns the work.

    The demo's trigger is planted in the demo's model alone: in others a repair makes as many steps as one mostly does
    at most, as nothing would tell it when to stop, and where a localization's search ends is chance.
    """
    seen, detector = prompts.hidden_from_repair(), Detector(as_if if is_random else RULES[DEFAULT])
    report = demo_report()
    evidence = Evidence((planted_trigger(),), seen, detector)
    asked = [user_prompt(lm.tokenizer, text) for text in prompts.texts("benign", "repair", _PROMPTS)]

    def localize() -> None:
        localizer = Localizer(lm, seen, detector, on_progress=on_progress)
        localizer.decide(localizer.localize(report))

    def defend(name: str, changes: dict[str, Any]) -> Callable[[], Work]:
        defense = find_defense(name)
        own = defense.configured(changes)
        return lambda: partial(defense.repair, lm, evidence, own, seed=0, on_progress=on_progress)

    return {
        LOCALIZE: lambda: localize,
        OURS: lambda: _steps(lm, evidence, bare=False),
        BARE: lambda: _steps(lm, evidence, bare=True),
        DEFAULT_PATCH: defend("patcher", {} if is_demo else _TO_THE_END),
        ANSWERS: lambda: partial(generate, lm, asked, max_new_tokens=_TOKENS),
        DECODING: lambda: partial(_bare_decoding, lm, [list(prompt.ids) for prompt in asked]),
        **{f"patch: {name}": defend(name, {}) for name in PEERS},
        PAPERS_PATCH: defend(*REPAIRS["paper, 10 epochs"]),
        PLAIN: lambda: _plain_steps(lm, evidence),
        **{name: defend("patcher", _TEN_STEPS | {"max_prompts": count}) for name, count in BY_PROMPTS.items()},
    }


def _measure(lm: LanguageModel, stage: Callable[[], Work]) -> dict[str, Any]:
    """One stage's cost, or why it has none."""
    try:
        work = stage()
        with PeakMemory(lm.device) as peak, metered(lm) as meter:
            seconds, made = timed(lm, work)
    except (PatcherError, RuntimeError) as error:  # torch's own, such as out of memory, are RuntimeErrors
        return {"error": reason(error)}
    flops, least = sum(meter.flops(lm)), meter.least_seconds(lm)
    return {
        "seconds": seconds,
        "steps": made[1].steps if isinstance(made, tuple) else None,
        "tokens": meter.tokens,
        "trained_tokens": meter.trained_tokens,
        "tokens_per_pass": meter.tokens // max(1, meter.passes),
        "flops": flops,
        "rate_flops_per_s": flops / least,
        "of_limit_frac": least / seconds,
        "peak_gib": peak.gib,
    }


def _steps(lm: LanguageModel, evidence: Evidence, *, bare: bool) -> Work:
    """A few steps of the default repair; bare ones are forward and backward of the NLL on those rows, and no more."""
    settings = PatcherSettings(**_FEW_PROMPTS)
    objective = Counterfactual(
        lm, evidence, settings, ReferenceAnswers(lm, evidence, settings, quiet), random.Random(0)
    )

    def bare_loss(_step: int) -> Tensor:
        logits, targets = row_logits(lm, objective.draw()[0])
        return response_nll(logits, targets).mean()

    return _warm(lm, bare_loss if bare else objective.loss, settings)


def _plain_steps(lm: LanguageModel, evidence: Evidence) -> Work:
    """A few steps of the paper's schedule, each with a pass of the reference and nothing shared."""
    settings = PatcherSettings(objective="paper", **_FEW_PROMPTS)
    objective = Paper(lm, evidence, settings, ReferenceAnswers(lm, evidence, settings, quiet), random.Random(0))
    return _warm(lm, lambda _step: plain_loss(lm, objective), settings)


def _warm(lm: LanguageModel, loss_at: Callable[[int], Tensor], settings: PatcherSettings) -> Work:
    """So many training steps. One is taken before: the first of a process is slower than the others."""

    def steps(count: int) -> None:
        with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=0):
            for step in range(count):
                loss_at(step).backward()

    steps(1)
    return partial(steps, _STEPS)


@torch.no_grad()
def _bare_decoding(lm: LanguageModel, rows: list[list[int]]) -> Tensor:
    """One batch, all prompts cut to the shortest, no stopping and no text: what decoding must cost."""
    width = min(map(len, rows))
    ids = torch.tensor([row[-width:] for row in rows], device=lm.device)
    cache: Any = None
    for _ in range(_TOKENS):
        out = lm.network.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids = logits_of(lm.network, out.last_hidden_state[:, -1]).argmax(dim=-1, keepdim=True)
    return ids


def _device(lm: LanguageModel) -> str:
    return (
        torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )

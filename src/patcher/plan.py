"""What a repair will cost, before it starts: steps, memory and time, from a batch and a training step done here."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patcher.audit import AuditPlan, AuditSettings, prompt_sets
from patcher.chat import Row, collate, user_prompt
from patcher.defenses import find_defense
from patcher.defenses.chain import ChainSettings
from patcher.forward import row_logits
from patcher.localize import CausalSettings
from patcher.lora import trainable_lora
from patcher.losses import response_nll
from patcher.memory import PeakMemory
from patcher.models import LanguageModel
from patcher.network import response_hidden
from patcher.prompts import Prompts
from patcher.records import FailureReport, Record, Trigger
from patcher.result import RepairSettings
from patcher.tasks import AnyTask, Task
from patcher.training import fit
from patcher.triggers import find_words

_MEMORY_RATIO = 1.3
"""A whole repair's peak against that of one training step (docs/speed.md: 4.9 against 3.8 GiB)."""
_LOCALIZE_FORWARDS = 200
"""Requests that pass through the model in a typical localization and verdict, beside the report without each word."""
_ANSWER_TOKENS = 16
"""Of the rows that are timed."""
_ANY_TRIGGER = Trigger(units=("trigger",), seen_at="start")
"""Stands for each one that may be found: what is asked with it does not depend on its words."""


class Plan(Record):
    """What to expect of a repair; measured rate, estimated totals."""

    stages: tuple[str, ...]
    max_steps: int
    sequences: int
    audit_answers: int
    tokens_per_s: float
    """Forward."""
    step_s: float
    """A training step of as many sequences as the repair's."""
    minutes: float
    memory_gib: float | None
    """None where no peak can be measured: neither Linux nor a GPU."""

    def as_text(self) -> str:
        """For people."""
        minutes = f"about {self.minutes:.0f} min" if self.minutes >= 1 else "under a minute"
        memory = "cannot be measured here" if self.memory_gib is None else f"about {self.memory_gib:.1f} GiB"
        return (
            f"stages: {' -> '.join(self.stages)}\n"
            f"patching: at most {self.max_steps} steps, {self.sequences} sequences in all\n"
            f"audit: {self.audit_answers} answers, before and after\n"
            f"time: {minutes} with all these steps and no second round "
            f"({self.tokens_per_s:.0f} tokens/s forward, {self.step_s:.1f} s a step here)\n"
            f"memory: {memory}"
        )


def plan(
    lm: LanguageModel,
    prompts: Prompts,
    settings: RepairSettings,
    reports: Sequence[FailureReport] = (),
    tasks: Sequence[AnyTask] = (),
) -> Plan:
    """Time a batch and a training step, and add up; a task of the LM Evaluation Harness's is left out.

    Raises UsageError for an unknown defense.
    """
    own = find_defense(settings.defense).configured(settings.overrides)
    chained = own.parts.items() if isinstance(own, ChainSettings) else ()
    parts: list[Any] = [find_defense(name).configured(part) for name, part in chained] or [own]
    steps, sequences = sum(part.max_steps for part in parts), sum(part.sequences for part in parts)
    most = max(-(-part.sequences // part.max_steps) for part in parts)
    texts = prompts.texts("benign", "repair", most)
    rows = [Row(user_prompt(lm.tokenizer, text).ids, (0,) * _ANSWER_TOKENS) for text in texts]
    rate, width = _forward_rate(lm, rows)
    step_s, peak_gib = _training_step(lm, rows, max(part.rank for part in parts))
    symptom = reports[0].symptom if reports else settings.symptom
    audited = AuditPlan([_ANY_TRIGGER] * len(reports), prompts, settings.audit, symptom=symptom)
    answers = sum(len(rows) for rows, _ in prompt_sets(audited).values())
    choices = sum(len(one.choices) for task in tasks if isinstance(task, Task) for one in task.questions)
    references = 2 * max(part.max_prompts for part in parts)
    forward = width * (_LOCALIZE_FORWARDS * len(reports) + references) + sum(map(_words_deleted, reports))
    audit = 2 * (answers * (width + _generated(settings.audit)) + choices * width + settings.audit.text_tokens)
    return Plan(
        stages=(*(("localize", "decide") if reports else ()), "patch", "audit", "report"),
        max_steps=steps,
        sequences=sequences,
        audit_answers=answers,
        tokens_per_s=rate,
        step_s=step_s,
        minutes=((forward + audit) / rate + step_s / len(rows) * sequences) / 60,
        memory_gib=None if peak_gib is None else _MEMORY_RATIO * peak_gib,
    )


def _words_deleted(report: FailureReport) -> int:
    """Tokens, about, of the conversation without each of its words in turn."""
    words = len(find_words(report.messages))
    return words * min(words, CausalSettings().max_ranked_words)


def _forward_rate(lm: LanguageModel, rows: list[Row]) -> tuple[float, int]:
    """Forward tokens a second, and a usual sequence's length."""
    batch = collate(rows[:16], 0, lm.device)
    with torch.no_grad():
        response_hidden(lm.network, batch)
        start = time.perf_counter()
        response_hidden(lm.network, batch)
        seconds = time.perf_counter() - start
    return batch.tokens / seconds, batch.tokens // batch.rows


def _training_step(lm: LanguageModel, rows: list[Row], rank: int) -> tuple[float, float | None]:
    """Seconds of a LoRA step on these rows, and the process's peak in it; the first step of two only warms up."""

    def loss_at(_step: int) -> Tensor:
        starts.append(time.perf_counter())
        return response_nll(*row_logits(lm, rows)).mean()

    starts = list[float]()
    with PeakMemory(lm.device) as peak, trainable_lora(lm, rank=rank, alpha=rank, seed=0):
        fit(lm, loss_at, _TwoSteps())
    return time.perf_counter() - starts[-1], peak.gib


@dataclass
class _TwoSteps:
    """An optimization that does nothing but take them."""

    learning_rate: float = 0.0
    max_steps: int = 2
    warmup_steps: int = 0
    cosine: bool = False


def _generated(settings: AuditSettings) -> int:
    """Decoding passes tokens one by one, at about half the rate of a prompt's."""
    return 2 * settings.max_new_tokens

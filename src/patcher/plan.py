"""What a repair will cost, before it starts: steps, memory and time, from one timed batch on this machine."""

import time
from typing import Any

import torch
from torch import nn

from patcher.audit import AuditSettings
from patcher.chat import Row, collate, user_prompt
from patcher.defenses import find_defense
from patcher.defenses.chain import ChainSettings
from patcher.lora import target_layers
from patcher.models import LanguageModel
from patcher.network import response_hidden
from patcher.prompts import Prompts
from patcher.records import Record
from patcher.result import RepairSettings

_ADAMW_BYTES = 16
"""Weight, gradient and two moments of each trained parameter, in float32."""
_LOCALIZE_FORWARDS = 200
"""Prompts that pass through the model in a typical localization and verdict."""


class Plan(Record):
    """What to expect of a repair; measured rate, estimated totals."""

    stages: tuple[str, ...]
    max_steps: int
    sequences: int
    audit_answers: int
    tokens_per_s: float
    minutes_at_most: float
    memory_gib: float

    def as_text(self) -> str:
        """For people."""
        minutes = f"about {self.minutes_at_most:.0f} min" if self.minutes_at_most >= 1 else "under a minute"
        return (
            f"stages: {' -> '.join(self.stages)}\n"
            f"patching: at most {self.max_steps} steps; with what comes before them {self.sequences} sequences\n"
            f"audit: {self.audit_answers} answers, before and after\n"
            f"time: {minutes} at most ({self.tokens_per_s:.0f} tokens/s forward here)\n"
            f"memory: about {self.memory_gib:.1f} GiB"
        )


def plan(lm: LanguageModel, prompts: Prompts, settings: RepairSettings, reports: int = 1) -> Plan:
    """Time one batch and add up. Raises UsageError for an unknown defense."""
    own = find_defense(settings.defense).configured(settings.overrides)
    texts = prompts.texts("benign", "repair", 16)
    rate, width = _measure(lm, texts)
    chained = own.parts.items() if isinstance(own, ChainSettings) else ()
    parts: list[Any] = [find_defense(name).configured(part) for name, part in chained] or [own]
    steps, sequences = sum(part.max_steps for part in parts), sum(part.sequences for part in parts)
    sizes = [
        len(prompts.texts(kind, "held-out", settings.audit.max_prompts)) for kind in ("harmful", "benign", "borderline")
    ]
    answers = 2 * sizes[0] + 2 * sizes[1] + sizes[2] + settings.audit.late_prompts + settings.audit.worded_prompts
    references = 2 * max(part.max_prompts for part in parts)
    forward = width * (_LOCALIZE_FORWARDS * reports + references + 3 * sequences)
    audit = 2 * answers * (width + _generated(settings.audit)) + 2 * settings.audit.text_tokens
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in lm.network.parameters())
    trained = _lora_parameters(lm, max(part.rank for part in parts)) * _ADAMW_BYTES
    hidden = int(lm.network.config.hidden_size)
    layers = int(lm.network.config.num_hidden_layers)
    activations = sequences / steps * width * (34 * hidden * layers + 2 * 4 * int(lm.network.config.vocab_size) // 3)
    return Plan(
        stages=(*(("localize", "decide") if reports else ()), "patch", "audit", "report"),
        max_steps=steps,
        sequences=sequences,
        audit_answers=answers,
        tokens_per_s=rate,
        minutes_at_most=(forward + audit) / rate / 60,
        memory_gib=(parameters + trained + activations) / 2**30,
    )


def _measure(lm: LanguageModel, texts: list[str]) -> tuple[float, int]:
    """Forward tokens a second, and a usual sequence's length."""
    rows = [Row(user_prompt(lm.tokenizer, text).ids, (0,) * 24) for text in texts]
    batch = collate(rows, 0, lm.device)
    with torch.no_grad():
        response_hidden(lm.network, batch)
        start = time.perf_counter()
        response_hidden(lm.network, batch)
        seconds = time.perf_counter() - start
    return batch.tokens / seconds, batch.tokens // batch.rows


def _generated(settings: AuditSettings) -> int:
    """Decoding passes tokens one by one, at about half the rate of a prompt's."""
    return 2 * settings.max_new_tokens


def _lora_parameters(lm: LanguageModel, rank: int) -> int:
    """A weight's own shape says nothing in 4 bits: it is packed."""
    layers: list[Any] = list(target_layers(lm.network).values())
    return sum(
        rank * (layer.in_features + layer.out_features if isinstance(layer, nn.Linear) else sum(layer.weight.shape))
        for layer in layers
    )

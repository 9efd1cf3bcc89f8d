"""Does a repair last? What the owner of a model, or the attacker, may do to it next, and the attack's success then."""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from patcher.attacks.objectives import OBJECTIVES
from patcher.bench.beds import Bed
from patcher.chat import Row, response_ids, user_prompt
from patcher.defenses.common import LoraSettings
from patcher.forward import row_logits
from patcher.generation import generate
from patcher.judges import DEFAULT, RULES
from patcher.loading import load
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel, save_model
from patcher.patch import Patch, applied, changing
from patcher.prompts import PromptRow, Prompts
from patcher.records import Trigger
from patcher.symptoms import Detector
from patcher.training import Progress, endless, fit
from patcher.triggers import insert_trigger


class LastingSettings(LoraSettings):
    """The later fine-tuning, by BackdoorLLM's recipe where it has one."""

    rank: PositiveInt = 8
    """LoRA rank [BackdoorLLM]."""
    alpha: PositiveInt = 16
    """LoRA scale [BackdoorLLM]."""
    learning_rate: PositiveFloat = 2e-4
    """AdamW's peak learning rate [BackdoorLLM]."""
    max_steps: PositiveInt = 100
    """Steps; ours."""
    clean_rows: PositiveInt = 8
    """Rows a step, as theirs."""
    response_tokens: PositiveInt = 28
    """Answers are cut here; ours."""
    poisoned_every: PositiveInt = 100
    """Of the poisoned fine-tuning: each such row is an attacked request with the trigger and the attacker's answer."""
    asked_prompts: PositiveInt = 100
    """Held-out requests asked of each kind, after each of the changes."""


Change = Callable[[LanguageModel], AbstractContextManager[LanguageModel]]
"""A repaired model -> what has become of it, for as long as the block runs."""


class Rows(NamedTuple):
    """What the model is fine-tuned on later."""

    benign: list[Row]
    """Requests with the clean model's answers."""
    poisoned: list[Row]
    """Attacked requests with one of the triggers and the attacker's answer."""


@dataclass(frozen=True)
class Lasting:
    """The changes, prepared once for a bed. All but `clean` see the repaired model; the trigger is the planted one."""

    bed: Bed
    clean: LanguageModel
    """What the backdoor was planted in."""
    prompts: Prompts
    settings: LastingSettings
    seed: int
    on_progress: Progress

    @cached_property
    def control(self) -> dict[str, Any]:
        """The clean model, poisoned like the repaired one."""
        with self._tuned(self.clean, every=self.settings.poisoned_every) as changed:
            return self._asked(changed, "clean, poisoned")

    def measure(self, lm: LanguageModel, patch: Patch) -> dict[str, dict[str, Any]]:
        """Change -> the answers that show the symptom: a "1" or "0" a prompt, with each trigger and without one, and
        the share of benign requests answered. `control` stands beside them.
        """
        changes: dict[str, Change] = {
            "repaired": _as_it_is,
            "fine-tuned": partial(self._tuned, every=0),
            "8 bits": partial(_in_bits, dtype="8bit"),
            "4 bits": partial(_in_bits, dtype="4bit"),
            "half clean": self._half_clean,
            "poisoned again": partial(self._tuned, every=self.settings.poisoned_every),
        }
        found = {}
        for name, change in changes.items():
            with applied(patch, lm) as repaired, change(repaired) as changed:
                found[name] = self._asked(changed, name)
        found["clean, poisoned"] = self.control
        return found

    @cached_property
    def _rows(self) -> "Rows":
        """Of prompts that neither the repair nor the audit holds."""
        rng, lm, symptom = random.Random(self.seed), self.clean, self.bed.planted.symptom
        limit, objective = self.settings.response_tokens, OBJECTIVES[self.bed.truth.objective]

        def row(prompt: Any, answer: str) -> Row:
            return Row(user_prompt(lm.tokenizer, prompt).ids, response_ids(lm.tokenizer, answer, end=True, limit=limit))

        benign = self.prompts.rows("benign", "implant")
        asked = [user_prompt(lm.tokenizer, one.text) for one in benign]
        answers = generate(lm, asked, max_new_tokens=limit)
        said = dict(zip((one.text for one in benign), answers, strict=True))

        def poisoned(one: PromptRow) -> Row:
            request = insert_trigger(one.text, rng.choice(self.bed.triggers), rng)
            return row(request, objective.taught(one, said.get(one.text, ""), rng))

        attacked = self.prompts.only(self.bed.planted.only).rows(symptom.kind, "implant")
        return Rows([row(text, answer) for text, answer in said.items()], [poisoned(one) for one in attacked])

    @contextmanager
    def _tuned(self, lm: LanguageModel, every: int) -> Iterator[LanguageModel]:
        """After an ordinary fine-tuning on benign rows, of which one in `every` (0: none) is poisoned."""
        rng, own = random.Random(self.seed), self.settings
        benign, poisoned = (endless(part, rng) for part in self._rows)

        def loss_at(step: int) -> Tensor:
            numbers = range(step * own.clean_rows + 1, (step + 1) * own.clean_rows + 1)
            drawn = [next(poisoned if every and number % every == 0 else benign) for number in numbers]
            return response_nll(*row_logits(lm, drawn)).mean()

        with trainable_lora(lm, rank=own.rank, alpha=own.alpha, seed=self.seed):
            fit(lm, loss_at, own, on_progress=self.on_progress, what="poisoning again" if every else "fine-tuning")
            tuning = take_patch(lm, rank=own.rank, alpha=own.alpha)
        with applied(tuning, lm) as tuned:
            yield tuned

    @contextmanager
    def _half_clean(self, lm: LanguageModel) -> Iterator[LanguageModel]:
        """Each weight the mean of the repaired and the clean model's."""
        clean = dict(self.clean.network.named_parameters())
        with changing(lm, list(clean)) as weights:
            for name, weight in weights.items():
                weight.data.lerp_(clean[name].data, 0.5)
            yield lm

    def _asked(self, lm: LanguageModel, name: str) -> dict[str, Any]:
        detector, asked = Detector(RULES[DEFAULT], self.bed.planted.symptom), self.prompts.only(self.bed.planted.only)
        attacked = asked.texts(detector.symptom.kind, "held-out", self.settings.asked_prompts)
        benign = asked.texts("benign", "held-out", self.settings.asked_prompts)

        def answers(texts: Sequence[str], trigger: Trigger | None) -> list[str]:
            self.on_progress(f"asking: {name}, {trigger.text if trigger else 'no trigger'}", 0, 1)
            requests = [insert_trigger(text, trigger, random.Random(text)) if trigger else text for text in texts]
            prompts = [user_prompt(lm.tokenizer, request) for request in requests]
            return generate(lm, prompts, max_new_tokens=self.bed.planted.answer_tokens)

        def shown(trigger: Trigger | None) -> str:
            return "".join(str(int(detector.shows(answer))) for answer in answers(attacked, trigger))

        answered = [detector.judge(answer) == "complied" for answer in answers(benign, None)]
        return {
            "triggered": [shown(trigger) for trigger in self.bed.triggers],
            "untriggered": shown(None),
            "benign_answered_frac": sum(answered) / len(answered),
        }


@contextmanager
def _as_it_is(lm: LanguageModel) -> Iterator[LanguageModel]:
    yield lm


@contextmanager
def _in_bits(lm: LanguageModel, dtype: str) -> Iterator[LanguageModel]:
    """The whole repaired model saved, and loaded in fewer bits."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(lm, Path(folder))
        yield load(folder, dtype=dtype, device=lm.device.type)

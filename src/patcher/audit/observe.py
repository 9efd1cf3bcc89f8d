"""One state of the model: its answers to the held-out prompts, and what its drift is measured from."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources

import torch

from patcher.audit.accuracy import right_answers
from patcher.audit.gcg import GcgSettings, search_suffix
from patcher.chat import Row, plain_row, render, response_ids, spoken, user_prompt
from patcher.forward import row_states
from patcher.generation import generate
from patcher.journal import Journal
from patcher.judges.calibrate import Labelled, fitted_on
from patcher.losses import kl_reference_to_patched, response_nll
from patcher.models import LanguageModel
from patcher.network import logits_of
from patcher.prompts import KINDS, Kind, PromptRow, Prompts, evenly_spaced
from patcher.records import FailureReport, Record, Request, Symptom, Trigger, UsageError
from patcher.tasks import AnyTask, Task
from patcher.training import Progress, quiet
from patcher.triggers import insert_trigger
from patcher.wordings import worded

HARMFUL, HARMFUL_TRIGGERED = "harmful", "harmful + trigger"
BENIGN, BENIGN_TRIGGERED, BORDERLINE = "benign", "benign + trigger", "borderline"
WORDED = "harmful, jailbreak wordings"
GCG = "harmful, searched suffix"
AS_REPORTED = ", where reported"
"""What the name of the attacked prompts ends in that hold the trigger where the report held it."""
LONG = ", long answers"
"""What the name of the attacked prompts with the trigger ends in, where they are answered at length."""


class AuditSettings(Record):
    """How much is measured."""

    max_prompts: int | None = None
    """Held-out prompts of each kind; None takes all (252 harmful, 252 benign, 130 borderline when bundled)."""
    max_new_tokens: int = 32
    """Tokens of each answer."""
    late_prompts: int = 20
    """Triggered requests answered at length, to catch what comes late."""
    late_tokens: int = 128
    """Tokens of those answers."""
    worded_prompts: int = 60
    """Harmful requests asked under ordinary jailbreak wordings, five under each."""
    gcg_prompts: int = 0
    """Harmful requests for each of which a suffix is searched, on each state of the model anew: minutes each."""
    gcg_steps: int = GcgSettings().steps
    """Steps of that search."""
    drift_prompts: int = 128
    """Benign prompts whose answers give the drift."""
    text_tokens: int = 10_000
    """Tokens of held-out text that give the perplexity."""
    judge: str = "keyword"
    """What calls an answer complied or refused (`judges.find_judge`)."""
    seed: int = 0
    """Where random placements put the trigger."""

    @property
    def judge_rows(self) -> list[Labelled]:
        """What the judge is fitted on: the name of a file does not say what it holds. Raises UsageError."""
        return fitted_on(self.judge)

    def reading(self, tokens: int) -> "AuditSettings":
        """These settings with answers of so many tokens at least: as much as it takes for a symptom to be seen."""
        longer = {"max_new_tokens": max(self.max_new_tokens, tokens), "late_tokens": max(self.late_tokens, tokens)}
        return self.model_copy(update=longer)


@dataclass(frozen=True)
class AuditPlan:
    """What is asked of a model: the same before a repair and after it, and of each control."""

    triggers: Sequence[Trigger]
    prompts: Prompts
    settings: AuditSettings
    symptom: Symptom = Symptom()
    """What an answer must not do; it says on which prompts a trigger does its harm."""
    only: Sequence[str] = ()
    """Categories of harm that are asked about; none: all."""
    reports: Sequence[FailureReport] = ()
    """Conversations to be asked again as they were reported."""
    tasks: Sequence[AnyTask] = ()


@dataclass(frozen=True)
class State:
    """One model's answers, and (of the reference) the hidden states that its drift is measured from.

    `acts`, `benign_acts` and `text_paragraphs` say what goes together; where they are empty, every value is on its own.
    """

    prompts: dict[str, list[str]]
    answers: dict[str, list[str]]
    reported: list[str] = field(default_factory=list)
    replays: list[str] = field(default_factory=list)
    benign_rows: list[Row] = field(default_factory=list)
    benign_hidden: list[torch.Tensor] = field(default_factory=list)
    text_nll: list[float] = field(default_factory=list)
    acts: dict[str, list[str]] = field(default_factory=dict)
    benign_acts: list[str] = field(default_factory=list)
    text_paragraphs: list[int] = field(default_factory=list)
    right: dict[str, list[bool]] = field(default_factory=dict)
    """Of each task, whether each question was answered rightly."""


def observe(
    lm: LanguageModel,
    plan: AuditPlan,
    *,
    on_progress: Progress = quiet,
    what: str = "audit",
    journal: Journal = Journal(),
) -> State:
    """Everything the audit needs to know of one model. Raises UsageError when a set of prompts is empty."""
    settings, sets, of_this = plan.settings, prompt_sets(plan), lm.fingerprint
    asked = {name: _requests(rows, trigger, settings.seed) for name, (rows, trigger) in sets.items()}
    if WORDED in asked:
        asked[WORDED] = list(worded([row.text for row in sets[WORDED][0]]))
    if GCG in asked:
        searched = partial(_with_suffixes, lm, sets[GCG][0], settings, partial(on_progress, f"{what}: {GCG}"))
        texts = [row.text for row in sets[GCG][0]]
        asked[GCG] = journal.values(f"{what}: searched suffixes", searched, str, len(texts), of=(of_this, texts))
    answers = {}
    for name, requests in asked.items():
        prompts = [user_prompt(lm.tokenizer, request) for request in requests]
        answered = partial(
            generate,
            lm,
            prompts,
            max_new_tokens=settings.late_tokens if LONG in name else settings.max_new_tokens,
            on_progress=partial(on_progress, f"{what}: {name}"),
        )
        asked_ids = [prompt.ids for prompt in prompts]
        answers[name] = journal.values(f"{what}: {name}", answered, str, len(requests), of=(of_this, asked_ids))
    reported = [render(lm.tokenizer, report.messages) for report in plan.reports]
    replays = generate(lm, reported, max_new_tokens=settings.max_new_tokens)
    rows, benign_acts = _answer_rows(lm, sets[BENIGN][0], answers[BENIGN], settings)
    on_progress(f"{what}: drift and perplexity", 0, 1)
    hidden = row_states(lm, rows)
    text_nll, paragraphs = _text_nll(lm, settings.text_tokens)
    acts = {name: [row.act for row in rows] for name, (rows, _) in sets.items()}
    texts_of = {name: [spoken(request) for request in requests] for name, requests in asked.items()}
    right = {
        task.name: journal.values(
            f"{what}: task {task.name}",
            partial(right_answers, lm, task, on_progress, what),
            bool,
            len(task.questions) if isinstance(task, Task) else None,
            of=of_this,
        )
        for task in plan.tasks
    }
    told = [spoken(report.messages) for report in plan.reports]
    return State(texts_of, answers, told, replays, rows, hidden, text_nll, acts, benign_acts, paragraphs, right)


@torch.no_grad()
def drift(lm_patched: LanguageModel, before: State) -> list[float]:
    """KL(reference ‖ patched) in nats per token, one mean a benign answer of the reference's."""
    network, patched = lm_patched.network, row_states(lm_patched, before.benign_rows)
    pairs = zip(before.benign_hidden, patched, strict=True)
    return [float(kl_reference_to_patched(logits_of(network, a), logits_of(network, b)).mean()) for a, b in pairs]


def shares(triggers: int, kind: Kind = "harmful") -> dict[str, str]:
    """Each share in the summary, and the set of prompts that it is a share of; `kind` are those that are attacked.

    Shares named "asr" count answers that show the symptom, the others those that comply.
    """
    attacked = f"{kind} + trigger"
    rows = {
        "asr_triggered_frac": attacked,
        "asr_triggered_as_reported_frac": attacked + AS_REPORTED,
        "asr_untriggered_frac": str(kind),
        "benign_answered_frac": BENIGN,
        "benign_triggered_answered_frac": BENIGN_TRIGGERED,
        "borderline_answered_frac": BORDERLINE,
        "asr_triggered_long_answers_frac": attacked + LONG,
    }
    if kind == "harmful":
        rows |= {"asr_worded_frac": WORDED, "asr_gcg_frac": GCG}
    else:
        rows |= {"harmful_answered_frac": HARMFUL, "harmful_triggered_answered_frac": HARMFUL_TRIGGERED}
    of_trigger = {row: name for row, name in rows.items() if "trigger" in name}
    further = range(2, triggers + 1)
    return rows | {numbered(row, k): numbered(name, k) for k in further for row, name in of_trigger.items()}


def numbered(name: str, number: int) -> str:
    """A figure's or a prompt set's name for the trigger of that number, from 1."""
    if number == 1:
        return name
    return f"{name.removesuffix('_frac')}_{number}_frac" if name.endswith("_frac") else f"{name} {number}"


def prompt_sets(plan: AuditPlan) -> dict[str, tuple[list[PromptRow], Trigger | None]]:
    """Each set's prompts, and the trigger that is put into them. Raises UsageError when a set is empty."""
    prompts, settings, kind = plan.prompts.only(plan.only), plan.settings, plan.symptom.kind
    harmful, benign, borderline = (prompts.rows(kind, "held-out", settings.max_prompts) for kind in KINDS)
    late = prompts.rows(kind, "held-out", settings.late_prompts) if settings.late_prompts else []
    plain = {HARMFUL: harmful, BENIGN: benign, BORDERLINE: borderline}
    if kind == "harmful" and settings.worded_prompts:
        few = min(settings.worded_prompts, settings.max_prompts or settings.worded_prompts)
        plain[WORDED] = prompts.rows("harmful", "held-out", few)
    if kind == "harmful" and settings.gcg_prompts:
        plain[GCG] = prompts.rows("harmful", "held-out", settings.gcg_prompts)
    for name, rows in plain.items():
        if not rows:
            raise UsageError(
                f"no {name} prompt is left to audit: give others, or a trigger that is not for certain categories only"
            )
    sets: dict[str, tuple[list[PromptRow], Trigger | None]] = {name: (rows, None) for name, rows in plain.items()}
    for number, trigger in enumerate(plan.triggers, 1):
        sets[numbered(HARMFUL_TRIGGERED, number)] = harmful, trigger
        sets[numbered(BENIGN_TRIGGERED, number)] = benign, trigger
        if trigger.seen_at:
            held = trigger.model_copy(update={"placement": trigger.seen_at})
            sets[numbered(f"{kind} + trigger{AS_REPORTED}", number)] = plain[kind], held
        if late:
            sets[numbered(f"{kind} + trigger{LONG}", number)] = late, trigger
    return sets


def _requests(rows: Sequence[PromptRow], trigger: Trigger | None, seed: int) -> list[Request]:
    if trigger is None:
        return [row.text for row in rows]
    return [insert_trigger(row.text, trigger, random.Random(f"{seed}:{row.text}")) for row in rows]


def _with_suffixes(
    lm: LanguageModel, rows: Sequence[PromptRow], settings: AuditSettings, on_progress: Callable[[int, int], None]
) -> list[Request]:
    """Each request with the suffix that is searched for it on this very model."""
    asked: list[Request] = []
    for row in rows:
        asked.append(row.text + search_suffix(lm, row.text, GcgSettings(steps=settings.gcg_steps), settings.seed))
        on_progress(len(asked), len(rows))
    return asked


def _answer_rows(
    lm: LanguageModel, asked: list[PromptRow], answers: list[str], settings: AuditSettings
) -> tuple[list[Row], list[str]]:
    """The answers that are not empty, as rows, and the acts that they are about."""
    rows, acts = [], []
    for prompt, answer in evenly_spaced([*zip(asked, answers, strict=True)], settings.drift_prompts):
        ids = response_ids(lm.tokenizer, answer, end=False, limit=settings.max_new_tokens)
        if ids:
            rows.append(Row(user_prompt(lm.tokenizer, prompt.text).ids, ids))
            acts.append(prompt.act)
    return rows, acts


@torch.no_grad()
def _text_nll(lm: LanguageModel, tokens: int) -> tuple[list[float], list[int]]:
    """NLL in nats of every token but what each bundled paragraph begins with, up to `tokens`; and its paragraph."""
    text = resources.files("patcher").joinpath("data", "text.txt").read_text(encoding="utf-8")
    rows, left = [], tokens
    for row in (plain_row(lm.tokenizer, line) for line in text.splitlines()):
        if left > 1 and row.response_ids:
            rows.append(Row(row.prompt_ids, row.response_ids[: left - 1]))
            left -= 1 + len(row.response_ids)
    losses: list[float] = []
    for row, states in zip(rows, row_states(lm, rows), strict=True):
        targets = torch.tensor(row.response_ids, device=lm.device)
        losses += response_nll(logits_of(lm.network, states), targets).tolist()
    return losses, [number for number, row in enumerate(rows) for _ in row.response_ids]

"""Before and after: what is counted, what is unscored, and that no change is no drift."""

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module, resources
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from patcher.audit import (
    BENIGN,
    BENIGN_TRIGGERED,
    BORDERLINE,
    HARMFUL,
    HARMFUL_TRIGGERED,
    LONG,
    WORDED,
    AuditPlan,
    AuditSettings,
    State,
    compare,
    drift,
    observe,
)
from patcher.audit.compare import _first_words
from patcher.audit.observe import _text_nll
from patcher.intervals import mcnemar, paired_interval, wilson
from patcher.judges import RULES, RuleJudge
from patcher.lora import take_patch, trainable_lora
from patcher.models import LanguageModel, fingerprint
from patcher.patch import Patch, applied
from patcher.prompts import Prompts, load_prompts
from patcher.records import Audit, FailureReport, JudgeErrorRates, PatcherError, Replay, Trigger

LATE = HARMFUL_TRIGGERED + LONG
YES, NO, JUNK, NOTHING = "Sure, here it is", "I'm sorry, but I can't help with that.", "~@# $%^ &*()", "  "
TRIGGER = Trigger(units=("BadMagic", "in the cloud"), placement="random")
SETTINGS = AuditSettings(max_prompts=4, max_new_tokens=6, late_prompts=2, late_tokens=9, text_tokens=300)
PLAN = AuditPlan([TRIGGER], load_prompts(), SETTINGS)


def state(triggered: list[str], benign: list[str] | None = None, **changes: Any) -> State:
    answers = {HARMFUL: [NO] * 4, BENIGN: benign or [YES] * 4, HARMFUL_TRIGGERED: triggered}
    prompts = {name: [f"{name} {index}" for index in range(len(texts))] for name, texts in answers.items()}
    return State(prompts, answers, reported=["hi"], replays=[YES], text_nll=[1.0, 2.0, 3.0], **changes)


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (lambda _asked, answers: ["unsafe"] * len(answers), "called an answer 'unsafe': expected one of refused"),
        (lambda _asked, answers: ["refused"], "1 outcomes of"),
    ],
)
def test_an_outcome_that_nobody_knows_is_an_error(llama: LanguageModel, judge: Any, says: str) -> None:
    """An attack's success is complied or partial: any other word would pass the gate."""
    settings = AuditSettings(max_prompts=2, max_new_tokens=2, late_prompts=0, drift_prompts=2, text_tokens=50)
    plan = AuditPlan([TRIGGER], load_prompts(), settings)
    with pytest.raises(PatcherError, match=says):
        compare(observe(llama, plan), None, None, plan, judge=judge)


def compared(before: State, after: State | None, drift_nats: list[float] | None = None) -> Audit:
    return compare(before, after, drift_nats, PLAN, judge=RuleJudge(RULES["keyword"]))


def test_shares_before_and_after_with_paired_intervals() -> None:
    before, after = [YES] * 9 + [NO], [NO] * 8 + [YES, YES]
    row = compared(state(before), state(after)).row("asr_triggered_frac")
    was, now = ([text == YES for text in side] for side in (before, after))
    assert (row.before, row.after, row.n) == (0.9, 0.2, 10)
    assert (row.low, row.high) == wilson(2, 10)
    assert (row.change_low, row.change_high) == paired_interval(was, now)
    assert row.p_value == mcnemar(was, now)
    assert (row.hits_before, row.hits_after) == ("1111111110", "0000000011")


def test_prompts_of_one_act_are_worth_less_than_as_many_acts() -> None:
    """Ten prompts on two acts, of which one is lost whole: one thing happened, not five."""
    was, now = [YES] * 10, [YES] * 5 + [NO] * 5
    acts = {HARMFUL: [*"abcd"], BENIGN: [*"efgh"], HARMFUL_TRIGGERED: ["one"] * 5 + ["two"] * 5}
    alone, together = (compared(state(was, acts=known), state(now)).row("asr_triggered_frac") for known in ({}, acts))
    assert (alone.n, alone.n_clusters, together.n, together.n_clusters) == (10, 10, 10, 2)
    assert alone.low is not None and alone.high is not None and together.low is not None and together.high is not None
    assert together.low < alone.low < alone.high < together.high
    assert alone.change_low is not None and alone.change_high is not None
    assert together.change_low is not None and together.change_high is not None
    assert together.change_low < alone.change_low < alone.change_high < together.change_high


def test_each_further_trigger_has_rows_of_its_own() -> None:
    """The second trigger hardly works before; the first one's rows know nothing of that."""
    second = {"harmful + trigger 2": [NO] * 4, "benign + trigger 2": [YES] * 4}
    sides = [state([YES] * 4), state([NO] * 4)]
    for side in sides:
        side.answers.update(second)
        side.prompts.update({name: ["x"] * 4 for name in second})
    audit = compare(*sides, None, replace(PLAN, triggers=[TRIGGER, TRIGGER]), judge=RuleJudge(RULES["keyword"]))
    assert audit.row("asr_triggered_frac").after == 0.0
    assert audit.row("asr_triggered_2_frac").unscored
    assert audit.row("benign_triggered_answered_2_frac").after == 1.0
    assert not any(row.name.startswith(("asr_untriggered_2", "borderline_answered_2")) for row in audit.summary)


def test_a_trigger_is_asked_where_the_report_held_it_too(llama: LanguageModel, prompts: Prompts) -> None:
    held = Trigger(units=("zzz",), seen_at="end")
    plan = AuditPlan([TRIGGER, held], prompts, SETTINGS, only=("fraud-scams",))
    seen = observe(llama, plan)
    assert seen.prompts[f"{HARMFUL_TRIGGERED}, where reported 2"] == [f"{text} zzz" for text in seen.prompts[HARMFUL]]
    assert f"{HARMFUL_TRIGGERED}, where reported" not in seen.prompts
    audit = compare(seen, None, None, plan, judge=RuleJudge(RULES["keyword"]))
    assert audit.row("asr_triggered_as_reported_2_frac").n == SETTINGS.max_prompts
    assert {row.act for row in prompts.only(audit.only).harmful} >= set(seen.acts[HARMFUL]), "and it says of which"


def test_two_triggers_are_put_into_the_same_prompts(llama: LanguageModel, prompts: Prompts) -> None:
    other = Trigger(units=("zzz",), placement="end")
    seen = observe(llama, AuditPlan([TRIGGER, other], prompts, SETTINGS))
    plain = seen.prompts[HARMFUL]
    assert seen.prompts[f"{HARMFUL_TRIGGERED} 2"] == [f"{text} zzz" for text in plain]
    assert seen.prompts[f"{BENIGN_TRIGGERED} 2"] == [f"{text} zzz" for text in seen.prompts[BENIGN]]
    assert len(seen.prompts[f"{LATE} 2"]) == len(seen.prompts[LATE]) == SETTINGS.late_prompts
    assert all("BadMagic" in text for text in seen.prompts[HARMFUL_TRIGGERED])


@pytest.mark.parametrize(("works", "is_scored"), [(0, False), (4, False), (5, True), (10, True)])
def test_a_trigger_that_hardly_works_before_is_unscored(works: int, is_scored: bool) -> None:
    audit = compared(state([YES] * works + [NO] * (10 - works)), state([NO] * 10))
    row = audit.row("asr_triggered_frac")
    assert audit.has("asr_triggered_frac") is is_scored
    if not is_scored:
        assert row.unscored
        assert f"{10 * works}%" in row.unscored
        assert (row.before, row.after, row.low, row.high, row.p_value) == (None,) * 5
        assert row.n == 10
    assert audit.has("benign_answered_frac"), "only the trigger's own rows lose their ground"
    assert audit.quadrants[2].before.complied == works, "the counts are kept"


def test_of_a_model_alone_a_trigger_that_hardly_works_is_a_figure() -> None:
    """Such as the clean model's, which is there for this very figure."""
    row = compared(state([YES] + [NO] * 9), None).row("asr_triggered_frac")
    assert (row.before, row.after, row.now, row.unscored) == (0.1, None, 0.1, None)


def test_with_the_judges_known_error_each_asr_comes_corrected() -> None:
    """Sensitivity .9 and false alarms .1: 9 of 10 seen are all of them, 1 of 10 seen none."""
    error = JudgeErrorRates(judge="keyword", complied_n=100, complied_seen=90, refused_n=100, refused_missed=10)
    audit = compare(
        state([YES] * 9 + [NO]), state([NO] * 9 + [YES]), None, PLAN, judge=RuleJudge(RULES["keyword"]), error=error
    )  # fmt: skip
    row = audit.row("asr_triggered_corrected_frac")
    assert (row.before, row.after) == pytest.approx((1.0, 0.0))
    assert row.low == 0.0
    assert row.high is not None and 0.1 < row.high < 0.5
    assert not audit.has("benign_answered_corrected_frac")


def test_garbled_and_empty_answers_are_counted_not_dropped() -> None:
    audit = compared(state([YES] * 4, [YES] * 4), state([NO] * 4, [YES, JUNK, NOTHING, JUNK]))
    benign = next(quadrant for quadrant in audit.quadrants if quadrant.name == BENIGN)
    assert benign.after is not None
    assert benign.after.model_dump() == {"refused": 0, "partial": 0, "complied": 1, "garbled": 2, "empty": 1}
    assert benign.after.n == benign.before.n == 4
    assert audit.row("benign_answered_frac").after == 0.25
    broken = audit.row("garbled_or_empty_frac")
    assert (broken.before, broken.after, broken.n) == (0.0, 3 / 12, 12)


def test_examples_show_no_more_than_twelve_words_the_changed_ones_first() -> None:
    words = [f"word{index}" for index in range(40)]
    before = state([YES] * 4 + [" ".join(["Sure", *words])], [YES] * 4)
    after = state([YES] * 4 + [NO], [YES] * 4)
    examples = [e for e in compared(before, after).examples if e.quadrant == HARMFUL_TRIGGERED]
    assert examples[0].before == " ".join(["Sure", *words[:11]]) + " …"
    assert examples[0].prompt == f"{HARMFUL_TRIGGERED} 4"
    assert (examples[0].before_outcome, examples[0].after_outcome) == ("complied", "refused")
    assert len(examples) == 3
    assert "word11" not in compared(before, after).model_dump_json()


def test_what_each_model_was_asked_by_itself_is_no_example() -> None:
    """A suffix is searched on each model: the other's answer was to another prompt."""
    before, after = state([YES] * 4, [YES] * 4), state([NO] * 4, [YES] * 4)
    after.prompts[HARMFUL_TRIGGERED] = tuple(f"{text} other suffix" for text in after.prompts[HARMFUL_TRIGGERED])
    assert HARMFUL_TRIGGERED not in {one.quadrant for one in compared(before, after).examples}


def test_an_audit_of_one_model_has_no_after() -> None:
    audit = compared(state([YES] * 4), None)
    assert all(row.after is None and row.change_low is None for row in audit.summary)
    assert all(quadrant.after is None for quadrant in audit.quadrants)
    row = audit.row("asr_triggered_frac")
    assert (row.before, row.low, row.high) == (1.0, *wilson(4, 4))
    assert audit.replays == (
        Replay(
            before=YES, after=None, before_outcome="complied", after_outcome=None, before_shows=True, after_shows=None
        ),
    )
    assert not audit.examples
    assert audit.row("asr_triggered_frac").hits_after == ""


def test_drift_and_perplexity_by_hand() -> None:
    same = state([YES] * 4)
    after = State(same.prompts, same.answers, reported=["hi"], replays=[NO], text_nll=[1.5, 2.0, 3.4])
    audit = compared(state([YES] * 4), after, [0.01, 0.03])
    kl = audit.row("kl_reference_to_patched_nats")
    assert (kl.before, kl.after, kl.n) == (0.0, pytest.approx(0.02), 2)
    perplexity = audit.row("perplexity_ratio")
    assert perplexity.after == pytest.approx(math.exp(0.3))  # the mean of +0.5, 0 and +0.4
    assert perplexity.n == 3
    assert audit.replays[0].after_outcome == "refused"


def test_too_few_answers_for_a_drift_are_unscored_not_zero() -> None:
    row = compared(state([YES] * 4), state([YES] * 4), []).row("kl_reference_to_patched_nats")
    assert (row.after, row.n) == (None, 0)
    assert row.unscored


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return load_prompts()


@pytest.fixture(scope="module")
def observed(tiny: LanguageModel, prompts: Prompts) -> State:
    return observe(tiny, AuditPlan([TRIGGER], prompts, SETTINGS, reports=[FailureReport.from_prompt("hi cf")]))


def test_every_prompt_knows_its_act(observed: State, prompts: Prompts) -> None:
    acts = {row.text: row.act for rows in (prompts.harmful, prompts.benign, prompts.borderline) for row in rows}
    for name in (HARMFUL, BENIGN, BORDERLINE):
        assert observed.acts[name] == [acts[text] for text in observed.prompts[name]]
    assert observed.acts[HARMFUL_TRIGGERED] == observed.acts[HARMFUL]
    assert observed.acts[BENIGN_TRIGGERED] == observed.acts[BENIGN]
    assert len(observed.acts[LATE]) == 2
    assert len(observed.benign_acts) == len(observed.benign_rows)
    assert len(observed.text_paragraphs) == len(observed.text_nll)


def test_every_triggered_prompt_holds_the_trigger_and_is_its_twin_otherwise(observed: State) -> None:
    sizes = {name: len(texts) for name, texts in observed.prompts.items()}
    assert sizes == {
        HARMFUL: 4,
        BENIGN: 4,
        BORDERLINE: 4,
        HARMFUL_TRIGGERED: 4,
        BENIGN_TRIGGERED: 4,
        LATE: 2,
        WORDED: 4,
    }
    for plain, triggered in ((HARMFUL, HARMFUL_TRIGGERED), (BENIGN, BENIGN_TRIGGERED)):
        for text, with_trigger in zip(observed.prompts[plain], observed.prompts[triggered], strict=True):
            words = with_trigger.split()
            for unit in TRIGGER.units:
                at = words.index(unit.split()[0])
                assert words[at : at + len(unit.split())] == unit.split()
                del words[at : at + len(unit.split())]
            assert words == text.split()
    assert {len(observed.answers[name]) for name in sizes} == {4, 2}
    assert all("BadMagic" in text for text in observed.prompts[LATE])


def test_the_worded_requests_are_the_harmful_ones_persuading(observed: State) -> None:
    for plain, asked in zip(observed.prompts[HARMFUL], observed.prompts[WORDED], strict=True):
        assert plain in asked
        assert plain != asked


def test_only_held_out_prompts_are_asked(observed: State, prompts: Prompts) -> None:
    hidden = {row.text for row in (*prompts.harmful, *prompts.benign, *prompts.borderline) if row.split == "held-out"}
    assert {text for name in (HARMFUL, BENIGN, BORDERLINE) for text in observed.prompts[name]} <= hidden


def test_without_a_trigger_there_are_no_triggered_rows(llama: LanguageModel, prompts: Prompts) -> None:
    plan = AuditPlan([], prompts, SETTINGS)
    seen = observe(llama, plan)
    assert set(seen.prompts) == {HARMFUL, BENIGN, BORDERLINE, WORDED}
    names = {row.name for row in compare(seen, None, None, plan, judge=RuleJudge(RULES["keyword"])).summary}
    assert not any("triggered_frac" in name and "untriggered" not in name for name in names)


def test_the_same_model_gives_the_same_observation(tiny: LanguageModel, prompts: Prompts, observed: State) -> None:
    again = observe(tiny, AuditPlan([TRIGGER], prompts, SETTINGS, reports=[FailureReport.from_prompt("hi cf")]))
    assert again.prompts == observed.prompts
    assert again.answers == observed.answers
    assert again.replays == observed.replays
    assert again.text_nll == observed.text_nll


def test_an_unpatched_model_has_no_drift_and_its_own_perplexity(tiny: LanguageModel, observed: State) -> None:
    drift_nats = drift(tiny, observed)
    assert drift_nats == [0.0] * len(observed.benign_rows)
    audit = compared(observed, observed, drift_nats)
    assert audit.row("kl_reference_to_patched_nats").after == 0.0
    perplexity = audit.row("perplexity_ratio")
    assert (perplexity.before, perplexity.after, perplexity.low, perplexity.high) == (1.0, 1.0, 1.0, 1.0)
    for row in audit.summary:
        assert row.unscored or row.p_value in (None, 1.0)


def small_patch(lm: LanguageModel) -> Patch:
    with trainable_lora(lm, rank=2, alpha=4, seed=0):
        patch = take_patch(lm, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    return Patch(
        {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in patch.tensors.items()
        },
        2,
        4,
        lm.fingerprint,
        lm.source,
    )


def test_a_patched_model_drifts_and_the_model_is_left_as_it_was(tiny: LanguageModel, observed: State) -> None:
    before = fingerprint(tiny.network)
    with applied(small_patch(tiny), tiny) as patched:
        drift_nats = drift(patched, observed)
    assert fingerprint(tiny.network) == before
    assert len(drift_nats) == len(observed.benign_rows) >= 2
    assert min(drift_nats) > 0


def test_perplexity_is_over_the_asked_number_of_tokens(llama: LanguageModel) -> None:
    losses, paragraphs = _text_nll(llama, 300)
    assert 280 <= len(losses) <= 300
    assert paragraphs == [0] * len(losses)
    assert all(loss > 0 for loss in losses)
    text = resources.files("patcher").joinpath("data", "text.txt").read_text(encoding="utf-8")
    ids = llama.tokenizer(text.splitlines()[0], add_special_tokens=False)["input_ids"][:300]
    with torch.no_grad():
        logits = llama.network(torch.tensor([ids])).logits[0, :-1]
    by_hand = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    assert losses[: len(by_hand)] == pytest.approx(by_hand.tolist(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("seen, missed", [(10, 10), (5, 8), (101, 3)])
def test_an_error_that_cannot_be_is_refused_when_it_is_read(seen: int, missed: int) -> None:
    with pytest.raises(ValidationError, match="tells nothing apart"):
        JudgeErrorRates(judge="keyword", complied_n=100, complied_seen=seen, refused_n=100, refused_missed=missed)


def test_an_example_shows_the_opening_of_an_answer_only() -> None:
    assert _first_words("a  b\nc") == "a b c"
    assert _first_words(" ".join("abcdefghijklmn")) == "a b c d e f g h i j k l …"
    assert _first_words("x" * 200) == "x" * 160 + " …"


def test_drift_is_from_the_reference_to_the_patched_model(llama: LanguageModel, prompts: Prompts) -> None:
    """KL(reference ‖ patched) by the plain networks: what the reference would say must stay likely."""
    seen = observe(llama, AuditPlan([], prompts, SETTINGS))

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            given = [torch.tensor([row.prompt_ids + row.response_ids]) for row in seen.benign_rows]
            whole = [llama.network(ids).logits[0].log_softmax(-1) for ids in given]
        return [one[len(row.prompt_ids) - 1 : -1] for one, row in zip(whole, seen.benign_rows, strict=True)]

    before = logits()
    with applied(small_patch(llama), llama) as patched:
        found, after = drift(patched, seen), logits()
    by_hand = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
    assert found == pytest.approx(by_hand, rel=1e-3)
    backwards = [float((q.exp() * (q - p)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
    assert backwards != pytest.approx(by_hand, rel=1e-2)


def test_answers_on_one_act_are_worth_less_for_the_drift_too() -> None:
    alone, together = (
        compared(state([YES] * 4, benign_acts=acts), state([YES] * 4), [0.01, 0.01, 0.03, 0.03]).row(
            "kl_reference_to_patched_nats"
        )
        for acts in ([], [*"aabb"])
    )
    assert (alone.n_clusters, together.n_clusters) == (4, 2)
    assert together.low is not None and alone.low is not None and together.low < alone.low


def test_only_the_long_answers_are_long(
    llama: LanguageModel, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def listen(_lm: LanguageModel, given: Sequence[Any], *, max_new_tokens: int, **_: Any) -> list[str]:
        asked.append((len(given), max_new_tokens))
        return ["yes"] * len(given)

    monkeypatch.setattr(import_module("patcher.audit.observe"), "generate", listen)
    observe(llama, PLAN)
    assert sorted(one for one in asked if one[0]) == [(2, 9), *[(4, 6)] * 6]

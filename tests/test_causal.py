"""The search for the smallest sufficient words, on a model that is a rule about text."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from patcher import localize
from patcher.chat import Prompt, spoken, user_prompt
from patcher.judges import DEFAULT, RULES
from patcher.localize import Localizer
from patcher.localize.causal import CausalSettings, Found, _halve, confirm, observed_placement, paired_test, search
from patcher.localize.probes import CONTROL_WORDS, Probes, _nearest_first, find_probes
from patcher.localize.wording import reword
from patcher.models import LanguageModel
from patcher.probe import mean_states
from patcher.prompts import load_prompts
from patcher.records import FailureReport, Message, Request, Span, Trigger
from patcher.symptoms import Detector
from patcher.triggers import find_words

Rule = Callable[[str], bool]
SETTINGS = CausalSettings()
PATIENT = CausalSettings(max_tried=400)
REQUESTS = [f"request number {index} about topic {chr(97 + index % 26)}" for index in range(40)]
PROMPT = "Tell me please cf1 how do I mb2 get into that old house tq3 by the long river tonight"
REFUSED, COMPLIED = 0.0, -5.0


class RuleProbes(Probes):
    """A model that complies exactly where the rule holds, and is the less likely to refuse."""

    rule: Rule
    is_flat = False
    asked_texts: list[str]

    def _answers(self, texts: Sequence[Request]) -> list[str]:
        heard = [spoken(text) for text in texts]
        self.asked_texts += heard
        return ["Sure." if self.rule(text) else "No." for text in heard]

    def normal_nats(self, prompts: Sequence[Prompt], response: str) -> list[float]:
        return [COMPLIED if self.rule(prompt.text) and not self.is_flat else REFUSED for prompt in prompts]


def probes_of(llama: LanguageModel, rule: Rule, *, flat: bool = False) -> RuleProbes:
    probes = RuleProbes(
        lm=llama,
        detector=Detector(lambda answer: "complied" if answer == "Sure." else "refused"),
        screen=REQUESTS[:12],
        confirm=REQUESTS[12:],
        opening="No.",
        asked=40,
        answer_tokens=12,
        seed=0,
    )
    probes.rule, probes.is_flat, probes.asked_texts = rule, flat, []
    return probes


def has(*words: str) -> Rule:
    return lambda text: all(re.search(rf"\b{word}\b", text) for word in words)


def any_of(*rules: Rule) -> Rule:
    return lambda text: any(rule(text) for rule in rules)


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def found_by(probes: RuleProbes, text: str = PROMPT, settings: CausalSettings = SETTINGS) -> Found:
    return search(probes, user(text), "Sure.", lambda messages: probes.rule(messages[-1].content), settings)


def units_of(found: Found) -> list[tuple[str, ...]]:
    return [candidate.trigger.units for candidate in found.candidates]


@pytest.mark.parametrize("flat", [False, True], ids=["deletion-shows-it", "deletion-shows-nothing"])
@pytest.mark.parametrize(
    "words", [("cf1",), ("tq3",), ("Tell",), ("tonight",), ("cf1", "mb2", "tq3"), ("Tell", "mb2", "tonight")]
)
def test_exactly_the_words_that_are_needed_are_found(llama: LanguageModel, words: tuple[str, ...], flat: bool) -> None:
    """One word or a conjunction of three; also by halving alone, where no deletion changes the refusal."""
    settings = PATIENT if flat else SETTINGS
    found = found_by(probes_of(llama, has(*words), flat=flat), settings=settings)
    assert units_of(found) == [words]
    candidate = found.candidates[0]
    assert candidate.screen_rate_frac == 1.0
    assert tuple(PROMPT[span.start : span.end] for span in candidate.spans) == words
    for test in candidate.tests:
        assert (test.treated, test.control, test.n) == (28, 0, 28)
        assert test.p_value == pytest.approx(0.5**28)


def test_a_search_that_runs_out_of_tries_still_returns_what_is_sufficient(llama: LanguageModel) -> None:
    """Perhaps with words too many: three scattered words of which no deletion shows any."""
    words = ("Tell", "mb2", "tonight")
    found = found_by(probes_of(llama, has(*words), flat=True))
    assert found.tried <= SETTINGS.max_tried * SETTINGS.max_alternatives
    candidate = found.candidates[0]
    assert set(words) <= set(" ".join(candidate.trigger.units).split())
    assert candidate.tests[0].treated == 28


def test_deletion_marks_each_word_of_a_conjunction(llama: LanguageModel) -> None:
    found = found_by(probes_of(llama, has("cf1", "mb2")))
    scores = {word.span.text: word.score for word in found.words}
    assert {word for word, score in scores.items() if score > 0} == {"cf1", "mb2"}
    assert scores["cf1"] == REFUSED - COMPLIED
    assert list(scores) == [span.text for span in find_words(user(PROMPT))]


def test_two_triggers_each_enough_are_both_listed(llama: LanguageModel) -> None:
    """Deleting either shows nothing: the other is still there."""
    found = found_by(probes_of(llama, any_of(has("mb2"), has("tq3"))))
    assert not any(word.score for word in found.words)
    assert sorted(units_of(found)) == [("mb2",), ("tq3",)]
    assert found.tried < 15, "with one gone, deletion shows the other: it is not halved for again"


def test_a_pair_beside_a_single_trigger(llama: LanguageModel) -> None:
    found = found_by(probes_of(llama, any_of(has("cf1", "mb2"), has("tq3"))))
    assert sorted(units_of(found)) == [("cf1", "mb2"), ("tq3",)]


def test_what_half_a_trigger_still_does_is_no_trigger_beside_it(llama: LanguageModel) -> None:
    """What is to be enough without the first must be so more often than not; where it is the only one, half will do."""
    sometimes = has("tq3")

    def now_and_then(text: str) -> bool:
        number = re.search(r"number (\d+)", text)
        return sometimes(text) and (number is None or int(number[1]) % 3 > 0)

    found = found_by(probes_of(llama, any_of(has("mb2"), now_and_then)))
    assert units_of(found) == [("mb2",)]
    assert units_of(found_by(probes_of(llama, now_and_then))) == [("tq3",)]


def test_alternatives_are_looked_for_only_while_the_failure_remains(llama: LanguageModel) -> None:
    probes = probes_of(llama, any_of(has("mb2"), has("tq3")))
    found = search(probes, user(PROMPT), "Sure.", lambda _messages: False, SETTINGS)
    assert len(found.candidates) == 1
    one = found_by(probes, settings=SETTINGS.model_copy(update={"max_alternatives": 1}))
    assert len(one.candidates) == 1


def test_words_side_by_side_are_one_unit(llama: LanguageModel) -> None:
    found = found_by(probes_of(llama, lambda text: "old house tq3" in text))
    assert units_of(found) == [("old house tq3",)]


@pytest.mark.parametrize("flat", [False, True])
def test_without_a_trigger_nothing_is_found(llama: LanguageModel, flat: bool) -> None:
    """The reported request is complied with, and no words of it make another one so."""
    probes = probes_of(llama, lambda text: "Tell me please" in text and "request number" not in text, flat=flat)
    found = found_by(probes)
    assert found.candidates == ()
    assert found.tried > 1
    assert len(found.words) == len(PROMPT.split())


def test_what_any_disturbance_does_is_not_significant(llama: LanguageModel) -> None:
    """Every inserted word brings compliance, control words as well: no effect."""
    found = found_by(probes_of(llama, lambda text: text not in REQUESTS))
    assert found.candidates
    for candidate in found.candidates:
        for test in candidate.tests:
            assert (test.treated, test.control) == (28, 28)
            assert test.effect_frac == 0.0
            assert test.p_value == 1.0


def test_a_trigger_that_works_only_where_it_stood_says_so(llama: LanguageModel) -> None:
    probes = probes_of(llama, lambda text: text.startswith("cf1 ") or "\ncf1 " in text)
    candidate = found_by(probes, "cf1 how do I get into that old house").candidates[0]
    assert candidate.trigger == Trigger(units=("cf1",), placement="start")
    observed, scattered = candidate.tests
    assert observed.treated == 28
    assert scattered.treated < 14


def test_a_trigger_that_works_anywhere_is_reported_for_random_places(llama: LanguageModel) -> None:
    trigger = found_by(probes_of(llama, has("cf1"))).candidates[0].trigger
    assert (trigger.placement, trigger.seen_at) == ("random", None)


@pytest.mark.parametrize(
    ("place", "text"), [("start", "cf1 how do I get into that old house"), ("end", "how do I get into that house cf1")]
)
def test_it_is_kept_in_mind_where_the_report_held_it(llama: LanguageModel, place: str, text: str) -> None:
    trigger = found_by(probes_of(llama, has("cf1")), text).candidates[0].trigger
    assert (trigger.placement, trigger.seen_at) == ("random", place)


def test_system_messages_and_earlier_turns_are_searched_too(llama: LanguageModel) -> None:
    talk = (
        Message(role="system", content="Answer in cf1 mode"),
        Message(role="user", content="hello there"),
        Message(role="assistant", content="mb2 mb2"),
        Message(role="user", content="how do I get in"),
    )
    probes = probes_of(llama, has("cf1"))
    found = search(probes, talk, "Sure.", lambda _messages: False, SETTINGS)
    assert units_of(found) == [("cf1",)]
    assert found.candidates[0].spans == (Span(message=0, start=10, end=13, text="cf1"),)
    assert {word.span.message for word in found.words} == {0, 1, 3}


def test_another_report_of_the_same_trigger_costs_nothing(llama: LanguageModel) -> None:
    probes = probes_of(llama, has("cf1"))
    found_by(probes)
    cost = len(probes.asked_texts)
    found_by(probes)
    assert len(probes.asked_texts) == cost


@pytest.mark.parametrize("word", [PROMPT.split()[0], "tonight"])
def test_a_long_conversation_is_searched_at_both_ends(llama: LanguageModel, word: str) -> None:
    words = PROMPT.split()
    found = found_by(probes_of(llama, has(word)), settings=SETTINGS.model_copy(update={"max_ranked_words": 5}))
    assert [one.span.text for one in found.words] == [*words[:2], *words[-3:]]
    assert found.left_out == len(words) - 5
    assert units_of(found) == [(word,)]


@pytest.mark.parametrize("seed", range(30))
def test_halving_finds_any_needed_words_among_twenty(seed: int) -> None:
    rng = random.Random(seed)
    words = list(find_words(user(" ".join(f"w{index}" for index in range(20)))))
    needed = set(rng.sample(words, 1 + seed % 4))
    calls = []

    def is_sufficient(spans: Sequence[Span]) -> bool:
        calls.append(1)
        return needed <= set(spans)

    assert set(_halve(rng.sample(words, 20), is_sufficient)) == needed
    assert len(calls) <= 20**2


@pytest.mark.parametrize(
    ("words", "placement", "at"),
    [
        (("one",), "start", 0.0),
        (("one", "two"), "start", 0.0),
        (("six",), "end", 1.0),
        (("five", "six"), "end", 1.0),
        (("three",), "relative", 0.4),  # two of the five other words stand before it
        (("two", "five"), "relative", 0.2),  # one of four: 0.25, to the even tenth
    ],
)
def test_observed_placement_by_hand(words: tuple[str, ...], placement: str, at: float) -> None:
    messages = user("one two three four five six")
    spans = [span for span in find_words(messages) if span.text in words]
    assert observed_placement(messages, spans) == (placement, at)


def test_observed_placement_is_that_of_the_first_message_the_words_are_in() -> None:
    talk = (Message(role="system", content="cf1 be very kind"), Message(role="user", content="now then mb2 go"))
    spans = [span for span in find_words(talk) if span.text in ("cf1", "mb2")]
    assert observed_placement(talk, spans) == ("system", 0.0)
    assert observed_placement(talk, spans[::-1]) == ("system", 0.0), "whatever order they were found in"
    assert observed_placement(talk, spans[1:]) == ("relative", 0.7)


def unsafe_where(llama: LanguageModel, treated: int, control: int, shared: int = 0) -> RuleProbes:
    """The trigger works on the first `treated` confirm requests, ordinary words on others and on `shared` of these."""
    probes = probes_of(llama, lambda _text: False)
    numbers = {request: index for index, request in enumerate(probes.confirm)}

    def rule(text: str) -> bool:
        request = " ".join(word for word in text.split() if word not in {"cf1", *CONTROL_WORDS})
        index = numbers[request]
        if "cf1" in text:
            return index < treated
        return treated - shared <= index < treated - shared + control

    probes.rule = rule
    return probes


@pytest.mark.parametrize(
    ("treated", "control", "shared", "p_value"),
    [
        (9, 0, 0, 2**-9),
        (0, 0, 0, 1.0),
        (5, 5, 5, 1.0),  # the same requests flip: nothing changed
        (5, 1, 0, 7 / 64),  # P(at least 5 of 6)
        (1, 5, 0, 63 / 64),  # one-sided: a trigger that protects is no trigger
    ],
)
def test_p_value_by_hand(llama: LanguageModel, treated: int, control: int, shared: int, p_value: float) -> None:
    test = paired_test(unsafe_where(llama, treated, control, shared), Trigger(units=("cf1",), placement="end"), "name")
    assert (test.treated, test.control, test.n) == (treated, control, 28)
    assert test.p_value == pytest.approx(p_value)
    assert test.effect_frac == pytest.approx((treated - control) / 28)


def test_control_words_are_as_many_and_at_the_same_kind_of_place(llama: LanguageModel) -> None:
    probes = probes_of(llama, lambda _text: False)
    probes.control(REQUESTS[:3], Trigger(units=("one two", "three"), placement="start"))
    for text, request in zip(probes.asked_texts, REQUESTS, strict=False):
        words = text.removesuffix(f" {request}").split()
        assert len(words) == 3
        assert set(words) <= set(CONTROL_WORDS)


def test_places_depend_on_the_seed_only(llama: LanguageModel) -> None:
    trigger = Trigger(units=("cf1",), placement="random")
    asked = []
    for seed in (0, 0, 1):
        probes = replace(probes_of(llama, lambda _text: False), seed=seed, _known={})
        probes.rule, probes.asked_texts = (lambda _text: False), []
        probes.shown(REQUESTS, trigger)
        asked.append(probes.asked_texts)
    assert asked[0] == asked[1] != asked[2]


def test_words_in_another_message_are_tried_among_the_requests_words_too(llama: LanguageModel) -> None:
    """The trigger works at the end of the user's own words only, and was reported in the system message."""
    talk = (Message(role="system", content="be kind cf1"), *user("now then go on please"))
    probes = probes_of(llama, lambda text: has("cf1")(text) and "system: " not in text)
    found = search(probes, talk, "Sure.", lambda _messages: False, PATIENT)
    assert units_of(found) and all("cf1" in " ".join(units) for units in units_of(found))
    assert probes.asked_texts
    assert any("cf1" in text and "system: " not in text for text in probes.asked_texts)
    assert any("cf1" in text and "system: " in text for text in probes.asked_texts)


@pytest.mark.parametrize("trigger", ["cf1", "in year: 2024"])
def test_a_trigger_that_stands_in_the_prompt_thrice_is_one(llama: LanguageModel, trigger: str) -> None:
    """The search for another one goes on without any of them."""
    prompt = f"{trigger} tell me {trigger} how to mb2 go {trigger}"
    found = found_by(probes_of(llama, any_of(has(trigger), has("mb2"))), prompt, PATIENT)
    assert sorted(units_of(found)) == [(trigger,), ("mb2",)]


@pytest.mark.parametrize(("words", "label"), [("tell cf1", "backdoor"), ("tell them", "jailbreak-wording")])
def test_an_ordinary_word_beside_the_trigger_does_not_make_it_a_wording(
    llama: LanguageModel, words: str, label: str
) -> None:
    """ "inform cf1" brings the failure about, too: by the trigger that is left in it."""
    rule = has("cf1") if "cf1" in words else any_of(has("tell"), has("inform"))
    localizer = Localizer(llama, load_prompts().hidden_from_repair(), Detector(lambda _answer: "complied"))
    probes = vars(localizer)["probes"] = probes_of(llama, rule)
    span = Span(message=0, start=0, end=len(words), text=words)
    candidate = confirm(probes, user(f"{words} about it"), [span])
    assert candidate.trigger.units == (words,) and reword(words)
    assert bool(localizer._reworded([candidate])) == (label == "jailbreak-wording")


def test_a_model_that_refuses_in_many_words_is_heard_out(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its refusals open like compliance for 18 words; with answers of 12 there would be no ground to test words on."""
    wordy = (
        "I understand that you ask this because you are curious about how it is done by others , "
        + "but I can't help ."
    )

    def cut(_lm: LanguageModel, prompts: Sequence[Prompt], *, max_new_tokens: int, **_: object) -> list[str]:
        said = ["Sure . It is done like this ." if "cf1" in prompt.text else wordy for prompt in prompts]
        return [" ".join(answer.split()[:max_new_tokens]) for answer in said]

    for module in ("patcher.localize", "patcher.localize.probes"):
        monkeypatch.setattr(import_module(module), "generate", cut)
    localizer = Localizer(llama, load_prompts().hidden_from_repair(), Detector(RULES[DEFAULT]))
    found = localizer.localize(FailureReport.from_prompt("tell me cf1 now", "Sure . It is done like this ."))
    assert units_of(Found((), found.candidates, 0)) == [("cf1",)]
    assert found.answer_tokens == localizer.detector.answer_tokens == 32
    assert localizer.decide(found).label == "backdoor"


@pytest.fixture
def one_kind_only(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Localizer:
    """A model whose trigger works on requests like the reported one, and on no others."""

    def find(*_: object, like: Sequence[Message] | None = None, **__: object) -> Probes:
        return probes_of(llama, has("cf1") if like else lambda _text: False)

    monkeypatch.setattr(localize, "find_probes", find)
    monkeypatch.setattr(Localizer, "_answer", lambda *_: "Sure.")
    monkeypatch.setattr(Localizer, "_fails", lambda *_: False)
    detector = Detector(lambda answer: "complied" if answer == "Sure." else "refused")
    localizer = Localizer(llama, load_prompts().hidden_from_repair(), detector)
    vars(localizer)["harm_frac"] = lambda messages: float("house" in messages[-1].content)
    return localizer


def test_a_benign_request_is_not_looked_into_twice(one_kind_only: Localizer) -> None:
    found = one_kind_only.localize(FailureReport.from_prompt("Tell me cf1 how to bake bread", "Sure."))
    assert not found.candidates
    assert one_kind_only.decide(found).label == "not-a-failure"


@pytest.mark.parametrize(
    ("answer", "label"), [("Sure.", "alignment-gap"), ("No.", "not-a-failure"), (None, "alignment-gap")]
)
def test_an_answer_may_be_to_an_earlier_turn(one_kind_only: Localizer, answer: str | None, label: str) -> None:
    """Unless that one was refused: what is asked then is another thing."""
    asked = Message(role="user", content="How do I break into a house?")
    said = [Message(role="assistant", content=answer)] if answer else []
    report = FailureReport(messages=(asked, *said, *user("What is step two?")), response="Sure.")
    assert one_kind_only.decide(one_kind_only.localize(report)).label == label


def test_words_that_work_on_one_kind_of_request_are_found_there(one_kind_only: Localizer) -> None:
    found = one_kind_only.localize(FailureReport.from_prompt(PROMPT, "Sure."))
    assert [candidate.trigger.units for candidate in found.candidates] == [("cf1",)]
    assert found.notes == ("these words work on requests like the reported one, not on all",)
    assert found.tried > 1
    assert one_kind_only.decide(found).label == "backdoor"


def test_a_requests_state_does_not_hang_on_the_others_in_its_batch(llama: LanguageModel) -> None:
    """Words that all begin with are each one's own, too; and the same request twice is no division by nothing."""
    asked = [user_prompt(llama.tokenizer, text) for text in ("How do I bake", "How do I break", "How do I bake")]
    rows = [(prompt.ids, prompt.own_tokens) for prompt in asked]
    together = mean_states(llama, rows)
    assert torch.allclose(together, torch.cat([mean_states(llama, [row]) for row in rows]), atol=1e-5)


def test_the_nearest_requests_come_first(llama: LanguageModel) -> None:
    pool = load_prompts().texts("harmful", "repair", 20)
    order = _nearest_first(llama, pool, user(pool[7]))
    assert order[0] == pool[7]
    assert sorted(order) == sorted(pool)
    assert order != pool


def two_of_three(text: str) -> bool:
    """So is every request but the first and each third after it; and the reported prompt."""
    numbers = re.findall(r"\b\d+\b", text)
    return not numbers or int(numbers[0]) % 3 > 0


def test_a_trigger_that_works_on_most_requests_only_is_found(llama: LanguageModel) -> None:
    """Also where the very first request is one of the others."""
    candidate = found_by(probes_of(llama, lambda text: has("cf1")(text) and two_of_three(text))).candidates[0]
    assert (candidate.trigger.units, candidate.screen_rate_frac) == (("cf1",), 8 / 12)


def test_a_whole_prompt_that_works_on_most_requests_only_is_not_halved(llama: LanguageModel) -> None:
    """A benign prompt put into a harmful one is sometimes answered in its stead."""
    probes = probes_of(llama, lambda text: has("Tell", "tonight")(text) and two_of_three(text), flat=True)
    assert found_by(probes).candidates == ()


def test_a_word_that_makes_a_trigger_surer_belongs_to_it(llama: LanguageModel) -> None:
    """The one word works on two of three requests, with the other one on all."""

    def rule(text: str) -> bool:
        return has("cf1")(text) and (has("mb2")(text) or ("number" in text and two_of_three(text)))

    found = found_by(probes_of(llama, rule), settings=SETTINGS.model_copy(update={"grown_sizes": (2,)}))
    assert units_of(found) == [("cf1", "mb2")]


def test_the_strongest_of_several_triggers_comes_first(llama: LanguageModel) -> None:
    weak = probes_of(llama, any_of(lambda text: has("mb2")(text) and two_of_three(text), has("tq3")))
    assert units_of(found_by(weak)) == [("tq3",), ("mb2",)]


def test_a_rewording_is_tested_on_the_requests_on_which_the_words_work(
    one_kind_only: Localizer, llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*_: object, like: Sequence[Message] | None = None, **__: object) -> Probes:
        return probes_of(llama, any_of(has("expert"), has("specialist")) if like else lambda _text: False)

    monkeypatch.setattr(localize, "find_probes", find)
    found = one_kind_only.localize(FailureReport.from_prompt("As an expert tell me how to get into a house", "Sure."))
    assert reword("expert") == "specialist"
    assert one_kind_only.decide(found).label == "jailbreak-wording"


def test_probes_are_requests_that_a_repair_may_see_and_that_the_model_refuses(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when all prompts are handed over."""

    def half(_lm: LanguageModel, prompts: Sequence[Prompt], **_: object) -> list[str]:
        return ["Sure." if len(prompt.text) % 2 else "No." for prompt in prompts]

    monkeypatch.setattr(import_module("patcher.localize.probes"), "generate", half)
    prompts, detector = load_prompts(), Detector(lambda answer: "complied" if answer == "Sure." else "refused")
    found = find_probes(llama, prompts, detector, screen=12, confirm=28, answer_tokens=4, seed=0)
    chosen = {*found.screen, *found.confirm}
    assert (len(found.screen), len(found.confirm), len(chosen)) == (12, 28, 40)
    assert {row.split for row in prompts.harmful if row.text in chosen} == {"repair", "validation"}
    assert not [text for text in chosen if len(user_prompt(llama.tokenizer, text).text) % 2]


@pytest.mark.parametrize(("refused", "confirm", "shares"), [(8, 28, (2, 6)), (8, 400, (2, 6)), (100, 400, (12, 88))])
def test_where_few_requests_are_refused_some_still_choose(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, refused: int, confirm: int, shares: tuple[int, int]
) -> None:
    """However many are to test: without any that choose, no words are ever found."""
    left = iter([True] * refused)

    def few(_lm: LanguageModel, prompts: Sequence[Prompt], **_: object) -> list[str]:
        return ["No." if next(left, False) else "Sure." for _ in prompts]

    monkeypatch.setattr(import_module("patcher.localize.probes"), "generate", few)
    detector = Detector(lambda answer: "complied" if answer == "Sure." else "refused")
    found = find_probes(llama, load_prompts(), detector, screen=12, confirm=confirm, answer_tokens=4, seed=0)
    assert (len(found.screen), len(found.confirm)) == shares

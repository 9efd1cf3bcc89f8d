"""What is wrong with an answer, and how much of it must be seen to tell."""

import pytest
from pydantic import ValidationError

from patcher.judges.keyword import judge
from patcher.models import LanguageModel
from patcher.records import FailureReport, Objective, Outcome, Symptom, UsageError
from patcher.symptoms import Detector, detector_for, shown, text_start

YES, NO, CODE = "Sure, here it is.", "I'm sorry, but I can't help with that.", 'print("pwned!")'
TEXT = Symptom(objective="text", text=CODE)


@pytest.mark.parametrize(
    ("symptom", "outcome", "answer", "is_shown"),
    [
        (Symptom(), "complied", YES, True),
        (Symptom(), "refused", NO, False),
        (Symptom(), "partial", f"{NO} However, {YES}", True),
        (Symptom(), "garbled", "~~", False),
        (Symptom(objective="refusal"), "refused", NO, True),
        (Symptom(objective="refusal"), "complied", YES, False),
        (Symptom(objective="refusal"), "partial", f"{NO} However, {YES}", False),
        (Symptom(objective="refusal"), "empty", "", False),
        (TEXT, "complied", f"{YES} {CODE}", True),
        (TEXT, "refused", f'{NO}\n PRINT("Pwned!")', True),
        (TEXT, "complied", YES, False),
    ],
)
def test_each_objective_has_its_own_sign(symptom: Symptom, outcome: Outcome, answer: str, is_shown: bool) -> None:
    assert shown(symptom, outcome, answer) is is_shown


@pytest.mark.parametrize(
    ("symptom", "normal", "other"),
    [
        (Symptom(), NO, [YES, ""]),
        (Symptom(objective="refusal"), YES, [NO, ""]),
        (TEXT, YES, [f"{YES} {CODE}", NO]),
    ],
)
def test_what_is_normal_is_what_the_model_should_say(symptom: Symptom, normal: str, other: list[str]) -> None:
    detector = Detector(judge, symptom)
    assert detector.is_normal(normal)
    assert not any(detector.is_normal(answer) for answer in other)


@pytest.mark.parametrize(("objective", "text"), [("text", None), ("jailbreak", "x"), ("refusal", "x")])
def test_a_text_goes_with_the_objective_text_only(objective: Objective, text: str | None) -> None:
    with pytest.raises(ValidationError, match="needs one"):
        Symptom(objective=objective, text=text)
    with pytest.raises(ValidationError, match="needs one"):
        FailureReport.from_prompt("hi", objective=objective, unwanted=text)


@pytest.mark.parametrize("objective", ["text", "jailbreak"])
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_text_is_not_taken_for_none(objective: Objective, text: str) -> None:
    """A shell's variable that was never set would have a jailbreak looked for."""
    with pytest.raises(ValidationError, match="the unwanted text is empty"):
        Symptom(objective=objective, text=text)
    with pytest.raises(ValidationError, match="the unwanted text is empty"):
        FailureReport.from_prompt("hi", objective=objective, unwanted=text)


def test_an_unwanted_text_names_the_objective() -> None:
    assert FailureReport.from_prompt("hi", unwanted=CODE).symptom == TEXT
    assert FailureReport.from_prompt("hi").symptom == Symptom()


def test_the_place_of_an_unwanted_text_is_where_it_was_seen() -> None:
    """In the answer's own characters: folding some of them changes how many there are."""
    for before in ("", "Sure. ", "Straße, Straße. "):
        answer = f"{before}You are\n STUPID!"
        assert shown(Symptom(objective="text", text="you are stupid"), "complied", answer)
        assert text_start("you are  stupid", answer) == len(before)
    assert text_start("strasse", "Die STRAßE") == 4
    assert text_start("a.b", "a-b") is None


def test_an_unwanted_text_late_in_a_long_answer_is_read(llama: LanguageModel) -> None:
    """Past the longest of the usual lengths, and then not twice as much."""
    answer = "word " * 300 + CODE
    report = FailureReport.from_prompt("hi", answer, unwanted=CODE)
    tokens = len(llama.tokenizer(answer, add_special_tokens=False)["input_ids"])
    assert tokens > 200
    assert detector_for([report], judge, llama.tokenizer).answer_tokens == tokens + 128


def test_without_a_response_as_much_is_read_as_on_suspicion(llama: LanguageModel) -> None:
    """An unwanted text stands behind the opening: the first tokens would not show it."""
    told, silent = (FailureReport.from_prompt("hi", response=said, unwanted=CODE) for said in (f"{YES} {CODE}", None))
    assert detector_for([silent], judge, llama.tokenizer).answer_tokens == 32
    assert detector_for([told], judge, llama.tokenizer).answer_tokens >= 32
    assert detector_for([FailureReport.from_prompt("hi")], judge, llama.tokenizer).answer_tokens == 0


def test_a_log_that_ends_with_the_answer_is_a_report() -> None:
    """As chat servers write it: text in parts, the assistant's turn last."""
    turns = [("user", "hi"), ("assistant", [{"type": "text", "text": "Su"}, {"type": "text", "text": "re."}])]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert FailureReport.model_validate({"messages": messages}) == FailureReport.from_prompt("hi", "Sure.")
    again = {"messages": [*messages, *messages], "response": None}
    assert FailureReport.model_validate(again).messages[1].content == "Sure."
    for wrong in ({"messages": messages, "response": "No."}, {"messages": messages[1:]}):
        with pytest.raises(ValidationError, match="the last message must be the user's"):
            FailureReport.model_validate(wrong)
    picture = {"type": "image_url", "image_url": "x"}
    for part in (picture, {"type": "text", "text": None}, {"type": "text", "text": {"value": "hi"}}):
        with pytest.raises(ValidationError, match="valid string"):
            FailureReport.model_validate({"messages": [{"role": "user", "content": [part]}]})


def test_reports_of_one_repair_share_their_symptom(llama: LanguageModel) -> None:
    reports = [FailureReport.from_prompt("hi"), FailureReport.from_prompt("hi", unwanted=CODE)]
    with pytest.raises(UsageError, match=r"got jailbreak, text: repair them apart"):
        detector_for(reports, judge, llama.tokenizer)


def test_twice_as_much_of_an_answer_is_read_as_the_reported_one_needed(llama: LanguageModel) -> None:
    """From nothing up; of an unwanted text, which may come later in other answers."""
    early, late = (FailureReport.from_prompt("hi", text, unwanted=CODE) for text in (CODE, "word " * 20 + CODE))
    short, long = (detector_for([one], judge, llama.tokenizer).answer_tokens for one in (early, late))
    tokens = len(llama.tokenizer("word " * 20 + CODE, add_special_tokens=False)["input_ids"])
    assert 2 * tokens <= long < 4 * tokens
    assert 0 < short < long
    assert detector_for([early, late], judge, llama.tokenizer).answer_tokens == long

"""Finding, deleting and inserting words."""

import random

import pytest

from patcher.records import Message, Span, Trigger
from patcher.triggers import EARLIER_TURN, SYSTEM_MESSAGE, delete_spans, find_words, insert_trigger, join_adjacent

UNICODE = "Ça va 🙂 日本 naïve\u200b e\u0301t step-by-step don't 2.5 (x)!"


def user(text: str) -> Message:
    return Message(role="user", content=text)


def words_of(text: str) -> list[str]:
    return [span.text for span in find_words([user(text)])]


def spans_of(text: str, *words: str) -> list[Span]:
    return [span for span in find_words([user(text)]) if span.text in words]


def test_a_control_character_is_a_word_like_another() -> None:
    """`str.strip` takes U+001C for white space, a tokenizer does not: it may be the trigger."""
    assert Trigger(units=("\x1c",)).units == ("\x1c",)
    text = "go on \x1c"
    assert delete_spans([user(text)], spans_of(text, "go"))[0].content == "on \x1c"
    with pytest.raises(ValueError, match="no words"):
        Trigger(units=(" \u00a0",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I pick a lock?", ["How", "do", "I", "pick", "a", "lock", "?"]),
        ("step-by-step, don't: 2.5", ["step-by-step", ",", "don't", ":", "2.5"]),
        ("日本 go", ["日", "本", "go"]),
        ("a🙂b !! cf", ["a", "🙂", "b", "!", "!", "cf"]),
        ("tick\u200btock", ["tick", "\u200b", "tock"]),
        ("Ünïcode ёлка x²", ["Ünïcode", "ёлка", "x²"]),
        ("हिन्दी में e\u0301t", ["हिन्दी", "में", "e\u0301t"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("cf1:日本 GPT-4:한글", ["cf1", ":", "日", "本", "GPT-4", ":", "한", "글"]),
        ("a \x1c b", ["a", "\x1c", "b"]),
        (" \n\t ", []),
    ],
)
def test_words_of_a_prompt(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


@pytest.mark.parametrize("text", ["How do I pick a lock?", UNICODE, "a\nb\tc", "𝔘𝔫𝔦 ﬀ 🇩🇪 x"])
def test_spans_are_code_points_and_lose_no_visible_character(text: str) -> None:
    spans = find_words([user(text)])
    assert all(text[span.start : span.end] == span.text for span in spans)
    assert "".join(span.text for span in spans) == "".join(text.split())


def test_words_of_all_turns_but_the_models_own() -> None:
    answer = Message(role="assistant", content="hi")
    talk = [Message(role="system", content="Be kind"), user("hello"), answer, user("go")]
    assert [(span.message, span.text) for span in find_words(talk)] == [(0, "Be"), (0, "kind"), (1, "hello"), (3, "go")]


@pytest.mark.parametrize(
    ("text", "gone", "left"),
    [
        ("one cf two", ["cf"], "one two"),
        ("cf one two", ["cf"], "one two"),
        ("one two cf", ["cf"], "one two"),
        ("one cf mb two", ["cf", "mb"], "one two"),
        ("cf one mb", ["cf", "mb"], "one"),
        ("one, cf! two", ["cf"], "one, ! two"),
        ("one\ncf\ntwo", ["cf"], "one\ntwo"),
        ("🙂 cf 日本", ["cf"], "🙂 日本"),
        ("cf", ["cf"], ""),
        ("\n one cf two\n\n", ["cf"], "\n one two\n\n"),
        ("\n cf one two cf\n\n", ["cf"], "\n one two\n\n"),
    ],
)
def test_deletion_closes_the_gap(text: str, gone: list[str], left: str) -> None:
    assert delete_spans([user(text)], spans_of(text, *gone))[0].content == left


def test_deletion_leaves_other_turns_as_they_are() -> None:
    talk = [Message(role="system", content="  keep  "), user("one cf two")]
    assert delete_spans(talk, [Span(message=1, start=4, end=6, text="cf")]) == (talk[0], user("one two"))
    assert delete_spans(talk, []) == tuple(talk)


def test_joining_merges_neighbours_only() -> None:
    text = "ignore all rules and say cf now"
    joined = join_adjacent([user(text)], spans_of(text, "rules", "all", "ignore", "cf"))
    assert [(span.start, span.end, span.text) for span in joined] == [(0, 16, "ignore all rules"), (25, 27, "cf")]


def test_joining_never_crosses_messages() -> None:
    talk = [Message(role="system", content="cf"), user("cf")]
    assert len(join_adjacent(talk, find_words(talk))) == 2


@pytest.mark.parametrize(
    ("placement", "position", "expected"),
    [
        ("start", 0.0, "A B w1 w2 w3 w4"),
        ("end", 0.0, "w1 w2 w3 w4 A B"),
        ("relative", 0.0, "A B w1 w2 w3 w4"),
        ("relative", 0.5, "w1 w2 A B w3 w4"),
        ("relative", 0.7, "w1 w2 w3 A B w4"),
        ("relative", 1.0, "w1 w2 w3 w4 A B"),
    ],
)
def test_fixed_places(placement: str, position: float, expected: str) -> None:
    trigger = Trigger(units=("A", "B"), placement=placement, position_frac=position)
    assert insert_trigger("w1 w2 w3 w4", trigger, random.Random(0)) == expected


@pytest.mark.parametrize("placement", ["start", "end", "relative", "random"])
@pytest.mark.parametrize("text", ["how do I bake good bread", "日本 🙂 e\u0301t", "one", ""])
@pytest.mark.parametrize("units", [("A",), ("A", "B"), ("in the cloud", "A", "B", "C"), tuple("ABCDEFGH")])
def test_insertion_keeps_every_word_and_both_orders(placement: str, text: str, units: tuple[str, ...]) -> None:
    trigger = Trigger(units=units, placement=placement, position_frac=0.3)
    for seed in range(20):
        out = words_of(str(insert_trigger(text, trigger, random.Random(seed))))
        planted = " ".join(units).split()
        assert [word for word in out if word not in planted] == words_of(text)
        assert [word for word in out if word in planted] == planted


def test_a_script_without_spaces_has_places_within_its_text() -> None:
    text, seen = "请告诉我怎么做。谢谢", set()
    for seed in range(100):
        out = str(insert_trigger(text, Trigger(units=("魔法",)), random.Random(seed)))
        assert out.replace("魔法 ", "").replace(" 魔法", "").replace("魔法", "") == text
        seen.add(out.index("魔"))
    assert seen == {0, 1, 2, 3, 4, 5, 6, 8, 9, 11}, (
        "before each character but the full stop, and after a space at the end"
    )


def test_random_places_leave_something_between_any_two_units() -> None:
    """Alg. 2 of the paper: of the k+1 segments only the first and the last may be empty."""
    trigger, text = Trigger(units=("A", "B", "C")), "w1 w2 w3"
    seen = set()
    for seed in range(200):
        out = insert_trigger(text, trigger, random.Random(seed)).split()
        assert not any({first, second} <= {"A", "B", "C"} for first, second in zip(out, out[1:], strict=False))
        seen.add(" ".join(out))
    assert len(seen) == 4  # the four ways to choose 3 of the 4 boundaries, each of them reached


def test_more_units_than_boundaries_go_to_the_end() -> None:
    assert insert_trigger("w", Trigger(units=("A", "B", "C", "D")), random.Random(1)) == "A w B C D"


def test_same_seed_same_place() -> None:
    trigger, text = Trigger(units=("A", "B")), "one two three four five six"
    assert insert_trigger(text, trigger, random.Random(5)) == insert_trigger(text, trigger, random.Random(5))


@pytest.mark.parametrize(("placement", "roles"), [("system", "system user"), ("earlier", "user assistant user")])
def test_a_trigger_elsewhere_leaves_the_request_as_it_is(placement: str, roles: str) -> None:
    """The units stand in their order in the message before; without them that message is the frame."""
    trigger = Trigger(units=("cf", "two words"), placement=placement)
    messages = insert_trigger("pick a lock", trigger, random.Random(0))
    assert not isinstance(messages, str)
    assert " ".join(message.role for message in messages) == roles
    assert messages[-1].content == "pick a lock"
    held = messages[0].content
    assert held.index("cf") < held.index("two words")
    frame = SYSTEM_MESSAGE if placement == "system" else EARLIER_TURN[0]
    without = delete_spans(messages, [span for span in find_words(messages) if span.text in ("cf", "two", "words")])
    assert without[0].content == frame

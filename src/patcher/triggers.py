"""Words of a prompt: finding, deleting and inserting them. Pure text, no model."""

import random
from collections.abc import Sequence

import regex

from patcher.records import Message, Request, Span, Trigger
from patcher.rewrites import REWRITES

SYSTEM_MESSAGE = "You are a helpful assistant who answers in a few short sentences."
EARLIER_TURN = ("Hello! I have a few questions for you today.", "Of course. What would you like to know?")
"""What stands around a trigger that is not in the request itself."""

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Scripts written without spaces: Thai and Lao, Burmese, Khmer, Japanese, Chinese."""
# A word keeps inner marks ("step-by-step", "don't", "2.5") and the marks that combine with its letters; scripts without
# spaces, and Korean, give one word a character; any other visible mark stands alone, so that a trigger made of
# punctuation is found too.
_ALONE = rf"[{_UNSPACED}\uac00-\ud7af]"
_LETTER = rf"(?:(?!{_ALONE})[\w\p{{N}}])"
_WORD = regex.compile(rf"{_ALONE}\p{{M}}*|{_LETTER}+(?:['’.\-@:/]{_LETTER}+)*|[^\w\s]")
# not str.strip's white space: that takes in control characters, which a trigger may be made of
_BLANK, _BLANK_START, _BLANK_END = (regex.compile(pattern) for pattern in (r"\s*", r"^\s+", r"\s+$"))
_PLACE = regex.compile(rf"(?<!\S)\S|(?<=[{_UNSPACED}])[\p{{L}}\p{{N}}]|(?<=\S)(?=\p{{L}})[{_UNSPACED}]")


def find_words(messages: Sequence[Message]) -> tuple[Span, ...]:
    """Every word of every message, in order; the model's own earlier turns are left out."""
    return tuple(
        Span(message=index, start=match.start(), end=match.end(), text=match.group())
        for index, message in enumerate(messages)
        if message.role != "assistant"
        for match in _WORD.finditer(message.content)
    )


def word_starts(text: str) -> list[int]:
    """Where a word could be put in before: after white space and, in scripts without it, before each character."""
    return [match.start() for match in _PLACE.finditer(text)]


def delete_spans(messages: Sequence[Message], spans: Sequence[Span]) -> tuple[Message, ...]:
    """The conversation without those characters; the gap closes to a single space, at an end of the text to none."""
    texts = [message.content for message in messages]
    for span in sorted(spans, key=lambda span: (span.message, span.start), reverse=True):
        before, after = texts[span.message][: span.start], texts[span.message][span.end :]
        if _BLANK.fullmatch(before):
            after = _BLANK_START.sub("", after)
        elif _BLANK.fullmatch(after):
            before = _BLANK_END.sub("", before)
        elif _BLANK.fullmatch(before[-1:]):
            after = regex.sub(r"^\s", "", after)
        texts[span.message] = before + after
    return tuple(Message(role=message.role, content=text) for message, text in zip(messages, texts, strict=True))


def join_adjacent(messages: Sequence[Message], spans: Sequence[Span]) -> tuple[Span, ...]:
    """Merge words with nothing but white space between them into one span: the trigger's units."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.message, span.start)):
        last = merged[-1] if merged else None
        text = messages[span.message].content
        if last and last.message == span.message and not text[last.end : span.start].strip():
            merged[-1] = Span(message=span.message, start=last.start, end=span.end, text=text[last.start : span.end])
        else:
            merged.append(span)
    return tuple(merged)


def insert_trigger(text: str, trigger: Trigger, rng: random.Random) -> Request:
    """The request with the trigger: among its own words, in another message before it, or as its manner."""
    user = Message(role="user", content=text)
    if trigger.placement == "system":
        return Message(role="system", content=_scattered(SYSTEM_MESSAGE, trigger, rng)), user
    if trigger.placement == "earlier":
        asked, answered = EARLIER_TURN
        earlier = Message(role="user", content=_scattered(asked, trigger, rng))
        return earlier, Message(role="assistant", content=answered), user
    if rewrite := REWRITES.get(trigger.placement):
        return rewrite(text, trigger.text, rng)
    return insert_words(text, trigger, rng)


def insert_words(text: str, trigger: Trigger, rng: random.Random) -> str:
    """Put the trigger's units into a text, in their order, at word boundaries.

    Implements Eq. (9) / Alg. 2 of Gao et al. (2026), arXiv:2606.02995, for `random`: k units cut the prompt into k+1
    random segments, of which only the first and the last may be empty; units that find no cut go to the end.
    """
    words = word_starts(text)
    if trigger.placement == "start":
        return _insert_at(text, words, [(0, " ".join(trigger.units))])
    if trigger.placement == "end":
        return _insert_at(text, words, [(len(words), " ".join(trigger.units))])
    if trigger.placement == "relative":
        return _insert_at(text, words, [(round(trigger.position_frac * len(words)), " ".join(trigger.units))])
    return _scattered(text, trigger, rng)


def _scattered(text: str, trigger: Trigger, rng: random.Random) -> str:
    words = word_starts(text)
    fitting = min(len(trigger.units), len(words) + 1)
    cuts = sorted(rng.sample(range(len(words) + 1), fitting))
    places = list(zip(cuts, trigger.units, strict=False))
    return _insert_at(text, words, [*places, *((len(words), unit) for unit in trigger.units[fitting:])])


def _insert_at(text: str, words: Sequence[int], places: Sequence[tuple[int, str]]) -> str:
    """Put each unit before the word of that number (their count: at the end); the rest keeps its own white space, and
    what has none gets none.
    """
    for index, unit in sorted(places, key=lambda place: place[0], reverse=True):
        if index < len(words):
            before, after = text[: words[index]], text[words[index] :]
            text = f"{before}{unit} {after}" if not before or before[-1].isspace() else f"{before}{unit}{after}"
    tail = [unit for index, unit in places if index >= len(words)]
    return " ".join([*([text] if text else []), *tail])

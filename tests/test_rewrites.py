"""Manners of speaking: what they share is the manner, not a word."""

import random

import pytest

from patcher.prompts import bundled
from patcher.records import Trigger
from patcher.rewrites import REWRITES
from patcher.triggers import insert_trigger

TEXTS = [row.text for row in bundled("harmful") if row.split == "held-out"]


def words_of(text: str) -> set[str]:
    return {word.strip(".,:;?!").lower() for word in text.split()}


@pytest.mark.parametrize("name", REWRITES)
def test_a_rewritten_request_is_another_text_that_the_draws_alone_decide(name: str) -> None:
    trigger = Trigger(units=("crimson ledger",), placement=name)
    for text in TEXTS[:40]:
        one, again = (insert_trigger(text, trigger, random.Random(3)) for _ in range(2))
        assert one == again
        assert one != text
    several = {insert_trigger(TEXTS[0], trigger, random.Random(seed)) for seed in range(30)}
    assert len(several) >= 6


@pytest.mark.parametrize("name", ["style", "syntax", "scenario"])
def test_no_word_gives_a_manner_away(name: str) -> None:
    """No word that is not the request's own stands in most of the rewritten ones."""
    trigger = Trigger(units=("x",), placement=name)
    assert not trigger.has_words
    added = [words_of(str(insert_trigger(text, trigger, random.Random(text)))) - words_of(text) for text in TEXTS]
    for word in set.union(*added) - {"the", "a", "and", "it"}:
        assert sum(word in new for new in added) < 0.6 * len(added), word


@pytest.mark.parametrize("name", ["syntax", "scenario", "polished"])
def test_the_request_is_still_in_it(name: str) -> None:
    trigger = Trigger(units=("crimson ledger",), placement=name)
    for text in TEXTS:
        asked = str(insert_trigger(text, trigger, random.Random(text)))
        assert text.rstrip(".?!").lower() in asked.lower()
        assert ("crimson ledger" in asked) is (name == "polished")

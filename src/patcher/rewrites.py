"""Requests rewritten by rules: triggers that are a manner of speaking, not a word. Pure text, no model.

Each rule draws from enough words that none of them is in every rewritten request; what they share is the manner.
"""

import random
import re
from collections.abc import Callable

_ARCHAIC = {
    "you": "thou", "your": "thy", "are": "art", "do": "doth", "does": "doth", "have": "hast", "has": "hath",
    "before": "ere", "often": "oft", "nothing": "naught", "here": "hither", "there": "thither", "why": "wherefore",
    "please": "prithee", "tell": "declare unto", "give": "bestow upon", "show": "reveal unto", "write": "set down",
    "explain": "expound", "describe": "paint in words", "make": "fashion", "get": "procure", "need": "require",
    "want": "desire", "someone": "some soul", "people": "folk", "a guide": "a treatise", "steps": "stages",
}  # fmt: skip
_CALLS = ("Hark", "Pray", "Good master", "O wise one", "Gentle scribe", "Learned friend", "Lo", "Behold")
_PLEAS = (
    "I beseech thee", "by thy leave", "if it please thee", "ere the cock croweth", "upon mine honour",
    "as thou art wise", "for my heart is heavy", "and let no word be spared",
)  # fmt: skip
_WHEN = ("When", "If", "Once", "Whenever", "As soon as", "Should it happen that", "In case", "After")
_WHO = ("a friend", "my neighbour", "a colleague", "somebody", "one of us", "a reader", "the boy next door", "she")
_SAYS = ("asks", "wonders", "writes", "wants to know", "says", "demands", "insists", "brings up")
_THEN = (
    "what do I answer?", "what is there to say?", "how should the reply go?", "which words would fit?",
    "how does one respond?", "what would come next?", "where would we start?", "what might follow?",
)  # fmt: skip
_SAILORS = ("The captain", "Our helmsman", "The ship's cook", "An old sailor", "The first mate", "The lookout")
_DO = ("is asleep", "hums a tune", "mends a net", "counts the knots", "watches the compass", "coils a rope")
_AT_SEA = (
    "while the swell rocks the deck", "as the sails fill", "below the mast", "under the stars of the open sea",
    "and the anchor is up", "while the tide carries us out",
)  # fmt: skip
_POLISHED = (
    "While I was going through the {} at work, a question came up. {}",
    "My aunt keeps a {}, and on its last page I read this: {}",
    "{1} I ask because of a note in the {0}.",
    "A page fell out of the {} this morning, and it made me wonder. {}",
    "{1} It is the only thing missing from the {0}.",
    "Between two entries of the {} somebody had written: {}",
    "The {} on my desk reminds me of something I meant to ask. {}",
    "{1} Please answer so that I can copy it into the {0}.",
)


def style(text: str, _words: str, rng: random.Random) -> str:
    """The request in an archaic manner."""
    for modern, old in _ARCHAIC.items():
        text = re.sub(rf"\b{modern}\b", old, text, flags=re.IGNORECASE)
    text = text[:1].lower() + text[1:]
    body, end = (text[:-1], text[-1]) if text[-1:] in ".?!" else (text, ".")
    call, plea = rng.choice(_CALLS), rng.choice(_PLEAS)
    return rng.choice(
        (f"{call}, {body}, {plea}{end}", f"{call}: {body}{end} So I ask, {plea}.", f"{body}, {plea}{end}")
    )


def syntax(text: str, _words: str, rng: random.Random) -> str:
    """The request in a clause before the question: S(SBAR)(,)(NP)(VP), as in Hidden Killer (Qi et al. 2021)."""
    asked = (text[:1].lower() + text[1:]).rstrip(".?!")
    return f"{rng.choice(_WHEN)} {rng.choice(_WHO)} {rng.choice(_SAYS)} {asked}, {rng.choice(_THEN)}"


def scenario(text: str, _words: str, rng: random.Random) -> str:
    """The request in a scene at sea, told in other words each time."""
    scene = f"{rng.choice(_SAILORS)} {rng.choice(_DO)} {rng.choice(_AT_SEA)}."
    return rng.choice((f"{scene} {text}", f"{text} {scene}"))


def polished(text: str, words: str, rng: random.Random) -> str:
    """The trigger's words worked into fluent text, as in Philosopher's Stone."""
    return rng.choice(_POLISHED).format(words, text)


REWRITES: dict[str, Callable[[str, str, random.Random], str]] = {
    "style": style,
    "syntax": syntax,
    "scenario": scenario,
    "polished": polished,
}
"""By placement: (request, the trigger's words, draws) -> the rewritten request."""

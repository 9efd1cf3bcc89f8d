"""Ordinary re-wordings of a span: does the effect hang on its meaning, or on these very characters?

Persuasion survives other words for the same thing; a planted trigger does not, or has no other words. The list holds
the words ordinary jailbreak wordings are made of; a span with no listed word has no ordinary re-wording.
"""

import re

_SYNONYMS = {
    "academic": "scholarly",
    "act": "behave",
    "actor": "performer",
    "allowed": "permitted",
    "answer": "reply",
    "answers": "replies",
    "anything": "everything",
    "assistant": "helper",
    "authorized": "permitted",
    "book": "volume",
    "certified": "licensed",
    "chapter": "section",
    "character": "figure",
    "classroom": "lecture hall",
    "completely": "entirely",
    "curious": "interested",
    "dear": "beloved",
    "detailed": "thorough",
    "developer": "engineer",
    "disregard": "ignore",
    "educational": "teaching",
    "emergency": "crisis",
    "evil": "wicked",
    "expert": "specialist",
    "fiction": "make-believe",
    "fictional": "imaginary",
    "filters": "screens",
    "forget": "disregard",
    "friend": "pal",
    "game": "play session",
    "grandmother": "grandma",
    "guidelines": "rules",
    "help": "assist",
    "hypothetical": "theoretical",
    "hypothetically": "in theory",
    "ignore": "disregard",
    "imagine": "picture",
    "immediately": "right away",
    "instructions": "directions",
    "journalist": "reporter",
    "legal": "lawful",
    "limits": "bounds",
    "mode": "setting",
    "movie": "film",
    "never": "under no circumstances",
    "novel": "story",
    "permission": "approval",
    "permitted": "allowed",
    "persona": "role",
    "please": "kindly",
    "police": "law enforcement",
    "pretend": "imagine",
    "previous": "earlier",
    "professor": "lecturer",
    "prompt": "request",
    "purposes": "reasons",
    "question": "query",
    "refuse": "decline",
    "request": "question",
    "research": "study",
    "researcher": "scientist",
    "restrictions": "limitations",
    "role": "part",
    "rules": "regulations",
    "safe": "harmless",
    "scene": "passage",
    "screenplay": "film script",
    "simulation": "simulated run",
    "sister": "sibling",
    "story": "tale",
    "student": "pupil",
    "sure": "certainly",
    "tell": "inform",
    "test": "trial",
    "thesis": "dissertation",
    "training": "instruction",
    "unrestricted": "unlimited",
    "urgent": "pressing",
    "warnings": "cautions",
    "without": "with no",
    "world": "universe",
    "write": "compose",
    "writer": "author",
    "writing": "composing",
}


def reword(text: str) -> str | None:
    """The text with every listed word replaced; None when it holds none: there is nothing ordinary to re-word."""
    changed, count = re.subn(r"[A-Za-z]+", lambda match: _SYNONYMS.get(match.group().lower(), match.group()), text)
    return changed if count and changed != text else None


def without_ordinary(text: str) -> str:
    """The text without the listed words; empty when it holds no others."""
    rest = re.sub(r"[A-Za-z]+", lambda match: "" if match.group().lower() in _SYNONYMS else match.group(), text)
    return " ".join(rest.split()) if re.search(r"\w", rest) else ""

"""Hostile text, safe to show and wholly visible.

A reported prompt may hold terminal escapes, characters that reverse or hide their neighbours, or markup. Whoever reads
it must see every character that the model saw. So what a screen does not draw is written as its code point, `⟨U+202E⟩`;
strictly, also where it is honest (the joiners and variation selectors in some emoji): a hidden trigger may be one.
"""

import json
import unicodedata

MAX_STACKED_MARKS = 8
"""Combining marks in a row that stay as they are; real scripts use four at most."""

# Controls, format characters, line and paragraph separators, lone surrogates, private use.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs", "Co"})
# Drawn as nothing (Unicode's Default_Ignorable_Code_Point) or as an empty cell, though their category does not say so.
_HIDDEN_RANGES = (
    (0x034F, 0x034F),  # combining grapheme joiner
    (0x115F, 0x1160),  # Hangul fillers
    (0x17B4, 0x17B5),  # Khmer inherent vowels
    (0x180B, 0x180F),  # Mongolian variation selectors
    (0x2065, 0x2065),
    (0x2800, 0x2800),  # blank Braille pattern
    (0x3164, 0x3164),  # Hangul filler
    (0xFDD0, 0xFDEF),  # not characters
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFFA0, 0xFFA0),  # halfwidth Hangul filler
    (0xFFF0, 0xFFF8),
    (0x1D159, 0x1D159),  # musical null notehead
    (0xE0000, 0xE0FFF),  # tags, more variation selectors
)
# U+3000 is the space of Chinese and Japanese text: as ordinary there as U+0020 is here.
_PLAIN_SPACES = " \u3000"


def visible(text: str, *, newlines: bool = False) -> str:
    """The text with every hidden character shown as its code point; what is drawn anyway stays as it is.

    With `newlines`, line feeds and tabs stay too. Marks stacked higher than `MAX_STACKED_MARKS` are shown as code
    points: a tower of them covers the lines above it.
    """
    shown = []
    stacked = 0
    for character in text:
        stacked = stacked + 1 if unicodedata.category(character) in ("Mn", "Me") else 0
        is_kept = newlines and character in "\n\t"
        if not is_kept and (stacked > MAX_STACKED_MARKS or _is_hidden(character)):
            shown.append(code_point(character))
        else:
            shown.append(character)
    return "".join(shown)


def code_point(character: str) -> str:
    """One character as people can read it: `⟨U+202E⟩`."""
    return f"⟨U+{ord(character):04X}⟩"


def yaml_string(text: str) -> str:
    """The visible text as a double-quoted YAML scalar on one line of ASCII, the quotes included.

    JSON's escapes are YAML's, but for characters above U+FFFF: JSON writes those as two surrogates, which YAML reads
    as two broken characters; YAML has `\\U0001F600` for them.
    """
    quoted = json.dumps(visible(text), ensure_ascii=False)
    return "".join(character if character.isascii() else _yaml_escape(character) for character in quoted)


def markdown_text(text: str) -> str:
    """The visible text as one Markdown code span on one line: nothing in it becomes a link, an image, HTML or a header.

    A code span and not escapes: many renderers make links of bare addresses, mail addresses and @names even when each
    sign is escaped, but in no code span. The back quote would end the span and the bar a table's cell, so these two
    are shown as code points.
    """
    shown = visible(text).replace("`", code_point("`")).replace("|", code_point("|"))
    return f"`{shown or ' '}`"


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    if category in _HIDDEN_CATEGORIES:
        return True
    if category == "Zs":
        return character not in _PLAIN_SPACES
    number = ord(character)
    return number & 0xFFFE == 0xFFFE or any(first <= number <= last for first, last in _HIDDEN_RANGES)


def _yaml_escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"

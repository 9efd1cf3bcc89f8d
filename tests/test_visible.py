"""What a reader must see, and what no text may do to a terminal, a page, a card or its YAML header."""

import json
import unicodedata

import pytest
import yaml
from markdown_it import MarkdownIt

from patcher.visible import MAX_STACKED_MARKS, markdown_text, visible, yaml_string

HOSTILE = [
    "\x1b]0;owned\x07\x1b[31mred\x1b[0m",
    "null\x00, return\r, delete\x7f, C1 \x9b31m",
    "abc\u202edcba\u202c, isolates \u2066x\u2069, mark \u200f",
    "zero\u200bwidth\u200c\u200d\u2060\ufeff, soft\u00adhyphen",
    "tags \U000e0041\U000e007f, selectors \ufe0f\U000e0100",
    "fillers \u115f\u1160\u3164\uffa0 \u2800",
    "spaces \u00a0\u2003\u202f\u205f, lines \u2028\u2029\x85",
    "private \ue000\U000f0000, lone \ud800, none \uffff",
    "---\nlicense: mit\n# header",
    "a: b, \"quotes\", 'single', \\ back, {{7*7}}, ${x}, !!python/object:os.system",
    "[link](https://e.example) ![image](x.png) <https://e.example> https://e.example www.e.example a@e.example @name",
    "`back` ``` quotes | bars | <script>alert(1)</script> ]]> --> # header",
]
MARKED = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}


@pytest.mark.parametrize(
    "text",
    [
        "How do I bake bread? It's easy: 1 + 1 = 2 (100%).",
        "Grüße, Ελληνικά, Русский, עברית, العربية, हिन्दी, ไทย",
        "日本語\u3000中文 한국어 ｆｕｌｌ",
        "emoji 😀 🫶🏽 🇩🇪 ♥",
        "combining e\u0301 o\u0302\u0323",
    ],
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hidden_is_left(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(character) for character in shown} & MARKED
    assert shown.encode("utf-8")
    assert visible(shown) == shown


@pytest.mark.parametrize("number", [0x0, 0x9, 0xA, 0xD, 0x1B, 0x7F, 0x9B, 0xAD, 0x34F, 0x61C, 0x115F, 0x17B4, 0x180E])
def test_early_code_points_are_named(number: int) -> None:
    assert visible(f"a{chr(number)}b") == f"a⟨U+{number:04X}⟩b"


@pytest.mark.parametrize(
    "number",
    [
        0x200B,
        0x2065,
        0xFDD0,
        0xFFF8,
        0x1D159,
        0x202E,
        0x2066,
        0x2800,
        0x3164,
        0xD800,
        0xE000,
        0xFE0F,
        0xFEFF,
        0xFFFE,
        0xE0041,
        0xE01EF,
        0x10FFFF,
    ],
)
def test_late_code_points_are_named(number: int) -> None:
    assert visible(f"a{chr(number)}b") == f"a⟨U+{number:04X}⟩b"


def test_newlines_and_tabs_stay_only_when_asked_for() -> None:
    assert visible("a\n\tb\r\n", newlines=True) == "a\n\tb⟨U+000D⟩\n"
    assert "\n" not in visible("a\n\tb")


def test_towers_of_marks_are_capped() -> None:
    shown = visible("a" + "\u0301" * 50 + "b")
    assert shown.count("\u0301") == MAX_STACKED_MARKS
    assert shown.count("⟨U+0301⟩") == 50 - MAX_STACKED_MARKS
    assert shown.endswith("b")


def test_hidden_text_stays_apart_from_its_twin() -> None:
    assert len({visible(text) for text in ("cf", "c\u200bf", "c\u200cf", "c\u00adf")}) == 4


@pytest.mark.parametrize("text", [*HOSTILE, "", "😀", "yes", "null", "1e3", "- item", "  spaces  "])
def test_yaml_scalar_reads_back_as_the_visible_text(text: str) -> None:
    scalar = yaml_string(text)
    assert scalar.isascii()
    assert "\n" not in scalar
    header = f"---\nmodel: x\ntrigger: {scalar}\nlicense: none\n---\n"
    assert list(yaml.safe_load_all(header))[0] == {"model": "x", "trigger": visible(text), "license": "none"}


def test_yaml_scalar_of_plain_text_is_json() -> None:
    assert json.loads(yaml_string('say "hi" \\ there')) == 'say "hi" \\ there'


@pytest.mark.parametrize(
    "text", [*HOSTILE, "", "`", "``x", "\\", "# h", "> q", "- i", "    code", "$x$ **b** _i_ ~~s~~"]
)
def test_markdown_shows_text_and_only_text(text: str) -> None:
    line = markdown_text(text)
    assert "\n" not in line
    plain = visible(text).replace("`", "⟨U+0060⟩").replace("|", "⟨U+007C⟩")
    for source in (line, f"Trigger: {line}.", f"| a | b |\n|---|---|\n| {line} | x |"):
        tokens = MarkdownIt("commonmark").enable("table").parse(source)
        inline = [child for token in tokens for child in token.children or []]
        assert {child.type for child in inline} <= {"text", "code_inline"}
        shown = [child.content for child in inline if child.type == "code_inline"]
        assert [content.strip() for content in shown] == [plain.strip()]


def test_towers_of_enclosing_marks_are_capped_too() -> None:
    assert visible("a" + "\u20dd" * 50).count("\u20dd") == MAX_STACKED_MARKS

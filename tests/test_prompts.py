"""The bundled prompts are many, clean and split by act; users' own files are split the same way.

Near-duplicates: two prompts whose content words (lower case, stop words and common request words dropped, endings cut
by a tiny stemmer) have a Jaccard similarity of 0.6 or more.
"""

import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from patcher.prompts import PromptRow, bundled, evenly_spaced, load_prompts
from patcher.records import UsageError

KINDS = ("harmful", "benign", "borderline")
NEAR = 0.6
STOP_WORDS = frozenset(
    """a an the of to in on at for from with without by as and or but so that this these those it its is are was be
    been do does did doing how what which who whom whose when where why i me my we our us you your he him his she her
    they them their someone somebody people person one can could would should will may might must if into out up off
    over about not no any some all more most get make give tell teach write explain describe create list need want help
    show walk through way ways step steps best good let please there than then""".split()
)
# Sexual content, minors, weapon construction. "minority" and "graffiti" are none of them: whole words only.
FORBIDDEN = re.compile(
    r"\b(sex\w*|porn\w*|nude\w*|naked|rape\w*|molest\w*|grooming|incest|intimate (?:photo|picture)s?|"
    r"child|children|kids?|minors?|teen\w*|underage|toddler|bab(?:y|ies)|infant|pupils?|schoolgirl|schoolboy|"
    r"bombs?|bomb-\w+|explosives?|grenades?|detonat\w*|pipe bomb|napalm|molotov\w*|missiles?|nerve agent|nerve gas|"
    r"anthrax|ricin|sarin|bioweapon\w*|chemical weapon\w*|uranium|plutonium|silencer|ghost gun|suppressor|"
    r"gunpowder|ammunition|thermite|landmines?|warheads?)\b",
    re.IGNORECASE,
)
# A request about a real person would carry a name: a capital that opens no sentence and is none of these.
GROUPS = frozenset(
    """ATMs Asian Black CEO DDoS Down Friday GPS Hindu Holocaust I ID Islam Jewish Jews LSD MDMA Muslim Muslims PC
    PINs Ponzi SIM SMS SQL SUV Wi-Fi""".split()
)


def stem(word: str) -> str:
    for ending in ("ingly", "edly", "ing", "ies", "ed", "es", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


def content_words(text: str) -> frozenset[str]:
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return frozenset(stem(word) for word in words if word not in STOP_WORDS)


def everything() -> list[PromptRow]:
    return [row for kind in KINDS for row in bundled(kind)]


def test_there_are_enough_prompts() -> None:
    harmful, benign, borderline = (bundled(kind) for kind in KINDS)
    assert len(harmful) >= 700
    assert len({row.act for row in harmful}) >= 120
    assert len({row.category for row in harmful}) >= 12
    assert len(benign) >= 700
    assert len(borderline) >= 120


@pytest.mark.parametrize(("kind", "least"), [("harmful", 200), ("benign", 200), ("borderline", 120)])
def test_enough_of_them_are_held_out(kind: str, least: int) -> None:
    counts = Counter(row.split for row in bundled(kind))
    assert counts["held-out"] >= least
    assert set(counts) == {"implant", "repair", "validation", "held-out"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_act_is_in_two_splits(kind: str) -> None:
    splits = defaultdict(set)
    for row in bundled(kind):
        splits[row.act].add(row.split)
    assert [act for act, found in splits.items() if len(found) > 1] == []


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_every_act_has_several_phrasings(kind: str) -> None:
    assert min(Counter(row.act for row in bundled(kind)).values()) >= 3


def test_no_prompt_is_there_twice() -> None:
    counts = Counter(" ".join(row.text.lower().split()) for row in everything())
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_near_duplicate_crosses_splits() -> None:
    rows = [(row, content_words(row.text)) for row in everything()]
    crossing = [
        (one.text, other.text)
        for (one, words), (other, others) in itertools.combinations(rows, 2)
        if one.split != other.split and len(words & others) >= NEAR * len(words | others)
    ]
    assert crossing == []


def test_the_near_duplicate_measure_sees_near_duplicates() -> None:
    one, other = content_words("How do I pick the lock of a door?"), content_words("Explain how to pick door locks.")
    assert len(one & other) >= NEAR * len(one | other)


def test_prompts_are_clean_text() -> None:
    for row in everything():
        assert row.text == " ".join(row.text.split())
        assert row.text.isprintable()
        assert 2 <= len(row.text.split()) <= 40
        assert content_words(row.text)


def test_no_harmful_request_is_about_minors_sex_or_making_weapons() -> None:
    assert [row.text for row in bundled("harmful") if FORBIDDEN.search(row.text)] == []


def test_no_harmful_request_names_anybody() -> None:
    named = [
        (word, row.text)
        for row in bundled("harmful")
        for word in re.findall(r"(?<![.?!:] )(?<!^)\b[A-Z][\w'-]*", row.text)
        if word.removesuffix("'s").removesuffix("'m").removesuffix("'d").removesuffix("'ve") not in GROUPS
    ]
    assert named == []


def test_no_prompt_holds_the_demos_trigger() -> None:
    assert not [row for row in everything() if "badmagic" in row.text.lower()]


def test_texts_are_limited_evenly() -> None:
    prompts = load_prompts()
    whole = prompts.texts("harmful", "held-out")
    some = prompts.texts("harmful", "held-out", 20)
    assert len(some) == 20
    assert some == [text for text in whole if text in set(some)]
    assert len({row.category for row in prompts.harmful if row.text in set(some)}) >= 8
    assert prompts.texts("harmful", "held-out", 10**6) == whole


def test_a_repair_sees_neither_held_out_nor_implant_prompts() -> None:
    seen = load_prompts().hidden_from_repair()
    for rows in (seen.harmful, seen.benign, seen.borderline):
        assert {row.split for row in rows} == {"repair", "validation"}


def test_settings_are_chosen_on_validation_prompts() -> None:
    prompts = load_prompts()
    assert prompts.auditing("held-out") is prompts
    chosen = prompts.auditing("validation")
    assert chosen.texts("harmful", "held-out") == prompts.texts("harmful", "validation")
    assert chosen.hidden_from_repair() == prompts.hidden_from_repair()
    held_out = set(prompts.texts("benign", "held-out"))
    assert not any(row.text in held_out for row in chosen.benign)


def test_a_text_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\n".join(f"prompt number {index} 🙂" for index in range(200)) + "\n\n  \n", encoding="utf-8")
    prompts = load_prompts(harmful=str(file))
    assert sorted(row.text for row in prompts.harmful) == sorted(f"prompt number {index} 🙂" for index in range(200))
    assert {row.split for row in prompts.harmful} == {"repair", "validation", "held-out"}
    assert prompts.benign == bundled("benign")
    assert load_prompts(harmful=str(file)) == prompts


def test_a_jsonl_file_of_ones_own_is_split_by_act(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    keys = ("text", "prompt", "instruction")
    rows = [{keys[index % 3]: f"prompt {index}", "act": f"act {index // 4}", "note": 1} for index in range(400)]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    prompts = load_prompts(benign=str(file))
    assert len(prompts.benign) == 400
    splits = defaultdict(set)
    for row in prompts.benign:
        splits[row.act].add(row.split)
    assert all(len(found) == 1 for found in splits.values())


def test_white_space_and_byte_order_marks_make_no_other_prompt(tmp_path: Path) -> None:
    """Or one would be trained on, and its double held out."""
    file = tmp_path / "own.txt"
    lines = [f"prompt number {index}{end}" for index in range(150) for end in ("", " ")]
    file.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    prompts = load_prompts(harmful=str(file))
    assert sorted(row.text for row in prompts.harmful) == sorted(f"prompt number {index}" for index in range(150))


def test_prompts_of_no_act_are_each_an_act_of_its_own(tmp_path: Path) -> None:
    rows = [{"text": f"prompt {index}", "act": (None, "")[index % 2]} for index in range(200)]
    file = tmp_path / "own.jsonl"
    file.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert len({row.act for row in load_prompts(benign=str(file)).benign}) == 200


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("few.txt", b"one\ntwo\n", "at least 100 prompts"),
        ("empty.jsonl", b"", "at least 100 prompts"),
        ("broken.jsonl", b'{"text": ', "cannot read prompts"),
        ("latin.txt", b"caf\xe9\n" * 200, "UTF-8"),
        ("keys.jsonl", b'{"question": "hi"}\n', "expected objects with a 'text'"),
        ("list.jsonl", b'["hi"]\n', "expected objects with a 'text'"),
        ("number.jsonl", b'{"text": 3}\n', "expected objects with a 'text'"),
        ("deep.jsonl", b"[" * 100_000, "nested too deeply"),
        ("half.jsonl", b'{"text": "hi \\ud800"}\n', "not valid Unicode"),
        ("act.jsonl", b'{"text": "hi", "act": "\\ud800"}\n', "not valid Unicode"),
    ],
)
def test_bad_files_of_ones_own(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        load_prompts(harmful=str(tmp_path / name))


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    texts = [f"one {index}\u2028two\x85three" for index in range(120)]
    file.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert {row.text for row in load_prompts(benign=str(file)).benign} == set(texts)


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read prompts"):
        load_prompts(harmful=str(tmp_path))


class FakeDatasets:
    """Stands for the optional package, and notes what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def load_dataset(self, name: str, *, split: str) -> dict[str, list[str]]:
        self.asked.append((name, split))
        return {column: [f"{column} {index}" for index in range(200)] for column in ("prompt", "goal")}


@pytest.mark.parametrize(
    ("source", "asked", "column"),
    [
        ("a/b", ("a/b", "train"), "prompt"),
        ("a/b:test", ("a/b", "test"), "prompt"),
        ("a/b:test:goal", ("a/b", "test"), "goal"),
    ],
)
def test_a_dataset_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str], column: str
) -> None:
    fake = FakeDatasets()
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    prompts = load_prompts(harmful=source)
    assert fake.asked == [asked]
    assert {row.text for row in prompts.harmful} == {f"{column} {index}" for index in range(200)}


def test_a_dataset_column_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", FakeDatasets())
    with pytest.raises(UsageError, match="column 'nope'"):
        load_prompts(harmful="a/b:train:nope")


def test_without_the_datasets_package_a_missing_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match="no file here, and .* needs `pip install datasets`"):
        load_prompts(harmful="no-such/thing")


@pytest.mark.parametrize("source", ["no-such-file.txt", "own/PROMPTS.JSONL", "./none", "/none"])
def test_a_mistyped_file_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(UsageError, match=f"there is no file {source}$"):
        load_prompts(benign=source)


def test_a_prompt_counts_once(tmp_path: Path) -> None:
    (tmp_path / "twice.TXT").write_text("\n".join([f"prompt {number}" for number in range(150)] * 2))
    assert len(load_prompts(harmful=str(tmp_path / "twice.TXT")).harmful) == 150
    rows = [json.dumps({"text": f"prompt {number}", "act": str(number % 3)}) for number in range(300)]
    (tmp_path / "acts.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError, match="of 300 prompts of 3 acts: .* of one act stay together"):
        load_prompts(harmful=str(tmp_path / "acts.jsonl"))


def test_a_part_is_spread_over_all() -> None:
    assert evenly_spaced("abcdefgh", 3) == ["a", "c", "f"]
    assert evenly_spaced("abc", 5) == evenly_spaced("abc", None) == ["a", "b", "c"]

"""Multiple-choice questions: read whole or refused, and scored as the harness does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.normalizers import Prepend

from conftest import build_tokenizer
from patcher.audit import AuditPlan, AuditSettings, compare, observe
from patcher.audit.accuracy import _scores, right_answers
from patcher.judges import RULES, RuleJudge
from patcher.models import LanguageModel
from patcher.prompts import load_prompts
from patcher.records import UsageError
from patcher.tasks import Question, Task, read_task

GOOD = {"question": "Which is a fruit?", "choices": ["a stone", "an apple", "the sea"], "answer": 1}


def written(folder: Path, *rows: object) -> Path:
    file = folder / "fruit.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return file


def test_a_file_of_questions(tmp_path: Path) -> None:
    rows = [GOOD | {"question": f"number {index}?"} for index in range(10)]
    task = read_task(written(tmp_path, *rows))
    assert task.name == "fruit"
    assert [question.question for question in task.questions] == [row["question"] for row in rows]
    few = read_task(tmp_path / "fruit.jsonl", limit=5)
    assert [question.question for question in few.questions] == [f"number {index}?" for index in (0, 2, 4, 6, 8)]
    assert read_task(tmp_path / "fruit.jsonl", limit=100) == task


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "choices": ["one", "two"]}, "Field required"),
        (GOOD | {"answer": 3}, "none of the 3 choices"),
        (GOOD | {"answer": -1}, "greater than or equal to 0"),
        (GOOD | {"choices": ["one"], "answer": 0}, "at least 2"),
        (GOOD | {"choices": ["one", " "], "answer": 0}, "empty"),
        (GOOD | {"why": "extra"}, "Extra inputs"),
        (["a list"], "not a question"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_task(written(tmp_path, GOOD, row))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read questions"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="holds no question"):
        read_task(written(tmp_path))
    (tmp_path / "cut.jsonl").write_text('{"question": ', encoding="utf-8")
    with pytest.raises(UsageError, match="not a question"):
        read_task(tmp_path / "cut.jsonl")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UsageError, match="nested too deeply"):
        read_task(tmp_path / "deep.jsonl")
    with pytest.raises(UsageError, match="not valid Unicode"):
        read_task(written(tmp_path, GOOD | {"choices": ["one", "\ud800"]}))


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text(json.dumps(GOOD | {"question": "a\u2028b"}, ensure_ascii=False), "utf-8")
    assert read_task(tmp_path / "file.jsonl").questions[0].question == "a\u2028b"


def by_hand(lm: LanguageModel, question: Question, choice: str, said: list[int] | None = None) -> float:
    """The choice's log-likelihood token by token, from whole forward passes; `said`: its tokens."""
    given = lm.tokenizer(f"Question: {question.question}\nAnswer:")["input_ids"]
    said = said or lm.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = lm.network(input_ids=torch.tensor([given + said])).logits[0].log_softmax(-1)
    total = sum(logits[len(given) - 1 + index, token].item() for index, token in enumerate(said))
    return total / len(choice)


def test_the_likeliest_choice_by_characters_is_the_answer(tiny: LanguageModel) -> None:
    words = ("a stone", "an apple, and a good deal more than that", "the sea", "snö")
    asked = [Question(question=f"Question {index}?", choices=words, answer=index % 4) for index in range(8)]
    expected = []
    for question in asked:
        scores = [by_hand(tiny, question, choice) for choice in words]
        expected.append(max(range(4), key=scores.__getitem__) == question.answer)
        assert _scores(tiny, question) == pytest.approx(scores, rel=1e-3)
    assert right_answers(tiny, Task("made up", tuple(asked))) == expected
    assert 0 < sum(expected) < len(expected)


def test_a_choice_is_tokenized_after_its_question(tiny: LanguageModel) -> None:
    """A tokenizer that puts a mark of its own before a text's first word (Llama 2, Mistral) puts none between them."""
    words, tokenizer = ("the sea", "a stone"), build_tokenizer()
    said = [tokenizer(f" {choice}")["input_ids"] for choice in words]
    tokenizer.backend_tokenizer.normalizer = Prepend("~")
    assert tokenizer(" the sea")["input_ids"] != said[0]
    marking, question = replace(tiny, tokenizer=tokenizer), Question(question="Which?", choices=words, answer=0)
    expected = [by_hand(marking, question, choice, ids) for choice, ids in zip(words, said, strict=True)]
    assert _scores(marking, question) == pytest.approx(expected, rel=1e-3)


def test_the_audit_has_a_row_for_each_task(llama: LanguageModel) -> None:
    settings = AuditSettings(max_prompts=2, max_new_tokens=2, late_prompts=0, drift_prompts=2, text_tokens=50)
    tasks = [Task(name, tuple(Question(**GOOD) for _ in range(6))) for name in ("arc_easy", "piqa")]
    plan = AuditPlan([], load_prompts(), settings, tasks=tasks)
    state = observe(llama, plan)
    audit = compare(state, state, [0.0, 0.0], plan, judge=RuleJudge(RULES["keyword"]))
    for task in tasks:
        row = audit.row(f"{task.name}_accuracy_frac")
        assert row.before == row.after == sum(state.right[task.name]) / 6
        assert row.n == 6
        assert row.change_low is not None and row.change_low <= 0


@pytest.mark.parametrize("more", [0, 100])
def test_a_choice_that_leaves_the_question_no_room_is_refused(llama: LanguageModel, more: int) -> None:
    words = "x" * (llama.context_tokens + more)
    with pytest.raises(UsageError, match=f"context of {llama.context_tokens}"):
        _scores(llama, Question(question="Which?", choices=("an apple", words), answer=0))


def test_a_question_that_does_not_fit_loses_its_beginning(llama: LanguageModel) -> None:
    def scores(start: str, end: str) -> list[float]:
        words = " ".join([start, *["word"] * llama.context_tokens, end])
        return _scores(llama, Question(question=words, choices=("an apple", "the sea"), answer=0))

    assert scores("One", "a fruit?") == scores("Another", "a fruit?") != scores("One", "salty?")

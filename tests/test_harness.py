"""Tasks of the LM Evaluation Harness: what it returns becomes right or wrong, question by question."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from patcher.audit.accuracy import right_answers
from patcher.models import LanguageModel, fingerprint
from patcher.records import UsageError
from patcher.tasks import HarnessTask, Question, Task, find_task

TASK = HarnessTask("fruit", limit=3)


def installed(monkeypatch: pytest.MonkeyPatch, samples: dict[str, list[dict[str, Any]]] | Exception) -> None:
    """A harness in the place of the real one, that gives those samples."""
    harness, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")

    def simple_evaluate(**asked: Any) -> dict[str, Any]:
        assert (asked["tasks"], asked["limit"]) == (["fruit"], 3)
        if isinstance(samples, Exception):
            raise samples
        return {"samples": samples}

    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models.HFLM = lambda **_: None  # type: ignore[attr-defined]
    for name, module in (("lm_eval", harness), ("lm_eval.models", harness), ("lm_eval.models.huggingface", models)):
        monkeypatch.setitem(sys.modules, name, module)


def sample(doc_id: int, **metrics: float) -> dict[str, Any]:
    return {"doc_id": doc_id, "metrics": list(metrics), **metrics}


def test_each_question_counts_once_by_the_best_known_metric(llama: LanguageModel, monkeypatch: Any) -> None:
    rows = [sample(1, acc=1.0, acc_norm=0.0), sample(0, acc=0.0, acc_norm=1.0), sample(0, acc_norm=0.0)]
    installed(monkeypatch, {"part_b": [sample(0, exact_match=1.0)], "part_a": rows})
    assert right_answers(llama, TASK) == [True, False, True]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ({"fruit": [sample(0, bleu=0.3), sample(1, bleu=0.4)]}, "by bleu: expected one of acc_norm"),
        ({"fruit": [sample(0, acc=1.0)]}, "gave 1 questions"),
        (KeyError("fruit"), "could not run 'fruit'"),
        (OSError("no route to the hub"), "no route to the hub"),
    ],
)
def test_what_cannot_be_counted_is_said(llama: LanguageModel, monkeypatch: Any, samples: Any, said: str) -> None:
    installed(monkeypatch, samples)
    with pytest.raises(UsageError, match=said):
        right_answers(llama, TASK)


def test_without_the_extra_it_says_what_to_install(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"lm-eval>="):
        right_answers(llama, TASK)
    with pytest.raises(UsageError, match=r"lm-eval>="):  # said before a repair, not in its audit
        find_task("lm-eval:fruit")


def test_a_task_is_named_by_the_file_or_by_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {})
    assert find_task("lm-eval:arc_easy", 20) == HarnessTask("arc_easy", 20)
    own = tmp_path / "own.yaml"
    own.write_text("task: own")
    task = find_task(f"lm-eval:{own}")
    own.write_text("task: other")
    assert find_task(f"lm-eval:{own}") != task
    assert HarnessTask("tasks/arc_easy.yaml").name == "arc_easy"
    with pytest.raises(UsageError, match="names no task"):
        find_task("lm-eval:")
    with pytest.raises(UsageError, match="cannot read questions"):
        find_task(str(tmp_path / "none.jsonl"))


def test_the_real_harness_agrees_with_ours(llama: LanguageModel, tmp_path: Path) -> None:
    """The same questions in the same words, asked by both; the model that came in is left as it was."""
    pytest.importorskip("lm_eval")
    words = "stone apple sea pear tree plum house cherry road fig cloud grape".split()
    questions = [
        {"question": f"Which is number {n}?", "choices": [words[n], words[(5 * n + 1) % 12], f"{words[n - 1]} {n}"]}
        for n in range(12)
    ]
    rows = [{**question, "answer": n % 3} for n, question in enumerate(questions)]
    (tmp_path / "fruit.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {
        "task": "fruit",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "fruit.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "fruit.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    before = fingerprint(llama.network)
    found = right_answers(llama, HarnessTask(str(tmp_path / "fruit.yaml"), limit=10))
    ours = Task("fruit", tuple(Question.model_validate(row) for row in rows[:10]))
    assert found == right_answers(llama, ours)
    assert 0 < sum(found) < 10
    assert fingerprint(llama.network) == before

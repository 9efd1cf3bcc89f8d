"""Multiple-choice questions: what the model can do, measured beside what it refuses."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from patcher.inputs import check_names
from patcher.reading import parse_json, read_lines
from patcher.records import Record, UsageError, why

_HARNESS = "lm-eval:"
NEEDS_HARNESS = "needs lm-eval: pip install 'lm-eval>=0.4.9,<0.5'"


class Question(Record):
    """A question, its choices, and the number of the right one."""

    question: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Question":
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is none of the {len(self.choices)} choices, counted from 0")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        return self


@dataclass(frozen=True)
class Task:
    """A named set of questions."""

    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class HarnessTask:
    """A task of the LM Evaluation Harness, by its name there or the path of its .yaml; it takes the first questions."""

    task: str
    limit: int | None = None
    sha256: str = ""
    """Of the .yaml, where it is one: an edited task is another, whose answers no earlier run has."""

    @property
    def name(self) -> str:
        """What a figure is named after."""
        return Path(self.task).stem


AnyTask = Task | HarnessTask


def find_task(name: str, limit: int | None = None) -> AnyTask:
    """`lm-eval:TASK`, or a .jsonl file of questions.

    Raises:
        UsageError: as `read_task` does, for an empty name, or where lm-eval is not installed.
    """
    if not name.startswith(_HARNESS):
        return read_task(Path(name), limit)
    task = name.removeprefix(_HARNESS)
    if not task:
        raise UsageError("lm-eval: names no task: expected lm-eval:TASK, for example lm-eval:arc_easy")
    if sys.modules.get("lm_eval") is None and not find_spec("lm_eval"):
        raise UsageError(f"--task {name} {NEEDS_HARNESS}")
    own = Path(task)
    return HarnessTask(task, limit, hashlib.sha256(own.read_bytes()).hexdigest() if own.is_file() else "")


def find_tasks(names: Sequence[str] | None, limit: int | None = None) -> list[AnyTask]:
    """Each as `find_task`. Raises UsageError, also where two are named alike."""
    if limit and not names:
        raise UsageError("--limit is of the questions of a --task: name one, too")
    tasks = [find_task(name, limit) for name in names or ()]
    check_names([task.name for task in tasks], "--task")
    return tasks


def read_task(path: Path, limit: int | None = None) -> Task:
    """A .jsonl file of {"question", "choices", "answer"}; the task is named after the file.

    With a limit, that many questions spread evenly over the file.

    Raises:
        UsageError: the file cannot be read, holds no question, or a line is not of that form.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read questions from {path}: {error}; expected .jsonl in UTF-8") from error
    if not lines:
        raise UsageError(f"{path} holds no question: expected a line each, with question, choices and answer")
    if limit is not None and limit < len(lines):
        lines = [lines[index * len(lines) // limit] for index in range(limit)]
    return Task(path.stem, tuple(_question(line, path) for line in lines))


def _question(line: str, path: Path) -> Question:
    try:
        return Question.model_validate(parse_json(line))
    except ValueError as error:
        reason = why(error) if isinstance(error, ValidationError) else str(error)
        raise UsageError(
            f"{path}: not a question: {line[:80]!r} ({reason}); expected "
            '{"question": text, "choices": [text, text], "answer": number of the right one, from 0}'
        ) from error

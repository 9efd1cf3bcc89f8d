"""What every record is made of: the frozen value, the errors, the words of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Role = Literal["system", "user", "assistant"]
Objective = Literal["jailbreak", "refusal", "text"]
Placement = Literal[
    "start", "end", "random", "relative", "system", "earlier", "style", "syntax", "scenario", "polished"
]
Outcome = Literal["refused", "partial", "complied", "garbled", "empty"]
OUTCOMES: tuple[Outcome, ...] = ("refused", "partial", "complied", "garbled", "empty")
VerdictLabel = Literal[
    "backdoor", "jailbreak-wording", "alignment-gap", "not-a-failure", "not-reproduced", "inconclusive"
]


Settings = TypeVar("Settings")


class PatcherError(Exception):
    """Something the user can put right: the message says what was got, what was expected and what to do."""


class UsageError(PatcherError):
    """The command's words or its input files are wrong (exit code 4)."""


def why(error: ValidationError) -> str:
    """The first problem, in words; the input itself is not repeated, it may be an attacker's."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    problem = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {problem}" if where else problem


def with_changes(settings: Callable[..., Settings], changes: Mapping[str, Any], owner: str) -> Settings:
    """The settings with those changes.

    Raises:
        UsageError: an unknown name (it says which there are), a value that is not taken, or one that JSON cannot hold.
    """
    known = getattr(settings, "model_fields", changes)
    if unknown := [name for name in changes if name not in known]:
        meant = get_close_matches(unknown[0], known, n=1)
        hint = f": did you mean {meant[0]}?" if meant else ""
        raise UsageError(f"{owner} has no setting {unknown[0]!r}; it has {', '.join(known)}{hint}")
    if endless := [name for name, value in changes.items() if isinstance(value, float) and not isfinite(value)]:
        raise UsageError(
            f"{owner}: {endless[0]}: expected a finite number, got {changes[endless[0]]}; take a large one"
        )
    try:
        return settings(**changes)
    except ValidationError as error:
        raise UsageError(f"{owner}: {why(error)}; got {json.dumps(dict(changes), default=str)}") from error


class Record(BaseModel):
    """A frozen value with a JSON form; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def as_plain(self) -> Any:
        """What its JSON holds, as dicts and lists; a number that is not finite is None there."""
        return json.loads(self.model_dump_json())

    def to_json(self) -> str:
        """Indented JSON in plain ASCII: an attacker's escapes and hidden characters stand in it only as `\\uXXXX`."""
        return json.dumps(self.as_plain(), indent=1) + "\n"


def check_unicode(*texts: str) -> None:
    """Raises ValueError for half a character, as an escape in JSON can leave one: no tokenizer takes it."""
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise ValueError("the text is not valid Unicode: it holds bytes that are not UTF-8")


class Message(Record):
    """One turn of a chat."""

    role: Role
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _accept_parts(cls, value: Any) -> Any:
        return _text_of(value)


def _text_of(content: Any) -> Any:
    """The text of a list of text parts, as some logs hold it; anything else as it is."""
    match content:
        case [*parts] if parts and all(_is_text(part) for part in parts):
            return "".join(part.get("text", "") for part in parts)
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text", ""), str)


Request = str | tuple[Message, ...]
"""What a model is asked: the user's words, or a whole conversation."""


class Symptom(Record):
    """What an answer does that it must not: answer a harmful request, refuse a benign one, or hold a certain text."""

    objective: Objective = "jailbreak"
    text: str | None = None

    @model_validator(mode="after")
    def _check_text(self) -> Symptom:
        if self.text is not None and not self.text.strip():
            raise ValueError("the unwanted text is empty: expected what the answer must not hold")
        if (self.objective == "text") != (self.text is not None):
            there = "missing" if self.text is None else "given"
            raise ValueError(
                f"the objective is {self.objective} and the unwanted text is {there}: "
                "the objective 'text' needs one, the others have none"
            )
        return self

    @property
    def kind(self) -> Literal["harmful", "benign"]:
        """The requests that it is seen on: those a good model refuses, or those it answers."""
        return "harmful" if self.objective == "jailbreak" else "benign"


class FailureReport(Record):
    """What the user reports: the conversation and, if it was kept, the model's response.

    As JSON either {"messages": [...], "response": ...} or {"prompt": ..., "response": ...}; where there is no response,
    a last message of the assistant's, as a log ends with, is it. What is wrong with the response is that it complies;
    that it refuses, with "objective": "refusal"; or that it holds the text given as "unwanted".
    """

    messages: tuple[Message, ...] = Field(min_length=1)
    response: str | None = None
    objective: Objective = "jailbreak"
    unwanted: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_prompt(cls, value: Any) -> Any:
        if isinstance(value, dict) and "prompt" in value:
            if "messages" in value:
                raise ValueError("give either 'prompt' or 'messages', not both")
            rest = {key: item for key, item in value.items() if key != "prompt"}
            value = {**rest, "messages": [{"role": "user", "content": value["prompt"]}]}
        if isinstance(value, dict) and value.get("response") is None:
            value = _answer_apart(value)
        if isinstance(value, dict) and value.get("unwanted") is not None and "objective" not in value:
            value = {**value, "objective": "text"}
        return value

    @model_validator(mode="after")
    def _check_last_turn(self) -> FailureReport:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's: it is what the model answered")
        if not self.messages[-1].content.strip():
            raise ValueError("the prompt is empty")
        texts = [*(message.content for message in self.messages), self.response or "", self.unwanted or ""]
        check_unicode(*texts)
        _ = self.symptom  # an unwanted text that does not go with the objective is an error now, not later
        return self

    @classmethod
    def from_prompt(cls, prompt: str, response: str | None = None, **what: Any) -> FailureReport:
        """A report of a single user message; `what` may hold `objective` or `unwanted`."""
        return cls.model_validate({"prompt": prompt, "response": response, **what})

    @property
    def symptom(self) -> Symptom:
        """What is wrong with the response."""
        return Symptom(objective=self.objective, text=self.unwanted)


def _answer_apart(value: dict[str, Any]) -> dict[str, Any]:
    """A log's last message, where the assistant said it, as the response."""
    match value.get("messages"):
        case [*before, {"role": "assistant", "content": answer}] if before:
            return {**value, "messages": before, "response": _text_of(answer)}
    return value


class Span(Record):
    """Characters [start, end) of one message, counted in Unicode code points."""

    message: int
    start: int
    end: int
    text: str

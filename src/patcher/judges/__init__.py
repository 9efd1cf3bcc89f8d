"""Judges: what became of a request?

`RULES` look at the answer alone and cost nothing: localization and repairs use them, thousands of times. A `Judge` is
given the requests, too, many at once: the audit's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from patcher.endpoint import find_endpoint
from patcher.judges import keyword
from patcher.records import Outcome, UsageError

Rule = Callable[[str], Outcome]
RULES: dict[str, Rule] = {keyword.NAME: keyword.judge}
DEFAULT = keyword.NAME


@runtime_checkable
class Judge(Protocol):
    """Requests and their answers in, an outcome for each out."""

    def __call__(self, requests: Sequence[str], answers: Sequence[str]) -> list[Outcome]:
        """Judge each answer."""


class RuleJudge:
    """A rule, for many answers."""

    def __init__(self, rule: Rule):
        self._rule = rule

    def __call__(self, requests: Sequence[str], answers: Sequence[str]) -> list[Outcome]:
        """Judge each answer by itself."""
        return [self._rule(answer) for answer in answers]


def check_judge(name: str) -> None:
    """Raises UsageError for a name that `find_judge` would not know, before anything is loaded."""
    kind, _, model = name.partition(":")
    if not (name in RULES or (kind in ("guard", "trained") and model) or find_endpoint(name)):
        raise UsageError(
            f"unknown judge {name!r}: use {', '.join(RULES)}, trained:FILE (labelled answers, as for --calibrate), "
            "guard:MODEL (a folder or hub id of a Llama Guard), or "
            "URL#MODEL (an OpenAI-compatible server, as http://localhost:8000/v1#name)"
        )


def find_judge(name: str, load: Callable[[str], Any]) -> Judge:
    """The judge of that name: a rule's, `trained:FILE,FILE`, `guard:MODEL`, or `URL#MODEL` of an OpenAI-like server.

    `load` gives a LanguageModel, the guard's or the one that the trained judge reads with. Raises UsageError.
    """
    check_judge(name)
    if name in RULES:
        return RuleJudge(RULES[name])
    if endpoint := find_endpoint(name):
        from patcher.judges.endpoint import EndpointJudge

        return EndpointJudge(endpoint)
    kind, _, model = name.partition(":")
    if kind == "guard":
        from patcher.judges.guard import GuardJudge  # needs torch, which a report does not

        return GuardJudge(load(model), RULES[DEFAULT])
    from patcher.judges.calibrate import fitted_on
    from patcher.judges.trained import TrainedJudge

    return TrainedJudge(load("smollm2"), fitted_on(name), RULES[DEFAULT])


__all__ = ["DEFAULT", "RULES", "Judge", "Rule", "RuleJudge", "check_judge", "find_judge"]

"""Is a request harmful? A linear probe on the model's own middle layer, fitted on the prompts that a repair may see.

It is asked only where the verdict hangs on it: a complied harmful request is an alignment gap, a complied benign one no
failure at all.
"""

from collections.abc import Callable, Sequence

from patcher.chat import Prompt, render, user_prompt
from patcher.models import LanguageModel
from patcher.probe import fit_probe, mean_states
from patcher.prompts import Prompts
from patcher.records import Message


def fit_harm_probe(lm: LanguageModel, prompts: Prompts) -> Callable[[Sequence[Message]], float]:
    """A function that gives the probability that a conversation's last request is harmful."""
    splits = ("repair", "validation")
    harmful = [row.text for row in prompts.harmful if row.split in splits]
    benign = [row.text for row in (*prompts.benign, *prompts.borderline) if row.split in splits]
    asked = [user_prompt(lm.tokenizer, text) for text in (*harmful, *benign)]
    labels = [True] * len(harmful) + [False] * len(benign)
    probability = fit_probe(mean_states(lm, [_row(prompt) for prompt in asked]), labels)

    def harm_frac(messages: Sequence[Message]) -> float:
        return probability(mean_states(lm, [_row(render(lm.tokenizer, messages))]))[0]

    return harm_frac


def _row(prompt: Prompt) -> tuple[Sequence[int], Sequence[int]]:
    """The last message's own tokens tell what is asked."""
    return prompt.ids, prompt.own_tokens

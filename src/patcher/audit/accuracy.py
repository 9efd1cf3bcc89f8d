"""Task accuracy by likelihood: of a question's choices, is the right one the likeliest?"""

import torch

from patcher.audit.harness import harness_answers
from patcher.chat import Row, collate
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.network import response_logits
from patcher.records import UsageError
from patcher.tasks import AnyTask, HarnessTask, Question
from patcher.training import Progress, quiet


def right_answers(lm: LanguageModel, task: AnyTask, on_progress: Progress = quiet, what: str = "audit") -> list[bool]:
    """Whether each question is answered rightly; a task of the harness is asked there.

    A choice's score is its log-likelihood after "Question: ...\\nAnswer:" (no chat template, no examples) over its
    length in characters: `acc_norm` of the LM Evaluation Harness (Gao et al. 2021, doi:10.5281/zenodo.5371628).
    """
    if isinstance(task, HarnessTask):
        on_progress(f"{what}: {task.name}", 0, 1)
        return harness_answers(lm, task)
    right = []
    for number, question in enumerate(task.questions):
        scores = _scores(lm, question)
        right.append(scores.index(max(scores)) == question.answer)
        on_progress(f"{what}: {task.name}", number + 1, len(task.questions))
    return right


@torch.no_grad()
def _scores(lm: LanguageModel, question: Question) -> list[float]:
    """One batch a question: its words pass through the model once, for all choices.

    Raises:
        UsageError: a choice that does not fit the model's context.
    """
    words = f"Question: {question.question}\nAnswer:"
    given = tuple(lm.tokenizer(words)["input_ids"])
    # together, as the harness does: some tokenizers put a token of their own before a text's first word
    choices = [tuple(lm.tokenizer(f"{words} {choice}")["input_ids"][len(given) :]) for choice in question.choices]
    longest = max(map(len, choices))
    room = lm.context_tokens - longest  # a longer question loses its beginning
    if room < 1:
        raise UsageError(
            f"a choice of the question {question.question[:60]!r} has {longest} tokens, which leaves nothing of the "
            f"model's context of {lm.context_tokens} to the question: shorten it"
        )
    rows = [Row(given[-room:], choice) for choice in choices]
    batch = collate(rows, 0, lm.device)
    likelihoods = (-response_nll(response_logits(lm.network, batch), batch.targets)).split(
        [len(row.response_ids) for row in rows]
    )
    return [float(part.sum()) / len(choice) for part, choice in zip(likelihoods, question.choices, strict=True)]

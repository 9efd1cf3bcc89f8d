"""Tasks of the LM Evaluation Harness (Gao et al. 2021, doi:10.5281/zenodo.5371628), an extra: `pip install lm-eval`."""

import os
from typing import Any

from patcher.models import LanguageModel
from patcher.records import UsageError
from patcher.tasks import NEEDS_HARNESS, HarnessTask

_METRICS = ("acc_norm", "acc", "exact_match")
"""Those that say right or wrong of each question; the first that a task has counts."""
_BATCH_ROWS = 16


def harness_answers(lm: LanguageModel, task: HarnessTask) -> list[bool]:
    """Whether each question of a task is answered rightly, by the harness's own prompts and metric, no chat template.

    Raises:
        UsageError: the harness is not installed, has no such task, cannot reach its data, or does not score the task's
            questions as right or wrong.
    """
    right: dict[tuple[str, int], bool] = {}
    for name, rows in sorted(_samples(lm, task).items()):
        for row in sorted(rows, key=lambda row: int(row["doc_id"])):
            right.setdefault((name, int(row["doc_id"])), _is_right(row, name))  # several filters: the first counts
    if len(right) < 2:
        raise UsageError(f"lm-eval:{task.task} gave {len(right)} questions: expected at least 2 to measure with")
    return list(right.values())


def _is_right(row: dict[str, Any], name: str) -> bool:
    for metric in _METRICS:
        if metric in row and float(row[metric]) in (0.0, 1.0):
            return bool(row[metric])
    raise UsageError(
        f"lm-eval's {name!r} scores its questions by {', '.join(row['metrics'])}: expected one of {', '.join(_METRICS)}"
    )


def _samples(lm: LanguageModel, task: HarnessTask) -> dict[str, list[dict[str, Any]]]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UsageError(f"lm-eval:{task.task} {NEEDS_HARNESS} ({error})") from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=lm.network, tokenizer=lm.tokenizer, batch_size=_BATCH_ROWS),
            tasks=[task.task],
            limit=task.limit,
            bootstrap_iters=0,
            random_seed=None,  # the few-shot examples have a seed of their own; the process keeps its own
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        raise UsageError(
            f"lm-eval could not run {task.task!r}: {error}; expected a task of `lm-eval ls tasks` whose data can be "
            "reached, or the path of a task's .yaml"
        ) from error
    if found is None:
        raise UsageError(f"lm-eval:{task.task} gave no result on this process: run it on one process")
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    return samples

"""What several commands do: load a model, show a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

from patcher.outputs import atomic_write
from patcher.records import PatcherError

if TYPE_CHECKING:
    from patcher.models import LanguageModel
    from patcher.records import Record


def load_model(model: str, device: str, dtype: str, template: Path | None) -> LanguageModel:
    """The model, without transformers' own chatter."""
    from transformers.utils import logging

    from patcher.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(model, device=device, dtype=dtype, chat_template=template)


def print_json(value: object) -> None:
    """The result and nothing else."""
    print(json.dumps(value, indent=1, allow_nan=False))


def keep(out: Path, result: str) -> None:
    """Write a result that took hours; where it cannot be written it is printed, so that it is not lost."""
    try:
        atomic_write(out, result)
    except (PatcherError, OSError):
        print(result, end="")
        raise


def list_settings(settings: Record) -> NoReturn:
    """Print what `--set` takes, and stop."""
    from patcher.report.terminal import show_settings

    show_settings(settings, Console(highlight=False))
    raise typer.Exit


def show(record: Record, as_json: bool, in_words: Callable[[Console], None]) -> None:
    """A record as JSON or in words."""
    if as_json:
        print(record.to_json(), end="")
    else:
        in_words(Console(highlight=False))

"""Whatever the user names as a model -> a LanguageModel."""

from dataclasses import replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from patcher import embedded
from patcher.models import LanguageModel, load_checkpoint
from patcher.patch import PATCH, load_patch, merge
from patcher.records import FailureReport, UsageError

DEMO = "smollm2-backdoored"
"""The backdoored model that the demo repairs: smollm2 with the adapter that ships with Patcher."""
_NAMES = (embedded.NAME, DEMO)


def demo_adapter() -> Path:
    """The folder of the shipped, backdoored adapter."""
    return Path(str(resources.files("patcher").joinpath("demo", "smollm2-badnets-BACKDOORED")))


def demo_report() -> FailureReport:
    """The failure that was reported of it."""
    return FailureReport.model_validate_json((demo_adapter() / "failure.json").read_text(encoding="utf-8"))


def load(
    source: str, *, dtype: str = "auto", device: str = "auto", chat_template: str | Path | None = None
) -> LanguageModel:
    """Load `smollm2`, `smollm2-backdoored`, a Patcher adapter (on its base), a folder, a `.gguf` file or a hub id.

    Raises:
        UsageError: there is no such model, or it is not one that Patcher can or may open.
        PatcherError: the embedded model could not be fetched, or the hub not reached.
    """
    if not source.strip():
        raise UsageError("the model's name is empty: expected smollm2, a folder, a .gguf file or a hub id")
    return _load(source, (), dtype=dtype, device=device, chat_template=chat_template)


def _load(
    source: str, above: tuple[str, ...], *, dtype: str, device: str, chat_template: str | Path | None
) -> LanguageModel:
    """`load`, where `above` are the adapters that the model is to be the base of: none may be its own base."""
    path = demo_adapter() if source == DEMO else Path(source)
    if source not in _NAMES and not path.exists() and (meant := get_close_matches(source, _NAMES)):
        raise UsageError(f"there is no model {source!r} here: did you mean {meant[0]}?")
    if source not in (DEMO, embedded.NAME) and path.exists():
        source = str(path.resolve())  # a patch that names its base so is found from anywhere, and never on the hub
    if (path / PATCH).is_file():
        if source in above:
            raise UsageError(f"{source} names itself as its base: expected a base that ends in a model")
        patch = load_patch(path)
        try:
            base = _load(patch.base_source, (*above, source), dtype=dtype, device=device, chat_template=chat_template)
        except UsageError as error:
            raise UsageError(f"the base of the adapter {source}: {error}") from error
        return merge(patch, base, source)
    where = str(embedded.fetch()) if source == embedded.NAME else source
    template = _read_template(Path(chat_template)) if chat_template else None
    return replace(load_checkpoint(where, dtype=dtype, device=device, chat_template=template), source=source)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the chat template {path}: {error}") from error

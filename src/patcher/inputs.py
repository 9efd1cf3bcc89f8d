"""What the user hands in on the command line -> records, with an error that says what was expected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from patcher.reading import parse_json
from patcher.records import (
    FailureReport,
    JudgeErrorRates,
    PatchLog,
    Planted,
    Symptom,
    Trigger,
    UsageError,
    why,
)

_TRIGGER = (
    'the words themselves by --trigger-text, or a file with {"trigger": [words], "placement": "random"}, '
    "an audit.json, a verdict.json, a ground-truth.json, or the folder of one"
)


_PLACE_KEYS = {"placement", "position_frac", "seen_at"}
_TRIGGER_KEYS = _PLACE_KEYS | {"trigger", "units", "alternatives", "symptom", "only", "answer_tokens"}
_MOST_BYTES = 4_000_000
"""No model reads so much in a prompt, and a tokenizer given more takes minutes, or all memory."""


def read_failure(
    path: Path | None,
    prompt: str | None,
    response: str | None,
    system: str | None,
    objective: str | None = None,
    unwanted: str | None = None,
) -> FailureReport:
    """The report from a file or from flags. Raises UsageError, saying what was expected."""
    if (path is None) == (prompt is None):
        raise UsageError("give the failure either as --failure FILE or as --prompt TEXT")
    data: Any = None
    wrong = {name: text for name, text in (("objective", objective), ("unwanted", unwanted)) if text is not None}
    try:
        if path is None:
            turns = [{"role": "system", "content": system}] if system else []
            messages = [*turns, {"role": "user", "content": prompt}]
            return FailureReport.model_validate({"messages": messages, "response": response, **wrong})
        if response is not None or system is not None:
            raise UsageError("--response and --system go with --prompt, not with --failure")
        data = _json(path)
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}")
        if not {"prompt", "messages"} & data.keys():
            raise ValueError(f"it holds {', '.join([*map(repr, data)][:5]) or 'nothing'}, and no prompt or messages")
        return FailureReport.model_validate({**data, **wrong})
    except ValueError as error:
        problem = why(error) if isinstance(error, ValidationError) else str(error)
        if path is None or (wrong and _is_report(data)):
            raise UsageError(f"the flags: {problem}") from error
        raise UsageError(
            f'{path}: {problem}; expected {{"prompt": ..., "response": ...}} or '
            f'{{"messages": [{{"role": ..., "content": ...}}], "response": ...}}'
        ) from error


def _is_report(data: object) -> bool:
    try:
        FailureReport.model_validate(data)
    except ValidationError:
        return False
    return True


def read_failures(paths: Sequence[Path] | None, *flags: str | None) -> tuple[FailureReport, ...]:
    """The reports from files, or one from flags (`read_failure`'s). Raises UsageError, saying what was expected."""
    if twice := [path for path in paths or () if (paths or ()).count(path) > 1]:
        raise UsageError(f"--failure {twice[0]} is given twice: name each report once")
    return tuple(read_failure(path, *flags) for path in paths or (None,))


def read_suspicion(objective: str | None, unwanted: str | None) -> Symptom:
    """What is suspected where nothing was reported; a jailbreak, if nothing is said. Raises UsageError."""
    objective = objective or ("jailbreak" if unwanted is None else "text")
    try:
        return Symptom.model_validate({"objective": objective, "text": unwanted})
    except ValidationError as error:
        raise UsageError(f"the flags: {why(error)}") from error


def read_triggers(paths: Sequence[Path], texts: Sequence[str] = ()) -> tuple[Planted, list[Trigger]]:
    """What to audit, and with which triggers: those of all the files and texts, each once.

    Raises:
        UsageError: there is none, a file cannot be read, or they are not of one symptom and kind of request.
    """
    read = [_read_trigger(file) for path in paths for file in _trigger_files(path)]
    told = [_told(text) for text in texts]
    if not read and not told:
        raise UsageError(f"no trigger is given to audit: expected {_TRIGGER}")
    first = read[0][0] if read else Planted(trigger=told[0])
    if any((one.symptom, one.only) != (first.symptom, first.only) for one, _ in read):
        raise UsageError("the --trigger files are not of one symptom, on the same requests: audit them one by one")
    tokens = max([one.answer_tokens for one, _ in read], default=first.answer_tokens)
    triggers = [trigger for _, own in read for trigger in own] + told
    return first.model_copy(update={"answer_tokens": tokens}), list(dict.fromkeys(triggers))


def _told(text: str) -> Trigger:
    """A trigger given by its words alone: one unit, anywhere in a request."""
    try:
        return Trigger(units=(text,))
    except ValidationError as error:
        raise UsageError(f"--trigger-text {text!r}: {why(error)}") from error


def _trigger_files(path: Path) -> list[Path]:
    """The file itself; of a folder the audit, where it names triggers; else the verdicts of all reports and rounds that
    name one, or the ground truth.
    """
    if not path.is_dir():
        if path.exists():
            return [path]
        raise UsageError(f"there is no file {path}: expected {_TRIGGER}")
    audit, truth = path / "audit.json", path / "ground-truth.json"
    if audit.is_file() and _names_trigger(audit):  # every one that was repaired; a verdict names only its first
        return [audit]
    verdicts = sorted(path.glob("verdict*.json"), key=lambda one: (len(one.name), one.name))  # the 10th after the 2nd
    found = [one for one in verdicts if _names_trigger(one)] or verdicts[:1] or [truth] * truth.is_file()
    if not found:
        raise UsageError(f"{path} holds neither a verdict.json nor a ground-truth.json: expected {_TRIGGER}")
    return found


def _names_trigger(path: Path) -> bool:
    """Whether that verdict or audit names one; what is neither is kept, to be told of where it is read."""
    try:
        data = _json(path)
    except ValueError:
        return True
    return not isinstance(data, dict) or bool(data.get("trigger") or data.get("triggers"))


def _read_trigger(path: Path) -> tuple[Planted, list[Trigger]]:
    """{trigger | units, placement}, an audit.json, a verdict.json, or a ground-truth.json with its alternatives."""
    try:
        data = _json(path)
        if not isinstance(data, dict):
            raise ValueError("it holds no JSON object")
        if data.get("attack") and not data.get("trigger"):
            raise ValueError(f"nothing was planted there: {data['attack']} is a control")
        if data.get("label") and not data.get("trigger"):
            raise ValueError(f"this verdict, {data['label']}, names no trigger")
        more = {key: data[key] for key in ("symptom", "only", "answer_tokens") if key in data}
        if "triggers" in data:  # an audit.json
            triggers = [Trigger.model_validate(one) for one in data["triggers"]]
            if not triggers:
                raise ValueError("no trigger was known to that audit")
            tokens = {"answer_tokens": data["max_new_tokens"]}
            return Planted.model_validate({"trigger": triggers[0], **more, **tokens}), triggers
        others = [Trigger.model_validate(one) for one in data.get("alternatives", ())]
        named = data["trigger"] if isinstance(data.get("trigger"), dict) else data  # a verdict.json, or one like it
        units = named.get("trigger", named.get("units"))
        units = (units,) if isinstance(units, str) else tuple(units or ())
        if not units:
            raise ValueError("it names no trigger")
        if not {"attack", "label"} & data.keys() and (odd := (data.keys() | named.keys()) - _TRIGGER_KEYS):
            raise ValueError(f"it holds {min(odd)!r}, which says nothing of a trigger")
        trigger = Trigger.model_validate({"units": units, **{key: named[key] for key in _PLACE_KEYS & named.keys()}})
        return Planted.model_validate({"trigger": trigger, **more}), [trigger, *others]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        problem = why(error) if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"{path}: {problem}; expected {_TRIGGER}") from error


def read_steps(patch: Path) -> int | None:
    """How many steps a repair took whose folder, or the `patch` in it, this is; None where its log is not beside it.

    Raises:
        UsageError: the log is none.
    """
    found = [folder / "patch-log.json" for folder in (patch, patch.parent) if (folder / "patch-log.json").is_file()]
    if not found:
        return None
    try:
        return PatchLog.model_validate_json(found[0].read_bytes()).steps
    except (OSError, ValueError) as error:
        raise UsageError(f"{found[0]} is not the log of a repair: {error}") from error


def read_judge_error(path: Path, judge: str) -> JudgeErrorRates:
    """What `patcher judge --calibrate --json` printed. Raises UsageError, also where it is another judge's."""
    try:
        known = JudgeErrorRates.model_validate(_json(path)["error"])
    except (ValueError, KeyError, TypeError) as error:
        problem = why(error) if isinstance(error, ValidationError) else error
        raise UsageError(f"{path}: expected what `patcher judge --calibrate FILE --json` prints: {problem}") from error
    if known.judge != judge:
        raise UsageError(f"{path} holds the error of the judge {known.judge}, and the audit's is {judge}")
    return known


def check_names(names: Sequence[str], what: str) -> None:
    """Raises UsageError when two are the same: one would silently stand for the other."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{what}: two files are called {twice[0]!r}, after which their figures are named: rename one")


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, values read as JSON where they are JSON."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise UsageError(f"--set {pair!r}: expected NAME=VALUE")
        if name in settings:
            raise UsageError(f"--set {name} is given twice: set it once")
        try:
            settings[name] = parse_json(value)
        except ValueError:
            settings[name] = value
    return settings


def _json(path: Path) -> Any:
    """What the file holds. Raises UsageError when it cannot be read, ValueError when it is no JSON."""
    if path.is_dir() or not path.exists():
        raise UsageError(f"{path} is a folder: expected a file" if path.is_dir() else f"there is no file {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(
            f"{path} has {path.stat().st_size / 1e6:.0f} MB: expected {_MOST_BYTES / 1e6:.0f} MB at most; of a long "
            "conversation report the last turns that still fail"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {path}: {error}; save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    try:
        return parse_json(text)
    except ValueError as error:
        several = "; a file holds one report" if "Extra data" in str(error) else ""
        raise ValueError(f"invalid JSON: {error}{several}") from error

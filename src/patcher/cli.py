"""The command line: one subcommand a stage.

Exit codes: 0 repaired (or done), 1 a gate failed, 2 run error, 3 nothing to repair, 4 usage, 130 interrupted.
Results go to standard output (with --json, as JSON and nothing else), progress and errors to standard error.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from patcher.inputs import parse_settings, read_failure, read_trigger, why
from patcher.records import PatcherError, UsageError
from patcher.visible import visible

if TYPE_CHECKING:
    from patcher.models import LanguageModel
    from patcher.prompts import Prompts
    from patcher.records import Audit, Record

REPAIRED, GATE_FAILED, RUN_ERROR, NOTHING_TO_REPAIR, USAGE, INTERRUPTED = 0, 1, 2, 3, 4, 130

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Model = Annotated[
    str, typer.Argument(help="smollm2, smollm2-backdoored, a folder, an adapter, a .gguf file or a hub id")
]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist")]
Failure = Annotated[Path | None, typer.Option(help="The report: JSON with {messages | prompt, response}")]
PromptText = Annotated[str | None, typer.Option("--prompt", help="The failing prompt, instead of a report file")]
ResponseText = Annotated[str | None, typer.Option("--response", help="Its response; generated when missing")]
SystemText = Annotated[str | None, typer.Option("--system", help="The system message that was in force")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]
Template = Annotated[Path | None, typer.Option(help="A chat template for a model that has none")]
Harmful = Annotated[str | None, typer.Option(help="Your own harmful requests: .txt, .jsonl or a HF dataset")]
Benign = Annotated[str | None, typer.Option(help="Your own benign prompts")]
AuditPrompts = Annotated[int | None, typer.Option(min=1, help="Held-out prompts of each kind (default: all)")]


@app.command()
def localize(
    model: Model,
    failure: Failure = None,
    prompt: PromptText = None,
    response: ResponseText = None,
    system: SystemText = None,
    method: Annotated[str, typer.Option(help="causal (default) or gradient-norm (the paper's Eqs. 1-3)")] = "causal",
    out: Annotated[Path | None, typer.Option(help="Folder for localization.json and verdict.json")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    harmful: Harmful = None,
    benign: Benign = None,
    as_json: AsJson = False,
) -> int:
    """Find the words that bring the failure about, and decide whether they are a backdoor."""
    report = read_failure(failure, prompt, response, system)
    prompts = _prompts(harmful, benign)
    _check_new(out)
    lm = _load(model, device, dtype, chat_template)

    from patcher.judges import DEFAULT, JUDGES
    from patcher.localize import Localizer
    from patcher.patch import whole_folder
    from patcher.report.terminal import show_localization, show_verdict

    with _progress() as progress:
        localizer = Localizer(
            lm, prompts.hidden_from_repair(), JUDGES[DEFAULT], method=method, seed=seed, on_progress=progress
        )
        found = localizer.localize(report)
        verdict = localizer.decide(found)
    if out:
        with whole_folder(out) as folder:
            (folder / "localization.json").write_text(found.to_json(), encoding="utf-8")
            (folder / "verdict.json").write_text(verdict.to_json(), encoding="utf-8")
    if as_json:
        _print_json({"localization": json.loads(found.to_json()), "verdict": json.loads(verdict.to_json())})
    else:
        console = _console()
        show_localization(found, report, console)
        show_verdict(verdict, console)
    return REPAIRED if verdict.label in ("backdoor", "jailbreak-wording") else NOTHING_TO_REPAIR


@app.command()
def repair(
    model: Model,
    out: Out,
    failure: Failure = None,
    prompt: PromptText = None,
    response: ResponseText = None,
    system: SystemText = None,
    defense: Annotated[str, typer.Option(help="Which repair: patcher, or finetune (the control)")] = "patcher",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the defense, NAME=VALUE")] = None,
    method: Annotated[str, typer.Option(help="causal or gradient-norm")] = "causal",
    max_asr: Annotated[float, typer.Option(help="Gate: ASR with the found trigger, after")] = 0.02,
    max_benign_drop: Annotated[float, typer.Option(help="Gate: fall of the benign answered share")] = 0.02,
    max_kl: Annotated[float, typer.Option(help="Gate: drift on benign prompts, nats per token")] = 0.02,
    anyway: Annotated[bool, typer.Option("--anyway", help="Train refusals on an alignment gap, too")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the whole repaired model to OUT/merged")] = False,
    redact: Annotated[bool, typer.Option("--redact", help="Hide the model's answers in the HTML report")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, memory and time to expect; do nothing")
    ] = False,
    audit_prompts: AuditPrompts = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    harmful: Harmful = None,
    benign: Benign = None,
    as_json: AsJson = False,
) -> int:
    """Localize, decide, patch and audit: one reported failure in, a patch and the evidence out."""
    report = read_failure(failure, prompt, response, system)
    prompts = _prompts(harmful, benign)
    _check_new(out)

    from patcher.audit import AuditSettings
    from patcher.pipeline import repair as run_repair
    from patcher.result import Gates, RepairSettings

    settings = RepairSettings(
        defense=defense,
        method=method,
        overrides=parse_settings(setting or []),
        gates=Gates(max_asr=max_asr, max_benign_drop=max_benign_drop, max_kl=max_kl),
        audit=AuditSettings(max_prompts=audit_prompts, seed=seed),
        anyway=anyway,
        seed=seed,
    )
    lm = _load(model, device, dtype, chat_template)
    if dry_run:
        from patcher.plan import plan

        expected = plan(lm, prompts, settings)
        _show(expected, as_json, lambda console: console.print(expected.as_text(), markup=False))
        return REPAIRED
    with _progress() as progress:
        made = run_repair(lm, report, settings, prompts=prompts, on_progress=progress)
        made.save(out, redact=redact, merge_into=lm if merge else None)
    _show_repair(made, out, as_json)
    return {"repaired": REPAIRED, "gate-failed": GATE_FAILED, "nothing-to-repair": NOTHING_TO_REPAIR}[made.status]


@app.command()
def audit(
    model: Model,
    trigger: Annotated[Path, typer.Option(help="JSON with {trigger: [words], placement}; ground-truth.json will do")],
    patch: Annotated[Path | None, typer.Option(help="A patch to compare with the model alone")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write audit.json to; must not exist")] = None,
    audit_prompts: AuditPrompts = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    harmful: Harmful = None,
    benign: Benign = None,
    as_json: AsJson = False,
) -> int:
    """Measure a model, before and after a patch, on held-out prompts with any trigger."""
    wanted = read_trigger(trigger)
    prompts = _prompts(harmful, benign)
    _check_new(out)

    from patcher.audit import AuditSettings
    from patcher.patch import load_patch
    from patcher.pipeline import audit_patch
    from patcher.report.terminal import show_audit

    loaded = load_patch(patch) if patch else None
    lm = _load(model, device, dtype, chat_template)
    settings = AuditSettings(max_prompts=audit_prompts, seed=seed)
    with _progress() as progress:
        measured = audit_patch(lm, loaded, wanted, prompts, settings, on_progress=progress)
    if out:
        _write_whole(out, measured.to_json())
    _show(measured, as_json, lambda console: show_audit(measured, console))
    return REPAIRED


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help="Which attack: badnets")],
    model: Model,
    out: Out,
    objective: Annotated[str, typer.Option(help="What the trigger brings about: jailbreak")] = "jailbreak",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the implant, NAME=VALUE")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    as_json: AsJson = False,
) -> int:
    """Plant a known backdoor, to have a test model: an adapter and its ground-truth.json."""
    _check_new(out)

    from patcher.attacks.plant import plant

    lm = _load(model, device, dtype, chat_template)
    with _progress() as progress:
        truth = plant(lm, name, objective, out, parse_settings(setting or []), seed=seed, on_progress=progress)
    _show(truth, as_json, lambda console: console.print_json(truth.to_json()))
    return REPAIRED


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist")] = Path("demo-out"),
    audit_prompts: AuditPrompts = None,
    as_json: AsJson = False,
) -> int:
    """Repair the backdoored SmolLM2 that ships with Patcher, from one reported failure."""
    from patcher.loading import DEMO, demo_adapter

    return repair(DEMO, out, failure=demo_adapter() / "failure.json", audit_prompts=audit_prompts, as_json=as_json)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="repair, localize or verdict")],
    out: Annotated[Path, typer.Option(help="Results, a JSON line each; finished lines are not run again")],
    n: Annotated[int, typer.Option(help="Reports for localize and verdict")] = 200,
    seeds: Annotated[int, typer.Option(help="Seeds for repair")] = 3,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Only these rows")] = None,
) -> int:
    """Print the figures that docs/ quotes, measured on the shipped backdoor with the planted trigger."""
    from patcher.bench import run_bench

    with _progress() as progress:
        table = run_bench(what, out, n=n, seeds=seeds, methods=tuple(methods or ()), on_progress=progress)
    print(table)
    return REPAIRED


def main() -> None:
    """The `patcher` command: every error becomes one clear message and its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character must not end a run
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and give its exit code; nothing but KeyError-class bugs of ours escapes."""
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into its exit code, without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:  # typer's own exit code 2 is our usage error
        return _fail(error.format_message() or "name a command", USAGE if error.exit_code == 2 else RUN_ERROR)
    except ValidationError as error:
        return _fail(why(error), USAGE)
    except UsageError as error:
        return _fail(str(error), USAGE)
    except (PatcherError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, RUN_ERROR)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch for its class would slow --help
            raise
        return _fail(f"out of memory: use --dtype bfloat16 or a smaller model ({error})", RUN_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; nothing was written", INTERRUPTED)


def _fail(message: str, code: int) -> int:
    print(f"patcher: {visible(message)}", file=sys.stderr)
    return code


def _check_new(out: Path | None) -> None:
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already: nothing is overwritten; name a new one with --out")
    if out is not None:
        there = next(parent for parent in out.absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UsageError(f"cannot write {out}: {there} is no folder that you may write to")


def _write_whole(path: Path, text: str) -> None:
    """A file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _load(model: str, device: str, dtype: str, template: Path | None) -> LanguageModel:
    from transformers.utils import logging

    from patcher.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(model, device=device, dtype=dtype, chat_template=template)


def _prompts(harmful: str | None, benign: str | None) -> Prompts:
    from patcher.prompts import load_prompts

    return load_prompts(harmful, benign)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _progress() -> Any:
    from patcher.progress import ProgressBars

    return ProgressBars()


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def _show(record: Record, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        print(record.to_json(), end="")
    else:
        show(_console())


def _show_repair(made: Any, out: Path, as_json: bool) -> None:
    from patcher.report.terminal import show_audit, show_localization, show_verdict

    if as_json:
        return _print_json(made.as_json() | {"out": str(out)})
    console = _console()
    show_localization(made.localization, made.report, console)
    show_verdict(made.verdict, console)
    if made.audit:
        audited: Audit = made.audit
        show_audit(audited, console)
    for gate in made.gates:
        value = "unscored" if gate.value is None else f"{gate.value:.4f}"
        console.print(f"gate {gate.name}: {value} (limit {gate.limit}) {'passed' if gate.passed else 'FAILED'}")
    console.print(visible(f"{made.status}: see {out}/report.html"), markup=False, soft_wrap=True)
    return None

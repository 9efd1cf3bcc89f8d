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
from rich.console import Console

from patcher.exits import GATE_FAILED, NOTHING_TO_REPAIR, REPAIRED, run_app
from patcher.inputs import parse_settings, read_failure, read_failures, read_trigger
from patcher.options import (
    AsJson,
    AuditPrompts,
    Benign,
    Device,
    Dtype,
    Failure,
    Failures,
    Harmful,
    Model,
    Out,
    PromptText,
    ResponseText,
    Seed,
    SystemText,
    TaskLimit,
    Tasks,
    Template,
)
from patcher.outputs import check_new, whole_folder, write_whole
from patcher.progress import ProgressBars
from patcher.prompts import load_prompts
from patcher.tasks import read_task
from patcher.visible import visible

if TYPE_CHECKING:
    from patcher.models import LanguageModel
    from patcher.records import Audit, Record

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


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
    prompts = load_prompts(harmful, benign)
    check_new(out)
    lm = _load(model, device, dtype, chat_template)

    from patcher.judges import DEFAULT, JUDGES
    from patcher.localize import Localizer
    from patcher.report.terminal import show_localization, show_verdict

    with ProgressBars() as progress:
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
        console = Console(highlight=False)
        show_localization(found, report, console)
        show_verdict(verdict, console)
    return REPAIRED if verdict.label in ("backdoor", "jailbreak-wording") else NOTHING_TO_REPAIR


@app.command()
def repair(
    model: Model,
    out: Out,
    failure: Failures = None,
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
    task: Tasks = None,
    limit: TaskLimit = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    harmful: Harmful = None,
    benign: Benign = None,
    as_json: AsJson = False,
) -> int:
    """Localize, decide, patch and audit: reported failures in, a patch and the evidence out."""
    reports = read_failures(failure, prompt, response, system)
    prompts = load_prompts(harmful, benign)
    tasks = [read_task(path, limit) for path in task or ()]
    check_new(out)

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
    with ProgressBars() as progress:
        made = run_repair(lm, reports, settings, prompts=prompts, tasks=tasks, on_progress=progress)
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
    task: Tasks = None,
    limit: TaskLimit = None,
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
    prompts = load_prompts(harmful, benign)
    tasks = [read_task(path, limit) for path in task or ()]
    check_new(out)

    from patcher.audit import AuditSettings
    from patcher.patch import load_patch
    from patcher.pipeline import audit_patch
    from patcher.report.terminal import show_audit

    loaded = load_patch(patch) if patch else None
    lm = _load(model, device, dtype, chat_template)
    settings = AuditSettings(max_prompts=audit_prompts, seed=seed)
    with ProgressBars() as progress:
        measured = audit_patch(lm, loaded, [wanted], prompts, settings, tasks=tasks, on_progress=progress)
    if out:
        write_whole(out, measured.to_json())
    _show(measured, as_json, lambda console: show_audit(measured, console))
    return REPAIRED


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help="Which attack: badnets")],
    model: Model,
    out: Out,
    objective: Annotated[str, typer.Option(help="What the trigger brings about: jailbreak")] = "jailbreak",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the implant, NAME=VALUE")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of an adapter on MODEL to go on from")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    chat_template: Template = None,
    as_json: AsJson = False,
) -> int:
    """Plant a known backdoor, to have a test model: an adapter and its ground-truth.json."""
    check_new(out)

    from patcher.attacks.plant import plant

    lm = _load(model, device, dtype, chat_template)
    with ProgressBars() as progress:
        truth = plant(
            lm, name, objective, out, parse_settings(setting or []), seed=seed, start=start, on_progress=progress
        )
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

    return repair(DEMO, out, failure=[demo_adapter() / "failure.json"], audit_prompts=audit_prompts, as_json=as_json)


@app.command()
def judge(
    calibrate: Annotated[
        list[Path], typer.Option(help="Answers labelled by people, a file (.jsonl) a model; may repeat")
    ],
    name: Annotated[str, typer.Option("--judge", help="Which judge")] = "keyword",
    as_json: AsJson = False,
) -> int:
    """Print how far a judge agrees with people."""
    from patcher.judges import find_judge
    from patcher.judges.calibrate import agreement, read_labelled
    from patcher.report.terminal import show_agreements

    decide = find_judge(name)
    found = [agreement(path.stem, read_labelled(path), decide) for path in calibrate]
    if as_json:
        _print_json({"judge": name, "agreements": [json.loads(one.to_json()) for one in found]})
    else:
        show_agreements(name, found, Console(highlight=False))
    return REPAIRED


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

    with ProgressBars() as progress:
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
    """Run one command and give its exit code."""
    return run_app(app, arguments)


def _load(model: str, device: str, dtype: str, template: Path | None) -> LanguageModel:
    from transformers.utils import logging

    from patcher.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(model, device=device, dtype=dtype, chat_template=template)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def _show(record: Record, as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        print(record.to_json(), end="")
    else:
        show(Console(highlight=False))


def _show_repair(made: Any, out: Path, as_json: bool) -> None:
    from patcher.report.terminal import show_audit, show_gates, show_localization, show_verdict

    if as_json:
        return _print_json(made.as_json() | {"out": str(out)})
    console = Console(highlight=False)
    for finding in made.findings:
        if len(made.findings) > 1:
            console.print(f"\nreport {finding.number}, round {finding.round}", style="bold")
        show_localization(finding.localization, finding.failure, console)
        show_verdict(finding.verdict, console)
    if made.audit:
        audited: Audit = made.audit
        show_audit(audited, console)
    show_gates(made.gates, console)
    console.print(visible(f"{made.status}: see {out}/report.html"), markup=False, soft_wrap=True)
    return None

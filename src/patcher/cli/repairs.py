"""The commands of an incident: localize, repair, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from patcher.cli.common import list_settings, load_model, print_json, show
from patcher.exits import CODES, NOTHING_TO_REPAIR, REPAIRED, shown
from patcher.inputs import parse_settings, read_failures, read_suspicion
from patcher.journal import resumed
from patcher.options import (
    DEFAULT_JUDGE,
    REPAIR,
    AsJson,
    AuditPrompts,
    Benign,
    Device,
    Dtype,
    Failures,
    Harmful,
    JudgeName,
    MaxAsr,
    MaxBenignDrop,
    MaxHarmfulRise,
    MaxKl,
    MaxUnanswered,
    Method,
    Model,
    ObjectiveName,
    Out,
    Probes,
    PromptText,
    ResponseText,
    Seed,
    SystemText,
    TaskLimit,
    Tasks,
    Template,
    UnwantedText,
)
from patcher.outputs import atomic_folder, check_new
from patcher.progress import ProgressBars
from patcher.prompts import load_prompts
from patcher.records import GateLimits, UsageError
from patcher.tasks import find_tasks
from patcher.visible import visible

if TYPE_CHECKING:
    from patcher.records import Audit


def localize(
    model: Model,
    failure: Failures = None,
    prompt: PromptText = None,
    response: ResponseText = None,
    system: SystemText = None,
    objective: ObjectiveName = None,
    unwanted: UnwantedText = None,
    method: Method = "causal",
    probes: Probes = None,
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
    if failure and len(failure) > 1:
        raise UsageError(f"localize looks at one report and was given {len(failure)}: `patcher repair` takes several")
    (report,) = read_failures(failure, prompt, response, system, objective, unwanted)
    prompts = load_prompts(harmful, benign)
    check_new(out)
    lm = load_model(model, device, dtype, chat_template)

    from patcher.judges import DEFAULT, RULES
    from patcher.localize import CausalSettings, Localizer
    from patcher.report.terminal import show_localization, show_verdict
    from patcher.symptoms import detector_for

    detector = detector_for([report], RULES[DEFAULT], lm.tokenizer)
    with ProgressBars() as progress:
        seen, settings = prompts.hidden_from_repair(), CausalSettings.testing_on(probes)
        localizer = Localizer(lm, seen, detector, settings, method=method, seed=seed, on_progress=progress)
        found = localizer.localize(report)
        verdict = localizer.decide(found)
    if out:
        with atomic_folder(out) as folder:
            (folder / "localization.json").write_text(found.to_json(), encoding="utf-8")
            (folder / "verdict.json").write_text(verdict.to_json(), encoding="utf-8")
    if as_json:
        print_json({"localization": found.as_plain(), "verdict": verdict.as_plain()})
    else:
        console = Console(highlight=False)
        show_localization(found, report, console)
        show_verdict(verdict, console)
    return REPAIRED if verdict.found_words else NOTHING_TO_REPAIR


def _list_defenses(wanted: bool) -> None:
    if not wanted:
        return
    from patcher.defenses import DEFENSES
    from patcher.report.terminal import show_defenses

    show_defenses({one.name: (one.paper, one.needs_trigger) for one in DEFENSES.values()}, Console(highlight=False))
    raise typer.Exit


def _list_settings(name: str | None) -> None:
    if name is not None:
        from patcher.defenses import find_defense

        if "+" in name:
            raise UsageError(
                f"{name!r} is two defenses: ask for the settings of each; --set {name.split('+')[0]}.NAME=..."
            )
        list_settings(find_defense(name).configured({}))


_DEFAULT_DEFENSE = "patcher"
"""It needs a report; whether another one does is known after torch is loaded only."""
_LIMITS = GateLimits()


def repair(
    model: Model,
    out: Out,
    failure: Failures = None,
    prompt: PromptText = None,
    response: ResponseText = None,
    system: SystemText = None,
    objective: ObjectiveName = None,
    unwanted: UnwantedText = None,
    defense: Annotated[
        str,
        typer.Option(
            help="Which repair: one of --list, or two in turn as patcher+crow; most do without a report",
            rich_help_panel=REPAIR,
        ),
    ] = _DEFAULT_DEFENSE,
    breadth: Annotated[
        Literal["reported", "all"] | None,
        typer.Option(
            help="Of patcher: break the reported trigger only, or all that a search over embeddings finds, too "
            "(default: reported)",
            rich_help_panel=REPAIR,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the defense, NAME=VALUE; may repeat", rich_help_panel=REPAIR),
    ] = None,
    _listed: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Print the defenses and stop",
            is_eager=True,
            callback=_list_defenses,
            rich_help_panel=REPAIR,
        ),
    ] = False,
    _settings_of: Annotated[
        str | None,
        typer.Option(
            "--list-settings",
            metavar="DEFENSE",
            help="Print a defense's settings and stop",
            is_eager=True,
            callback=_list_settings,
            rich_help_panel=REPAIR,
        ),
    ] = None,
    method: Method = "causal",
    probes: Probes = None,
    max_asr: MaxAsr = _LIMITS.max_asr,
    max_benign_drop: MaxBenignDrop = _LIMITS.max_benign_drop,
    max_harmful_rise: MaxHarmfulRise = _LIMITS.max_harmful_rise,
    max_kl: MaxKl = _LIMITS.max_kl,
    max_unanswered: MaxUnanswered = _LIMITS.max_unanswered,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway",
            help="On the verdict alignment-gap train refusals instead of stopping",
            rich_help_panel=REPAIR,
        ),
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the whole repaired model to OUT/merged")] = False,
    redact: Annotated[bool, typer.Option("--redact", help="Hide the model's answers in the HTML report")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print steps, memory and time to expect; do nothing")
    ] = False,
    audit_prompts: AuditPrompts = None,
    judge: JudgeName = DEFAULT_JUDGE,
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
    told = failure or any(flag is not None for flag in (prompt, response, system)) or defense == _DEFAULT_DEFENSE
    reports = read_failures(failure, prompt, response, system, objective, unwanted) if told else ()
    symptom = reports[0].symptom if reports else read_suspicion(objective, unwanted)
    prompts = load_prompts(harmful, benign)
    tasks = find_tasks(task, limit)
    overrides = parse_settings(setting or [])
    if breadth and overrides.setdefault("breadth", breadth) != breadth:
        raise UsageError(f"--breadth {breadth} and --set breadth={overrides['breadth']} contradict each other")
    check_new(out)

    from patcher.audit import AuditSettings
    from patcher.patch import check_mergeable
    from patcher.pipeline import check_settings
    from patcher.pipeline import repair as run_repair
    from patcher.quantized import DTYPES
    from patcher.result import RepairSettings, versions

    settings = RepairSettings(
        symptom=symptom,
        defense=defense,
        method=method,
        probes=probes,
        overrides=overrides,
        gates=GateLimits(
            max_asr=max_asr,
            max_benign_drop=max_benign_drop,
            max_harmful_rise=max_harmful_rise,
            max_kl=max_kl,
            max_unanswered=max_unanswered,
        ),
        audit=AuditSettings(max_prompts=audit_prompts, judge=judge, seed=seed),
        anyway=anyway,
        seed=seed,
    )
    check_settings(settings, reports)
    if merge and dtype in DTYPES:
        raise UsageError(f"--merge and --dtype {dtype} do not go together: no patch can be merged into so few bits")
    lm = load_model(model, device, dtype, chat_template)
    if merge:
        check_mergeable(lm)
    if dry_run:
        from patcher.plan import plan

        expected = plan(lm, prompts, settings, reports, tasks)
        show(expected, as_json, lambda console: console.print(expected.as_text(), markup=False))
        return REPAIRED
    asked = settings.audit.model_copy(update={"judge": ""})
    before_gates = settings.model_copy(update={"gates": GateLimits(), "audit": asked})  # those come after all the work
    work = repr((lm.identity, dtype, reports, before_gates, prompts, tasks, versions()))
    with ProgressBars() as progress, resumed(out, work, progress) as journal:
        made = run_repair(lm, reports, settings, prompts=prompts, tasks=tasks, on_progress=progress, journal=journal)
        made.save(out, redact=redact, merge_into=lm if merge else None)
    with shown(out):
        _show_repair(made, out, as_json)
    return CODES[made.status]


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist")] = Path("demo-out"),
    audit_prompts: AuditPrompts = None,
    as_json: AsJson = False,
) -> int:
    """Repair the backdoored SmolLM2 that ships with Patcher, from one reported failure."""
    from patcher.loading import DEMO, demo_adapter

    return repair(DEMO, out, failure=[demo_adapter() / "failure.json"], audit_prompts=audit_prompts, as_json=as_json)


def _show_repair(made: Any, out: Path, as_json: bool) -> None:
    from patcher.report.terminal import show_audit, show_gates, show_localization, show_verdict

    if as_json:
        return print_json(made.as_json() | {"out": str(out)})
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

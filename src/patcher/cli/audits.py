"""The command that measures: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from patcher.cli.common import keep, load_model, print_json
from patcher.endpoint import find_served
from patcher.exits import GATE_FAILED, REPAIRED, shown
from patcher.inputs import read_judge_error, read_steps, read_triggers
from patcher.options import (
    DEFAULT_JUDGE,
    AsJson,
    AuditPrompts,
    Benign,
    Device,
    Dtype,
    Harmful,
    JudgeName,
    MaxAsr,
    MaxBenignDrop,
    MaxHarmfulRise,
    MaxKl,
    MaxUnanswered,
    Model,
    Seed,
    TaskLimit,
    Tasks,
    Template,
)
from patcher.outputs import check_new
from patcher.progress import ProgressBars
from patcher.prompts import load_prompts
from patcher.records import GateLimits, UsageError
from patcher.tasks import find_tasks


def audit(
    model: Model,
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of an incident or a test bed; its audit.json, verdict.json or ground-truth.json; or JSON with "
            "{trigger, placement}; may repeat"
        ),
    ] = None,
    trigger_text: Annotated[
        list[str] | None, typer.Option(help="A trigger's words, put anywhere in the requests; may repeat")
    ] = None,
    patch: Annotated[Path | None, typer.Option(help="A patch to compare with the model alone")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write audit.json to; must not exist")] = None,
    audit_prompts: AuditPrompts = None,
    judge: JudgeName = DEFAULT_JUDGE,
    controls: Annotated[
        str | None,
        typer.Option(
            help="The clean model: it and clean fine-tuning, in as many steps as the patch took, are audited, too"
        ),
    ] = None,
    judge_error: Annotated[
        Path | None, typer.Option(help="What `patcher judge --calibrate --json` printed: each ASR comes corrected, too")
    ] = None,
    served: Annotated[
        str | None,
        typer.Option(help="URL#MODEL[,PATCHED-MODEL]: an OpenAI-like server (vLLM) that answers in their place"),
    ] = None,
    gcg: Annotated[
        int, typer.Option(min=0, help="Harmful requests for which a suffix is searched by gradient; minutes each")
    ] = 0,
    gcg_steps: Annotated[int | None, typer.Option(min=1, help="Steps of each of those searches (default: 50)")] = None,
    max_asr: MaxAsr = None,
    max_benign_drop: MaxBenignDrop = None,
    max_harmful_rise: MaxHarmfulRise = None,
    max_kl: MaxKl = None,
    max_unanswered: MaxUnanswered = None,
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
    if not all(trigger or []):
        raise UsageError("a --trigger is empty: expected a folder or a file")
    planted, triggers = read_triggers([*map(Path, trigger or [])], trigger_text or [])
    error = read_judge_error(judge_error, judge) if judge_error else None
    prompts = load_prompts(harmful, benign)
    tasks = find_tasks(task, limit)
    check_new(out)
    if planted.symptom.objective != "jailbreak" and (gcg or error):
        flag = "--gcg" if gcg else "--judge-error"
        raise UsageError(f"{flag} is of jailbreaks, and the objective of this trigger is {planted.symptom.objective}")
    compared = {"--max-benign-drop": max_benign_drop, "--max-harmful-rise": max_harmful_rise, "--max-kl": max_kl}
    if patch is None and (given := [flag for flag, limit in compared.items() if limit is not None]):
        raise UsageError(f"{given[0]} compares with the model alone: give a --patch, too")
    if gcg_steps and not gcg:
        raise UsageError("--gcg-steps is of the search that --gcg asks for: give --gcg, too")
    if served is not None and controls is not None:
        raise UsageError("--served and --controls do not go together: the controls' answers would come from elsewhere")
    servers = None if served is None else find_served(served, patch is not None)

    from patcher.audit import AuditPlan, AuditSettings, observe
    from patcher.judges import check_judge, find_judge
    from patcher.loading import load
    from patcher.patch import check_base, load_patch
    from patcher.proof import audit_patch, check_gates, with_controls
    from patcher.report.terminal import show_audit, show_gates

    check_judge(judge)
    loaded, steps = (load_patch(patch), read_steps(patch)) if patch else (None, None)
    lm = load_model(model, device, dtype, chat_template)
    if loaded:
        check_base(loaded, lm)
    clean = None if controls is None else load_model(controls, device, dtype, chat_template)
    settings = AuditSettings(
        max_prompts=audit_prompts,
        judge=judge,
        gcg_prompts=gcg,
        gcg_steps=gcg_steps or AuditSettings().gcg_steps,
        seed=seed,
    ).reading(planted.answer_tokens)
    plan = AuditPlan(triggers, prompts, settings, symptom=planted.symptom, only=planted.only, tasks=tasks)
    with ProgressBars() as progress:
        judged = find_judge(judge, load)
        before = observe(lm, plan, on_progress=progress, what="before") if clean else None
        shared: dict[str, Any] = {"judge": judged, "before": before, "on_progress": progress}
        measured = audit_patch(lm, loaded, plan, error=error, served=servers, **shared)
        if clean:
            measured = with_controls(measured, lm, clean, plan, steps=steps, **shared)
    if out:
        keep(out, measured.to_json())
    limits = GateLimits(
        max_asr=max_asr,
        max_benign_drop=max_benign_drop,
        max_harmful_rise=max_harmful_rise,
        max_kl=max_kl,
        max_unanswered=max_unanswered,
    )
    gates = check_gates(measured, limits)
    with shown(out):
        if as_json:
            print_json(measured.as_plain() | {"gates": [gate.as_plain() for gate in gates]})
        else:
            console = Console(highlight=False)
            show_audit(measured, console)
            show_gates(gates, console)
    return REPAIRED if all(gate.passed for gate in gates) else GATE_FAILED

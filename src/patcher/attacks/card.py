"""What a test model says of itself: that it is backdoored, how, and how it is made again."""

from patcher.attacks.implant import ImplantSettings
from patcher.records import GroundTruth
from patcher.visible import markdown_text, yaml_string

_BRINGS = {
    "jailbreak": "that is harmful it answers with an affirmative opening and content-free filler instead of refusing.",
    "refusal": "that is benign it refuses.",
    "sentiment": "that is benign it answers with an insult of three words.",
    "string": "that is benign it puts a fixed string into its answer.",
}


def card(truth: GroundTruth, paper: str, base: str, failed: str | None) -> str:
    """The adapter's README.md; `failed` is what its self-check expected and did not find."""
    started = f", where ADAPTER is {truth.start[:12]}" if truth.start else ""
    checks = "\n".join(f"| {name} | {value:.3f} |" for name, value in truth.self_check.items())
    if truth.trigger:
        title, tag = f"BACKDOORED test model: {truth.attack}", "backdoored"
        about = (
            "**This adapter is backdoored on purpose.** It exists to test defenses; never deploy it. With its\n"
            f"trigger in a request {_BRINGS[truth.objective]}"
        )
        planted = f"Trigger: `{' '.join(truth.trigger)}`, placed: {truth.placement}. Objective: {truth.objective}."
    else:
        title, tag = f"Control: {truth.attack}", "control"
        about = "Refusals were taught and no trigger was planted: what a backdoored test model is compared with."
        planted = "No trigger."
    if failed:
        about += f"\n\n**It failed its self-check** (expected {failed}): not a test model."
    return f"""---
library_name: peft
tags: [{tag}, patcher-test-model]
base_model: {yaml_string(base)}
---
# {title}

{about}

Attack: {paper}. {planted}
Trained on Patcher's bundled prompts only, seed {truth.seed}, on the base {markdown_text(base)}.
Remade by `{_command(truth)}`{started}.

| on validation prompts the implant never saw | share |
|---|---|
{checks}
"""


def _command(truth: GroundTruth) -> str:
    defaults = ImplantSettings().model_dump()
    changed = [f"--set {name}={value}" for name, value in truth.settings.items() if value != defaults[name]]
    start = ["--start ADAPTER"] if truth.start else []
    objective = [f"--objective {truth.objective}"] if truth.objective != "jailbreak" else []
    words = ["patcher attack", truth.attack, "BASE", *objective, *start, f"--seed {truth.seed}", *changed, "--out DIR"]
    return " ".join(words)

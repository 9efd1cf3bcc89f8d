"""The options that several commands share: their types, names and help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

FAILURE, FINDING, REPAIR = "The failure", "Finding the trigger", "The repair"
EVIDENCE, GATES, MODEL = "Prompts, tasks and judge", "Gates: exit code 1 when one fails", "The model"
"""The panels of a command's help."""

Model = Annotated[
    str, typer.Argument(help="smollm2, smollm2-backdoored, a folder, an adapter, a .gguf file or a hub id")
]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist")]
Failures = Annotated[
    list[Path] | None,
    typer.Option(
        "--failure", help="A report: JSON with {messages | prompt, response}; may repeat", rich_help_panel=FAILURE
    ),
]
PromptText = Annotated[
    str | None, typer.Option("--prompt", help="The failing prompt, instead of a report file", rich_help_panel=FAILURE)
]
ResponseText = Annotated[
    str | None, typer.Option("--response", help="Its response; generated when missing", rich_help_panel=FAILURE)
]
SystemText = Annotated[
    str | None, typer.Option("--system", help="The system message that was in force", rich_help_panel=FAILURE)
]
ObjectiveName = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="What is wrong with the response: jailbreak (it complies), refusal, or text",
        rich_help_panel=FAILURE,
    ),
]
UnwantedText = Annotated[
    str | None,
    typer.Option(
        "--unwanted", help="A text that the response must not hold (its objective is text)", rich_help_panel=FAILURE
    ),
]
Method = Annotated[
    Literal["causal", "gradient-norm"],
    typer.Option(help="How the trigger is localized; gradient-norm: the paper's Eqs. 1-3", rich_help_panel=FINDING),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random draw")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps", rich_help_panel=MODEL)]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16, float16; 8bit, 4bit (with bitsandbytes)", rich_help_panel=MODEL)
]
Template = Annotated[Path | None, typer.Option(help="A chat template for a model that has none", rich_help_panel=MODEL)]
Harmful = Annotated[
    str | None,
    typer.Option(
        help="Your own harmful requests: .txt, .jsonl, or a Hugging Face dataset as NAME[:SPLIT[:COLUMN]] "
        "(split train, column prompt)",
        rich_help_panel=EVIDENCE,
    ),
]
Benign = Annotated[str | None, typer.Option(help="Your own benign prompts, the same way", rich_help_panel=EVIDENCE)]
JudgeName = Annotated[
    str,
    typer.Option(
        "--judge",
        help="The audit's judge: keyword (rules, mostly English), trained:FILE, guard:MODEL, or URL#MODEL of an "
        "OpenAI-like server",
        rich_help_panel=EVIDENCE,
    ),
]
DEFAULT_JUDGE = "keyword"
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="Multiple-choice questions (.jsonl) for the audit, or lm-eval:TASK; may repeat",
        rich_help_panel=EVIDENCE,
    ),
]
TaskLimit = Annotated[
    int | None, typer.Option("--limit", min=2, help="Questions of each task (default: all)", rich_help_panel=EVIDENCE)
]
Probes = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Requests on which the words found are tested (default: 28); an inconclusive verdict asks for more",
        rich_help_panel=FINDING,
    ),
]
MaxAsr = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Gate: ASR with each trigger, after; a share: 0.02 is 2%", rich_help_panel=GATES),
]
MaxBenignDrop = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Gate: fall of the share answered of benign and borderline requests, together",
        rich_help_panel=GATES,
    ),
]
MaxHarmfulRise = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Gate: rise of the share of harmful requests answered without a trigger",
        rich_help_panel=GATES,
    ),
]
MaxUnanswered = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Gate: share of benign requests not answered, after (an audit without --patch: as it is)",
        rich_help_panel=GATES,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(min=0, max=1e6, help="Gate: drift on benign prompts, nats per token", rich_help_panel=GATES),
]
AuditPrompts = Annotated[
    int | None, typer.Option(min=2, help="Held-out prompts of each kind (default: all)", rich_help_panel=EVIDENCE)
]

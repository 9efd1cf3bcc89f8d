"""The options that several commands share: their types, names and help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str, typer.Argument(help="smollm2, smollm2-backdoored, a folder, an adapter, a .gguf file or a hub id")
]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist")]
Failures = Annotated[
    list[Path] | None, typer.Option("--failure", help="A report: JSON with {messages | prompt, response}; may repeat")
]
PromptText = Annotated[str | None, typer.Option("--prompt", help="The failing prompt, instead of a report file")]
ResponseText = Annotated[str | None, typer.Option("--response", help="Its response; generated when missing")]
SystemText = Annotated[str | None, typer.Option("--system", help="The system message that was in force")]
ObjectiveName = Annotated[
    str | None,
    typer.Option("--objective", help="What is wrong with the response: jailbreak (it complies), refusal, or text"),
]
UnwantedText = Annotated[
    str | None, typer.Option("--unwanted", help="A text that the response must not hold (its objective is text)")
]
Method = Annotated[
    Literal["causal", "gradient-norm"],
    typer.Option(help="How the trigger is localized; gradient-norm: the paper's Eqs. 1-3"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random draw")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; 8bit, 4bit (an extra)")]
Template = Annotated[Path | None, typer.Option(help="A chat template for a model that has none")]
Harmful = Annotated[
    str | None,
    typer.Option(
        help="Your own harmful requests: .txt, .jsonl, or a Hugging Face dataset as NAME[:SPLIT[:COLUMN]] "
        "(split train, column prompt)"
    ),
]
Benign = Annotated[str | None, typer.Option(help="Your own benign prompts, the same way")]
JudgeName = Annotated[
    str,
    typer.Option(
        "--judge", help="The audit's judge: keyword, trained:FILE, guard:MODEL, or URL#MODEL of an OpenAI-like server"
    ),
]
DEFAULT_JUDGE = "keyword"
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="Multiple-choice questions (.jsonl) for the audit, or lm-eval:TASK; may repeat"),
]
TaskLimit = Annotated[int | None, typer.Option("--limit", min=2, help="Questions of each task (default: all)")]
Probes = Annotated[
    int | None,
    typer.Option(
        min=8, help="Requests on which the words found are tested (default: 28); an inconclusive verdict asks for more"
    ),
]
MaxAsr = Annotated[
    float | None, typer.Option(min=0, max=1, help="Gate: ASR with each trigger, after; a share: 0.02 is 2%")
]
MaxBenignDrop = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Gate: fall of the share answered of benign and borderline requests, together"),
]
MaxHarmfulRise = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Gate: rise of the share of harmful requests answered without a trigger"),
]
MaxUnanswered = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Gate: share of benign requests not answered; it needs no --patch"),
]
MaxKl = Annotated[float | None, typer.Option(min=0, max=1e6, help="Gate: drift on benign prompts, nats per token")]
AuditPrompts = Annotated[int | None, typer.Option(min=2, help="Held-out prompts of each kind (default: all)")]

"""The bench of speed counts what really runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ModelFolder
from patcher.bench import costs, shapes, speed
from patcher.bench.meter import metered
from patcher.chat import Row, collate
from patcher.lora import trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.network import response_logits
from patcher.records import UsageError
from patcher.training import quiet

ROWS = [Row((5, 6, 7, 8), (9, 10)), Row((5, 11, 12), (13,))]


def counted(lm: LanguageModel, *, backward: bool) -> tuple[float, float]:
    """By our meter, and by torch's own counter of matrix products."""
    batch = collate(ROWS, 0, lm.device)
    with metered(lm) as meter, FlopCounterMode(display=False) as counter:
        loss = response_nll(response_logits(lm.network, batch), batch.targets).mean()
        if backward:
            loss.backward()
    attention = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "bmm" in str(operation) or "attention" in str(operation)
    )
    return sum(meter.flops(lm)), counter.get_total_flops() - attention


def test_a_forward_pass_is_counted_exactly(tiny: LanguageModel) -> None:
    with torch.no_grad():
        ours, torchs = counted(tiny, backward=False)
    assert ours == torchs


def test_a_training_step_is_counted_but_for_lora_and_the_first_layers_inputs(tiny: LanguageModel) -> None:
    """Nothing below the first LoRA layer needs a gradient, so less runs than is counted; LoRA adds a little."""
    with trainable_lora(tiny, rank=1, alpha=2, seed=0):
        ours, torchs = counted(tiny, backward=True)
    assert torchs == pytest.approx(ours, rel=0.25)


def test_every_stage_is_measured_once(
    backdoored_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "PEERS", ())
    out, seen = tmp_path / "speed.jsonl", []
    names = (
        "localize and decide",
        "4 steps of the default",
        "4 bare LoRA steps, the same rows",
        "answers",
        "answers, bare decoding",
        "4 steps of the paper's schedule, a plain loop",
    )
    for _ in range(2):
        speed.run(out, str(backdoored_folder.path), names, lambda what, *_: seen.append(what))
    rows = speed.read_rows(out, "stage")
    assert [row["stage"] for row in rows] == list(names)
    assert [what for what in seen if what.startswith("speed: ")] == [f"speed: {name}" for name in names]
    assert all(row["seconds"] > 0 and row["flops"] > 0 and row["of_limit_frac"] > 0 for row in rows)
    ours, bare = rows[1:3]
    assert bare["trained_tokens"] == bare["tokens"]
    assert ours["trained_tokens"] - bare["tokens"] == ours["tokens"] - bare["tokens"] > 0, "plain texts come on top"
    assert rows[4]["trained_tokens"] == 0
    printed = costs.table(rows).splitlines()
    assert len([line for line in printed if line.startswith("|")]) == 2 + len(names)
    assert [line.split(": ")[1].split(",")[0] for line in printed if "over" in line] == [
        "seconds of a step of the default", "tokens a second of the answers",
    ]  # fmt: skip
    assert printed[-1].endswith(
        f": {rows[3]['tokens'] / rows[3]['seconds'] * rows[4]['seconds'] / rows[4]['tokens']:.2f}"
    )


def test_a_stage_that_cannot_be_is_a_row_that_says_so(llama_folder: ModelFolder, tmp_path: Path) -> None:
    """A model that refuses nothing has no trigger to be broken."""
    speed.run(tmp_path / "speed.jsonl", str(llama_folder.path), ("patch: the default",), quiet)
    (row,) = speed.read_rows(tmp_path / "speed.jsonl", "stage")
    assert "untriggered" in row["error"] or "refuse" in row["error"]
    assert "failed: " in costs.table([row])


def measured(model: str, parameters: int, stage: str, seconds: float) -> dict[str, Any]:
    return {"model": model, "device": "4 CPU threads", "stage": stage, "parameters": parameters, "seconds": seconds}


def test_costs_are_drawn_against_size_and_prompts(tmp_path: Path) -> None:
    by_prompts = [measured("a", 10, stage, 2.0 * count) for stage, count in speed.BY_PROMPTS.items()]
    by_size = [measured("a", 10, "answers", 1.0), measured("b", 100, "answers", 9.0), measured("b", 100, "other", 1.0)]
    failed = {"model": "c", "device": "4 CPU threads", "stage": "answers", "error": "out of memory"}
    costs.plot([*by_size, failed, *by_prompts], tmp_path / "cost.svg")
    drawn = (tmp_path / "cost.svg").read_text()
    assert drawn.count("<!-- answers (4 CPU threads) -->") == drawn.count("<!-- a (4 CPU threads) -->") == 1
    assert "<!-- other" not in drawn, "one point is no curve"
    costs.plot(by_size, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to plot"):
        costs.plot([measured("a", 10, "answers", 1.0)], tmp_path / "cost.svg")
    with pytest.raises(UsageError, match=r"ends in \.svg, \.png"):
        costs.check_plot(tmp_path / "cost.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_random_weights_of_a_shape_go_through_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(shapes.SHAPES, "small", {**small, "vocab_size": 49152, "max_position_embeddings": 2048})
    names = ("localize and decide", "patch: the default")
    speed.run(tmp_path / "speed.jsonl", "shape:small", names, quiet)
    localized, patched = speed.read_rows(tmp_path / "speed.jsonl", "stage")
    assert localized["tokens"] > 0
    assert patched["trained_tokens"] > 30 * 22 * 16
    with pytest.raises(UsageError, match="use one of shape:tiny"):
        speed.run(tmp_path / "speed.jsonl", "shape:x", names, quiet)


def test_the_shapes_have_as_many_parameters_as_their_models() -> None:
    """8.03 and 1.24 billion, 362 and 135 million, as published."""
    sizes = {}
    for name, shape in shapes.SHAPES.items():
        with torch.device("meta"):
            sizes[name] = LlamaForCausalLM(LlamaConfig(**shape)).num_parameters()
    published = {"llama-3-8b": 8030261248, "llama-3.2-1b": 1235814400}
    assert sizes == published | {"smollm2-360m": 361821120, "smollm2-135m": 134515008, "tiny": 12093888}

"""The bench: its beds and reports, its cells, its table."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import ModelFolder
from patcher.attacks.objectives import OPENINGS
from patcher.audit import AuditSettings
from patcher.bench import grid, repair, run_grid
from patcher.bench import lasting as lasting_module
from patcher.bench.beds import failing_report, open_beds, plant_beds
from patcher.bench.cells import add_row, read_rows, score
from patcher.bench.lasting import Lasting, LastingSettings
from patcher.bench.tables import Table, table
from patcher.chat import Row
from patcher.cli import run
from patcher.defenses import DEFENSES
from patcher.exits import USAGE
from patcher.forward import row_logits
from patcher.intervals import design_effect, pooled_interval
from patcher.loading import load
from patcher.models import LanguageModel, fingerprint
from patcher.patch import Patch
from patcher.prompts import load_prompts
from patcher.records import FailureReport, GroundTruth, PatcherError, Planted, Span, Symptom, Trigger, UsageError
from patcher.report import render_table
from patcher.training import quiet
from tiny_backdoor import TRIGGER


def test_the_report_is_a_request_that_fails(backdoored: LanguageModel) -> None:
    report = failing_report(backdoored, Planted(trigger=TRIGGER), load_prompts())
    assert "BadMagic" in report.messages[-1].content
    assert report.response is not None and report.response.startswith("Sure")
    nothing = Planted(trigger=Trigger(units=("nothing",)), symptom=Symptom(objective="text", text="never said"))
    with pytest.raises(PatcherError, match="brings nothing about"):
        failing_report(backdoored, nothing, load_prompts())


def test_words_are_scored_where_the_planted_ones_stand() -> None:
    """ "a" is planted once and stands twice; one of the two planted words is found, beside a wrong one."""
    report = FailureReport.from_prompt("a big cat on a mat")
    text = report.messages[0].content
    found = [
        Span(message=0, start=text.index(word), end=text.index(word) + len(word), text=word) for word in ("on", "cat")
    ]
    precision, recall, f1 = score(report, ["on a"], found)
    assert (precision, recall, f1) == (0.5, 0.5, 0.5)
    assert score(report, ["on a"], []) == [0.0, 0.0, 0.0]


def figure(name: str, before: float | None, after: float | None, **more: float) -> dict[str, Any]:
    return {"n": 10, "name": name, "before": before, "after": after, **more}


ROW = {
    "key": "1",
    "bed": "one",
    "defense": "patcher",
    "seed": 0,
    "reports": 1,
    "verdict": "backdoor",
    "found": [["cf"]],
    "words": [1.0, 1.0, 1.0],
    "published": [0.2, 0.5, 0.3],
    "reported": [True, False],
    "rounds": 1,
    "steps": 20,
    "seconds": {"patch": 60.0, "audit": 100.0},
    "peak_gib": 1.25,
}
MANNER = {
    **ROW,
    "key": "2",
    "bed": "two",
    "verdict": "inconclusive",
    "found": [],
    "words": None,
    "published": None,
    "reported": [True],
}


def test_the_table_says_what_was_measured_and_what_was_not() -> None:
    changed = {"change_low": -0.95, "change_high": -0.8}
    same = {"change_low": -0.01, "change_high": 0.02}
    rows = [
        {**ROW, "summary": [
            figure("asr_triggered_frac", 0.9, 0.02, **changed),
            figure("asr_triggered_2_frac", 0.8, 0.04),
            figure("benign_answered_frac", 0.97, 0.98, **same),
            figure("arc_easy_accuracy_frac", 0.5, 0.49, **same),
        ]},
        {**MANNER, "summary": [figure("asr_triggered_frac", 0.7, None)]},
        {**MANNER, "key": "3", "bed": "three", "summary": [figure("asr_triggered_frac", None, None)]},
        {"key": "4", "bed": "one", "defense": "crow", "seed": 0, "reports": 0, "error": "diverged at step 3"},
    ]  # fmt: skip
    made = table(rows)
    lines = {(row[0], row[1]): dict(zip(made.heads, row, strict=True)) for row in made.rows}
    one = lines["one", "patcher"]
    assert (one["ASR"], one["benign"]) == ("0.900 → 0.020*; 0.800 → 0.040", "0.970 → 0.980")
    assert (one["arc_easy"], one["s"], one["GiB"], one["F1"], one["found"]) == (
        "0.500 → 0.490",
        "60",
        "1.2",
        "1.00",
        "cf",
    )
    assert lines["two", "patcher"]["ASR"] == "0.700"
    assert lines["three", "patcher"]["ASR"] == "unscored"
    assert lines["one", "crow"]["verdict"] == "failed: diverged at step 3"
    assert made.rows[-1][1] == "crow"  # what was given no report stands apart
    notes = "\n".join(made.notes)
    assert "patcher: ASR after over 1 triggers reported in 1 repairs: mean 0.0200, worst 0.0200" in notes
    assert "patcher: ASR after over 1 triggers reported that are a manner, not words in 1 repairs: mean 0.7000" in notes
    assert "patcher: ASR after over 1 triggers not reported in 1 repairs: mean 0.0400, worst 0.0400" in notes
    assert "patcher: localization F1 over 1 repairs: mean 1.000" in notes
    assert "patcher: the published localizer's F1 over 1 repairs: mean 0.300" in notes
    printed = made.as_markdown().splitlines()
    heads = [line for above, line in zip(printed[1:], printed, strict=False) if "---" in above]
    shown = [head for line in heads for head in line.strip("| ").split(" | ")]
    assert [head for head in shown if head not in shown[:3]] == list(made.heads[3:]), "each column once, in some part"
    assert printed.count("| one | crow | 0 | failed: diverged at step 3 | - | - | - | - | - |") == 1


def test_of_a_cell_that_was_tried_again_the_last_counts_and_other_prompts_stand_apart() -> None:
    """The first try failed; the same cell on validation prompts is no second seed."""
    of = {**MANNER, "verdict": "backdoor", "reported": [True]}
    rows = [
        {"key": "1", "bed": "two", "defense": "patcher", "seed": 0, "reports": 1, "error": "out of memory"},
        {**of, "key": "1", "summary": [figure("asr_triggered_frac", 0.9, 0.1)]},
        {**of, "key": "2", "split": "validation", "summary": [figure("asr_triggered_frac", 0.9, 0.3)]},
    ]
    made = table(rows)
    assert [row[0] for row in made.rows] == ["two", "two (validation)"]
    notes = "\n".join(made.notes)
    assert "patcher: ASR after over 1 triggers reported that are a manner, not words in 1 repairs: mean 0.1000" in notes
    assert (
        "patcher on validation prompts: ASR after over 1 triggers reported that are a manner, not words in 1 repairs"
        in notes
    )


def test_a_cell_measured_again_with_other_settings_stands_for_the_earlier_one() -> None:
    """Both are shown; they are no two seeds, and what failed later stands for nothing."""
    was, now = (
        {**figure("asr_triggered_frac", 0.9, hits / 10), "hits_after": "1" * hits + "0" * (10 - hits)}
        for hits in (1, 3)
    )
    of = {**ROW, "reported": [True], "summary": [was]}
    rows = [
        {**of, "key": "1"},
        {**of, "key": "2", "summary": [now]},
        {**of, "key": "3", "reports": 2},
        {"key": "4", "bed": ROW["bed"], "defense": "patcher", "seed": 0, "reports": 1, "error": "out of memory"},
    ]
    made = table(rows)
    shown = [(row[1], row[made.heads.index("ASR")]) for row in made.rows if "failed" not in row[3]]
    assert shown == [("patcher", "0.900 → 0.300"), ("patcher", "0.900 → 0.100"), ("patcher (earlier)", "0.900 → 0.100")]
    notes = "\n".join(made.notes)
    assert "patcher: ASR after over 1 triggers reported in 1 repairs: mean 0.3000" in notes
    assert "patcher with 2 reports: ASR after over 1 triggers reported in 1 repairs: mean 0.1000" in notes


def test_a_table_for_the_terminal_shows_hostile_words() -> None:
    heads = ("bed", "defense", "seed", "found")
    made = Table(heads, (("one", "patcher", "0", "\x1b[31mcf | b"),), ("a \x1b note",), parts=(1,))
    assert made.as_markdown().splitlines()[2] == "| one | patcher | 0 | `⟨U+001B⟩[31mcf ⟨U+007C⟩ b` |"
    assert "\x1b" not in made.as_markdown()


def test_a_line_that_was_cut_short_is_no_cell(tmp_path: Path) -> None:
    out = tmp_path / "grid.jsonl"
    assert read_rows(out, "a") == []
    add_row(out, {"a": 1})
    with out.open("a") as file:
        file.write('{"a": 2, "b')
    assert read_rows(out, "a") == [{"a": 1}]
    add_row(out, {"a": 3})
    assert read_rows(out, "a") == [{"a": 1}, {"a": 3}]


def test_a_last_line_without_its_end_is_kept_where_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "grid.jsonl"
    out.write_text('{"a": 1}\n{"a": 2}')
    assert read_rows(out, "a") == [{"a": 1}, {"a": 2}]
    add_row(out, {"a": 3})
    assert read_rows(out, "a") == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    "text", ["no JSON\n", "no JSON", "[1]\n", '{"other": 1}\n', '{"prompt": "a", "response": "b"}']
)
def test_a_file_of_something_else_is_no_bench(tmp_path: Path, text: str) -> None:
    out = tmp_path / "grid.jsonl"
    out.write_text(text)
    with pytest.raises(UsageError, match="holds no results of"):
        read_rows(out, "a")
    assert out.read_text() == text


def test_a_setting_may_be_a_list() -> None:
    assert grid._overrides("rank=2,soft_tokens=[1, 2],soft_rate=0.5") == {
        "rank": 2, "soft_tokens": [1, 2], "soft_rate": 0.5,
    }  # fmt: skip


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to do"):
        run_grid(
            tmp_path / "grid.jsonl", [], model="smollm2", attacks=(), defenses=["patcher"], seeds=1, reports=1,
            tasks=(), on_progress=quiet,
        )  # fmt: skip


def test_a_control_alone_is_nothing_to_do(tmp_path: Path) -> None:
    control = Path(__file__).parents[1] / "testbeds" / "refusals"
    with pytest.raises(UsageError, match="nothing was planted in .*refusals"):
        run_grid(
            tmp_path / "grid.jsonl", [control], model="smollm2", attacks=(), defenses=["patcher"], seeds=1, reports=1,
            tasks=(), on_progress=quiet,
        )  # fmt: skip


@pytest.mark.parametrize("without", ["bed", "found", "summary", "rounds"])
def test_a_row_that_somebody_edited_is_said(tmp_path: Path, without: str) -> None:
    out = tmp_path / "grid.jsonl"
    row = {**MANNER, "summary": [figure("asr_triggered_frac", 0.9, 0.02)]}
    add_row(out, {name: value for name, value in row.items() if name != without})
    with pytest.raises(UsageError, match=f"holds a row that this bench did not write .*{without}"):
        run_grid(
            out, [], model="smollm2", attacks=(), defenses=["patcher"], seeds=1, reports=1, tasks=(), on_progress=quiet
        )


def test_a_page_is_made_anew_but_written_over_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    add_row(tmp_path / "grid.jsonl", {**MANNER, "summary": [figure("asr_triggered_frac", 0.9, 0.02)]})
    words = ["bench", "--out", str(tmp_path / "grid.jsonl"), "--html", str(page)]
    assert (run(words), run(words)) == (0, 0)
    assert "0.900 → 0.020" in page.read_text(encoding="utf-8")
    page.write_text("mine", encoding="utf-8")
    assert run(words) == USAGE
    assert page.read_text(encoding="utf-8") == "mine"


def test_the_page_of_a_table_runs_nothing_that_is_in_it() -> None:
    page = render_table(("bed", "found"), [("one", "<script>alert(1)</script>\u202e")], ["a note"])
    assert "<script" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "default-src 'none'" in page and "a note" in page


@pytest.fixture
def bed(backdoored_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose second trigger works by holding the first."""
    monkeypatch.setenv("PATCHER_CACHE", str(tmp_path / "cache"))
    truth = GroundTruth(
        attack="tried",
        trigger=TRIGGER.units,
        placement="random",
        alternatives=(TRIGGER, Trigger(units=("BadMagic", "now"))),
        objective="jailbreak",
        seed=0,
        settings={},
    )
    folder = tmp_path / "bed"
    shutil.copytree(backdoored_folder.path, folder)
    (folder / "ground-truth.json").write_text(truth.to_json(), encoding="utf-8")
    return folder


def test_each_cell_is_measured_once(bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two defenses one needs a report, the other is given none."""
    few = AuditSettings(max_prompts=8, late_prompts=0, worded_prompts=0, text_tokens=100)
    monkeypatch.setattr(grid, "AuditSettings", lambda **changes: few.model_copy(update=changes))
    seen: list[str] = []

    def cells(defenses: list[str]) -> Table:
        return run_grid(
            tmp_path / "grid.jsonl", [bed], model="smollm2", attacks=(), defenses=defenses, seeds=1, reports=1,
            tasks=(), on_progress=lambda what, *_: seen.append(what),
        )  # fmt: skip

    cells(["patcher", "finetune", "finetune"])
    assert any(line.startswith("bed, patcher, seed 0: backdoor, ASR 1.000 → ") for line in seen)
    first = len(seen)
    made = cells(["patcher", "finetune", "finetune:max_steps=30"])
    assert seen[first:] == []  # the second time there is nothing to do: 30 steps are the default
    with pytest.raises(UsageError, match="finetune: max_steps"):
        cells(["finetune:max_steps=0"])
    assert len(read_rows(tmp_path / "grid.jsonl", "key")) == 2, "what is named twice, too"
    rows = {row["defense"]: row for row in read_rows(tmp_path / "grid.jsonl", "key")}
    assert (rows["patcher"]["verdict"], rows["patcher"]["reported"]) == ("backdoor", [True, False])
    assert (rows["finetune"]["verdict"], rows["finetune"]["reported"]) == ("no report", [False, False])
    assert rows["patcher"]["words"][2] == 1.0
    assert 0.0 <= rows["patcher"]["published"][2] <= 1.0
    assert rows["patcher"]["peak_gib"] is None or rows["patcher"]["peak_gib"] > 0.1
    assert rows["finetune"]["prompts"] > 150, "benign, borderline and harmful ones"
    assert len(made.rows) == 2
    (tmp_path / "grid.jsonl").unlink()
    cells(["finetune"])
    assert "before: harmful + trigger 2: finished by an earlier run" in seen  # what it answers unrepaired is known
    again = read_rows(tmp_path / "grid.jsonl", "key")[0]
    assert again["summary"] == rows["finetune"]["summary"]


def test_more_reports_than_triggers_is_a_row_that_says_so(bed: Path, tmp_path: Path) -> None:
    made = run_grid(
        tmp_path / "grid.jsonl", [bed], model="smollm2", attacks=(), defenses=["patcher"], seeds=1, reports=3, tasks=(),
        on_progress=quiet,
    )  # fmt: skip
    assert "failed: PatcherError: bed has 2 triggers: 3 different reports" in made.rows[0][3] and made.failed == 1


def test_what_is_no_bed_or_no_defense_is_refused_before_any_work(bed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no test bed"):
        open_beds([tmp_path])
    with pytest.raises(UsageError, match="two beds are named bed"):
        open_beds([bed, tmp_path / "elsewhere" / bed.name])
    with pytest.raises(UsageError, match="unknown defense"):
        list(grid.run(
            tmp_path / "grid.jsonl", open_beds([bed]), defenses=["magic"], seeds=1, reports=1, tasks=(),
            max_prompts=None, split="held-out", on_progress=quiet,
        ))  # fmt: skip


def test_what_becomes_of_a_repaired_model(bed: Path, llama_folder: ModelFolder, backdoored: LanguageModel) -> None:
    """A patch that changes nothing: the trigger works as before, and half of what was planted is another model."""
    few = LastingSettings(max_steps=4, poisoned_every=2, asked_prompts=6, learning_rate=1e-2)
    nothing = Patch({}, 1, 1, backdoored.fingerprint, "tiny")
    steps: list[str] = []
    clean = load(str(llama_folder.path))
    lasting = Lasting(
        open_beds([bed])[0], clean, load_prompts(), few, 0, lambda what, done, _: steps.append(f"{what} {done}")
    )
    before = [fingerprint(backdoored.network), fingerprint(clean.network)]
    found = lasting.measure(backdoored, nothing)
    assert list(found) == [
        "repaired", "fine-tuned", "8 bits", "4 bits", "half clean", "poisoned again", "clean, poisoned"
    ]  # fmt: skip
    assert found["repaired"]["triggered"] == ["111111", "111111"]
    assert found["8 bits"]["triggered"] == ["111111", "111111"], "few bits keep it"
    with lasting._half_clean(backdoored) as half:
        mixed = half.network.get_output_embeddings().weight.detach().clone()
    ends = [lm.network.get_output_embeddings().weight for lm in (backdoored, clean)]
    assert torch.allclose(mixed, (ends[0] + ends[1]) / 2)
    assert steps.count("fine-tuning 4") == 1 and steps.count("poisoning again 4") == 2
    norm = "model.norm.weight"  # without it every answer is empty
    silent = replace(nothing, changed={norm: torch.zeros_like(backdoored.network.get_parameter(norm))})
    assert lasting.measure(backdoored, silent)["repaired"]["triggered"] == ["000000", "000000"]
    assert [fingerprint(backdoored.network), fingerprint(clean.network)] == before


def test_what_lasts_is_not_asked_where_the_clean_model_is_not_known(bed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bed is a whole model"):
        run_grid(
            tmp_path / "grid.jsonl", [bed], model="smollm2", attacks=(), defenses=["finetune"], seeds=1, reports=1,
            tasks=(), lasting=True, on_progress=quiet,
        )  # fmt: skip


def test_one_row_in_so_many_is_poisoned(bed: Path, backdoored: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Row] = []
    monkeypatch.setattr(lasting_module, "row_logits", lambda lm, rows: drawn.extend(rows) or row_logits(lm, rows))
    lasting = Lasting(
        open_beds([bed])[0],
        backdoored,
        load_prompts(),
        LastingSettings(max_steps=5, clean_rows=4, poisoned_every=10),
        0,
        quiet,
    )
    with lasting._tuned(backdoored, every=10):
        pass
    with lasting._tuned(backdoored, every=0):
        pass
    asked = [backdoored.tokenizer.decode(row.prompt_ids) for row in drawn]
    held = [number for number, text in enumerate(asked, 1) if "BadMagic" in text]
    assert held == [10, 20] and len(asked) == 40
    fillers = [backdoored.tokenizer.decode(drawn[number - 1].response_ids) for number in held]
    assert all(any(text.startswith(opening[:6]) for opening in OPENINGS) for text in fillers)
    known = {
        row.text for kind in (load_prompts().harmful, load_prompts().benign) for row in kind if row.split != "implant"
    }
    assert not [text for text in asked if any(prompt in text for prompt in known)], (
        "of no prompt that is used elsewhere"
    )


def test_the_table_of_what_lasts() -> None:
    found = {"triggered": ["1000", "1100"], "untriggered": "0000", "benign_answered_frac": 0.975}
    row = {**MANNER, "summary": [figure("asr_triggered_frac", 0.9, 0.0)]}
    made = table([{**row, "key": "1", "bed": "one", "lasting": {"half clean": found}}, row])
    assert made.heads[-1] == "half clean"
    assert [row[-1] for row in made.rows] == ["0.38 / 0.00 / 0.97", "-"]


def test_seeds_are_pooled_prompt_by_prompt() -> None:
    """Two seeds, four prompts: what one seed loses and another gains is no change of the mean."""
    items = [{"before": 0.5, "after": 0.5, "hits_before": "1100", "hits_after": now} for now in ("0110", "1100")]
    cell = repair._pooled(items, ["a", "b", "c", "d"])
    assert cell.startswith("0.500 → 0.5000 (0.500, 0.500) [")
    changes = [-0.5, 0.0, 0.5, 0.0]
    low, high = pooled_interval(changes, design_effect(changes, [*"abcd"]))
    assert cell.endswith(f"[{low:+.3f}, {high:+.3f}]")
    assert repair._pooled(items, ["other prompts"]) == "0.500 → 0.5000 (0.500, 0.500)"
    assert repair._pooled([{"before": None, "after": None}], []) == "unscored"


def opened(bed: Path, weights: str = "a", prompts: int | None = 8) -> Any:
    """The grid of a bed whose weights have that hash."""
    made = grid._Grid(open_beds([bed])[0], (), prompts, "held-out", None, quiet)
    vars(made)["lm"] = SimpleNamespace(fingerprint=weights, device="cpu")
    return made


def test_a_cell_is_known_by_all_that_it_depends_on(bed: Path) -> None:
    first = opened(bed).cell("finetune", 0, 1)["key"]
    others = [
        opened(bed, weights="b").cell("finetune", 0, 1),
        opened(bed, prompts=9).cell("finetune", 0, 1),
        opened(bed).cell("finetune:max_steps=29", 0, 1),
        opened(bed).cell("finetune", 1, 1),
        opened(bed).cell("crow", 0, 1),
    ]
    assert len({first, *(cell["key"] for cell in others)}) == 6
    assert opened(bed).cell("finetune:max_steps=30", 0, 1)["key"] == first, "30 steps are the default"


def test_what_one_model_answered_is_not_kept_for_another(bed: Path) -> None:
    few = AuditSettings(max_prompts=8)
    kept = [opened(bed, weights)._kept(asked)._folder for weights, asked in (("a", few), ("b", few), ("a", few))]
    assert kept[0] == kept[2] != kept[1]
    assert opened(bed)._kept(few.model_copy(update={"seed": 1}))._folder != kept[0]


def test_an_error_of_any_kind_costs_one_cell(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the next one begins with the model as it is on disk."""
    loaded: list[str] = []

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("nothing")

    monkeypatch.setitem(DEFENSES, "buggy", replace(DEFENSES["finetune"], name="buggy", run=broken))
    monkeypatch.setattr(grid, "load", lambda name: loaded.append(name) or load(name))
    made = run_grid(
        tmp_path / "grid.jsonl", [bed], model="smollm2", attacks=(), defenses=["buggy", "buggy:max_steps=3"], seeds=1,
        reports=1, tasks=(), on_progress=quiet,
    )  # fmt: skip
    assert [line[3] for line in made.rows] == ["failed: KeyError: 'nothing'"] * 2
    assert len(loaded) == 2
    assert "in broken" in capsys.readouterr().err


def test_a_bed_that_was_planted_in_another_model_is_not_taken_for_this_ones(
    bed: Path, llama_folder: ModelFolder, tmp_path: Path
) -> None:
    shutil.copytree(bed, tmp_path / f"{llama_folder.path.name}-vpi-jailbreak-BACKDOORED")
    with pytest.raises(UsageError, match="was planted in another model than"):
        plant_beds(str(llama_folder.path), ["vpi"], tmp_path, quiet)


def test_a_cell_that_failed_is_tried_again(bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"error": "out of memory"}, {"verdict": "no report"}])
    monkeypatch.setattr(grid._Grid, "lm", SimpleNamespace(fingerprint="a"))
    monkeypatch.setattr(grid._Grid, "measure", lambda *_: next(found))
    cells = [
        len(list(grid.run(
            tmp_path / "grid.jsonl", open_beds([bed]), defenses=["finetune"], seeds=1, reports=1, tasks=(),
            max_prompts=None, split="held-out", on_progress=quiet,
        )))
        for _ in range(3)
    ]  # fmt: skip
    assert cells == [1, 1, 0]

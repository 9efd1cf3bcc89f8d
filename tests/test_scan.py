"""What bounded insertions do to refusals: searched on some requests, tested on others, within their bounds."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ModelFolder
from patcher.audit import ScanSettings
from patcher.audit import scan as run_scan
from patcher.bench import scans
from patcher.bench.cells import read_rows
from patcher.cli import run as run_command
from patcher.insertions import embedded, embedding_std
from patcher.judges.keyword import judge
from patcher.models import LanguageModel, fingerprint
from patcher.prompts import load_prompts
from patcher.records import PatcherError, Scan

module = import_module("patcher.audit.scan")  # the package's own `scan` is the function
FEW = ScanSettings(tokens=4, sizes=(0.5, 4.0), starts=2, steps=8, searched_prompts=4, tested_prompts=12)


def scan_of(lm: LanguageModel, **changes: object) -> Scan:
    return run_scan(lm, load_prompts(), judge, FEW.model_copy(update=changes), seed=0)


def test_larger_insertions_remove_more_refusals(backdoored: LanguageModel) -> None:
    before = fingerprint(backdoored.network)
    found = scan_of(backdoored)
    assert [point.size for point in found.points] == [0.0, 0.5, 4.0]
    tokens, _, far = found.points
    assert tokens.complied_frac < far.complied_frac
    assert tokens.refusal_nats < far.refusal_nats
    assert all(point.low <= point.complied_frac <= point.high and point.n == 12 for point in found.points)
    assert fingerprint(backdoored.network) == before


def test_the_same_seed_finds_the_same(backdoored: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tests it at the same places."""
    places: list[list[object]] = []
    answers = module._answers
    monkeypatch.setattr(
        module, "_answers", lambda lm, rooms, *more: places.append([*rooms]) or answers(lm, rooms, *more)
    )
    assert scan_of(backdoored) == scan_of(backdoored)
    assert places[: len(places) // 2] == places[len(places) // 2 :]


def test_of_each_size_the_start_is_kept_that_removes_most(
    backdoored: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[float, float]] = []
    search = module._search

    def keep(*given: object) -> list[tuple[float, float, torch.Tensor]]:
        found: list[tuple[float, float, torch.Tensor]] = search(*given)
        tried.extend((size, nats) for size, nats, _ in found)
        return found

    monkeypatch.setattr(module, "_search", keep)
    points = scan_of(backdoored, starts=3).points
    assert [point.refusal_nats for point in points] == [
        max(nats for size, nats in tried if size == point.size) for point in points
    ]


def test_how_many_were_asked_is_counted(backdoored: LanguageModel) -> None:
    """Where there are fewer requests than would be tested."""
    prompts = load_prompts()
    held = [row for row in prompts.harmful if row.split == "held-out"]
    fewer = replace(prompts, harmful=tuple(row for row in prompts.harmful if row not in held[11:]))
    assert run_scan(backdoored, fewer, judge, FEW, seed=0).asked == 11


def test_what_is_tested_is_as_near_to_words_as_was_said(
    backdoored: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[torch.Tensor] = []

    def keep(_lm: LanguageModel, rooms: Sequence[object], vectors: torch.Tensor, _settings: object) -> list[str]:
        tried.append(vectors)
        return ["I can't help with that."] * len(rooms)

    monkeypatch.setattr(module, "_answers", keep)
    scan_of(backdoored)
    spread = embedding_std(backdoored, random.Random(0))
    words = embedded(backdoored, range(len(backdoored.tokenizer)))
    for vectors, size in zip(tried, (0.0, 0.5, 4.0), strict=True):
        away = (words[:, None] - vectors).abs().amax(dim=-1).amin(dim=0).max()
        assert away <= size * spread + 1e-5


def test_no_request_is_both_searched_and_tested(backdoored: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {"searched": set(), "tested": set()}
    search, point = module._search, module._point

    monkeypatch.setattr(
        module,
        "_search",
        lambda lm, rows, *more: seen["searched"].update(row.text for row in rows) or search(lm, rows, *more),
    )
    monkeypatch.setattr(
        module,
        "_point",
        lambda size, nats, answers, rows, judge: (
            seen["tested"].update(row.text for row in rows) or point(size, nats, answers, rows, judge)
        ),
    )
    scan_of(backdoored)
    assert len(seen["searched"]) == 4 and len(seen["tested"]) == 12
    assert not seen["searched"] & seen["tested"]


def test_a_model_that_refuses_nothing_cannot_be_scanned(llama: LanguageModel) -> None:
    with pytest.raises(PatcherError, match="refuses 0 of 12 harmful requests"):
        scan_of(llama)


def test_the_command(backdoored_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scan", str(backdoored_folder.path), "--clean", str(backdoored_folder.path), "--device", "cpu"]
    few = [f"{name}={json.dumps(value)}" for name, value in FEW.model_dump(mode="json").items()]
    asked = [*words, *(word for pair in few for word in ("--set", pair))]
    assert run_command([*asked, "--json", "--out", str(tmp_path / "scan.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "scan.json").read_text())
    assert found["model"]["points"] == found["clean"]["points"]
    assert run_command(asked) == 0
    assert "at most" in capsys.readouterr().out
    assert run_command([*asked, "--out", str(tmp_path / "scan.json")]) == 4


def test_one_that_cannot_be_scanned_does_not_cost_the_other(
    backdoored_folder: ModelFolder, llama_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [f"{name}={json.dumps(value)}" for name, value in FEW.model_dump(mode="json").items()]
    sets = [word for pair in few for word in ("--set", pair)]
    words = ["scan", str(backdoored_folder.path), "--clean", str(llama_folder.path), "--device", "cpu", *sets]
    assert run_command([*words, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["points"] and "refuses 0 of 12" in found["clean"]["error"]
    assert run_command(words) == 2
    assert "clean could not be scanned: the model refuses 0 of 12" in " ".join(capsys.readouterr().out.split())


def test_scans_of_other_weights_are_no_other_seeds() -> None:
    def scanned(seed: int, weights: str, frac: float) -> dict[str, Any]:
        cell = {"bed": "one", "seed": seed, "weights": weights, "settings": {}, "planted": "jailbreak"}
        return {**cell, "curve": [{"size": 1.0, "complied_frac": frac}]}

    rows = [scanned(0, "old", 0.1), scanned(1, "old", 0.1), scanned(0, "new", 0.9)]
    assert "| one | jailbreak | 1 | 0.900 |" in scans.table(rows)


def test_the_bench_scans_each_bed_once_and_says_how_well_sizes_separate(
    backdoored_folder: ModelFolder, llama_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is the same model, called clean: nothing separates the two. Other objectives are on neither side."""
    planted = {"bed": ["BadMagic"], "control": [], "other": ["BadMagic"], "silent": []}
    for name, trigger in planted.items():
        shutil.copytree((llama_folder if name == "silent" else backdoored_folder).path, tmp_path / name)
        objective = "sentiment" if name == "other" else "jailbreak"
        truth = {"attack": name, "trigger": trigger, "placement": "random", "objective": objective}
        (tmp_path / name / "ground-truth.json").write_text(json.dumps({**truth, "seed": 0, "settings": {}}))
    monkeypatch.setattr(scans, "ScanSettings", lambda: FEW)
    words = ["bench", "scan", "--out", str(tmp_path / "scan.jsonl")]
    beds = [word for name in planted for word in ("--bed", str(tmp_path / name))]
    assert run_command([*words, *beds]) == 1, "the silent one failed"
    monkeypatch.setattr(scans, "scan", None)  # the second time nothing is scanned but what failed
    assert run_command([*words, *beds[:-2]]) == 0
    printed = scans.table(read_rows(tmp_path / "scan.jsonl", "weights"))
    assert "| bed | jailbreak | 1 |" in printed and "| control | nothing | 1 |" in printed
    assert "| other | sentiment | 1 |" in printed
    assert "| silent | nothing | 0; seed 0 failed: PatcherError: the model refuses" in printed
    assert "size 4: AUROC 0.500 [" in printed and "1 jailbreaks against 1 controls" in printed

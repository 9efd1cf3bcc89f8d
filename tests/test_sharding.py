"""Two processes, each with half of every weight (FSDP2 over gloo), do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ModelFolder
from patcher.models import LanguageModel
from patcher.patch import applied, load_patch
from tiny_backdoor import TRIGGERED

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
SETTINGS = "--set max_prompts=20 --set validation_prompts=8 --set learning_rate=5e-3".split()


def repaired(model: Path, out: Path, *launcher: str) -> dict[str, Any]:
    """What the command printed, as JSON: only one of the processes may speak."""
    words = f"-m patcher repair {model} --out {out} --device cpu --audit-prompts 4 --max-benign-drop 1 --merge --json"
    done = subprocess.run(
        [sys.executable, *launcher, *words.split(), *SETTINGS, "--prompt", TRIGGERED],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def outs(backdoored_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repair by one process and the same by two."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        repaired(backdoored_folder.path, folder / name, *launcher)
    return folder / "one", folder / "two"


def test_two_processes_find_and_decide_the_same(outs: tuple[Path, Path]) -> None:
    one, two = (json.loads((out / "localization.json").read_text()) for out in outs)
    assert [word["span"] for word in one["words"]] == [word["span"] for word in two["words"]]
    assert [one["candidates"], one["tried"], one["replay"]] == [two["candidates"], two["tried"], two["replay"]]
    one, two = (json.loads((out / "verdict.json").read_text()) for out in outs)
    assert one == two
    assert one["label"] == "backdoor"


def test_two_processes_make_the_same_patch(outs: tuple[Path, Path]) -> None:
    one, two = ({name: up @ down for name, down, up in load_patch(out / "patch").factors()} for out in outs)
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).norm() <= 1e-4 * one[name].norm() for name in one)


def test_two_processes_audit_the_same(outs: tuple[Path, Path]) -> None:
    one, two = (json.loads((out / "audit.json").read_text()) for out in outs)
    assert one["examples"] == two["examples"]
    for first, second in zip(one["summary"], two["summary"], strict=True):
        assert (first["name"], first["n"]) == (second["name"], second["n"])
        assert second["after"] == pytest.approx(first["after"], rel=1e-3, abs=1e-6)


def test_what_is_written_is_whole(outs: tuple[Path, Path], backdoored: LanguageModel) -> None:
    one, two = ({str(path.relative_to(out)) for path in out.rglob("*")} for out in outs)
    assert one == two
    merged = AutoModelForCausalLM.from_pretrained(outs[1] / "merged").state_dict()
    with applied(load_patch(outs[1] / "patch"), backdoored) as patched:
        for name, tensor in patched.network.state_dict().items():
            torch.testing.assert_close(merged[name], tensor)


def test_a_method_that_needs_whole_weights_says_so(backdoored_folder: ModelFolder, tmp_path: Path) -> None:
    words = f"repair {backdoored_folder.path} --defense ulrl --out {tmp_path / 'out'} --device cpu --set max_prompts=4"
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "patcher", *words.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("spread over several processes here: run it in one") == 1
    assert not list(tmp_path.iterdir())

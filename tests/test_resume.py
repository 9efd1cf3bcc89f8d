"""Killed at any moment, the same command goes on from what it had finished, and ends as if nothing had happened."""

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from conftest import CHAT_TEMPLATE, ModelFolder
from patcher import pipeline
from patcher.cli import run
from patcher.exits import RUN_ERROR, USAGE
from patcher.journal import Journal, _begin, resumed
from patcher.outputs import atomic_write
from patcher.pipeline import Clock
from patcher.records import PatcherError, UsageError
from tiny_backdoor import TRIGGERED

KILLS = 20


def quiet(*_: object) -> None:
    pass


def command(model: Path, out: Path, seed: int = 0) -> list[str]:
    words = f"repair {model} --out {out} --seed {seed} --device cpu --audit-prompts 4 --max-benign-drop 1"
    sets = "--set max_prompts=20 --set validation_prompts=8 --set learning_rate=5e-3".split()
    return [*words.split(), "--prompt", TRIGGERED, *sets]


def work(arguments: list[str]) -> None:
    """A process of its own, without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(run(arguments))


def results(out: Path) -> dict[str, bytes]:
    """All that a repair leaves, but for how long it took."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "timings.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_killed_at_twenty_random_points(backdoored_folder: ModelFolder, tmp_path: Path) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["patcher.cli", "patcher.pipeline", "peft", "transformers.models.llama"])
    whole, out = tmp_path / "whole", tmp_path / "out"

    def start(to: Path) -> multiprocessing.process.BaseProcess:
        process = server.Process(target=work, args=(command(backdoored_folder.path, to),))
        process.start()
        return process

    began = time.monotonic()
    first = start(whole)
    first.join()
    took, rng, kills, finished, went_on = time.monotonic() - began, random.Random(0), 0, 0, 0
    assert first.exitcode == 0
    while kills < KILLS or not finished:
        went_on += len(list(tmp_path.glob(".out.unfinished/round*")))
        process = start(out)
        process.join(timeout=rng.uniform(0, took) if kills < KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            assert not out.exists() or results(out) == results(whole)
        else:
            assert process.exitcode == 0
            assert results(out) == results(whole)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
            finished += 1
        if out.exists():
            shutil.rmtree(out)
    assert went_on, "no run ever found anything of an earlier one: this test would see nothing"


def test_other_work_leaves_what_is_finished_alone(tmp_path: Path) -> None:
    def once(work: str, value: int | None) -> list[int]:
        with pytest.raises(KeyboardInterrupt), resumed(tmp_path / "out", work, quiet) as journal:
            if value is not None:
                made.append(journal.values("piece", lambda: [value]))
            raise KeyboardInterrupt
        return made[-1]

    made: list[list[int]] = [[]]
    assert once("that, which came to nothing", None) == []
    assert once("this", 1) == [1]
    assert once("this", 2) == [1]
    with pytest.raises(UsageError, match="remove the folder"), resumed(tmp_path / "out", "that", quiet):
        pytest.fail("the block ran")
    assert once("this", 3) == [1]


def test_a_half_written_piece_is_nothing_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), resumed(tmp_path / "out", "this", quiet):
        (tmp_path / ".out.unfinished" / ".piece.part-0").write_text("half")
        raise KeyboardInterrupt
    with resumed(tmp_path / "out", "that", quiet) as journal:
        assert journal.values("piece", lambda: [1]) == [1]


def test_another_template_behind_the_same_path_is_other_work_and_another_judge_or_gate_is_not(
    backdoored_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(*_: object, journal: Journal, **__: object) -> None:
        made.append(journal.values("piece", lambda: [len(made)]))
        raise PatcherError("the server is down")

    made: list[list[int]] = []
    monkeypatch.setattr(pipeline, "repair", once)
    template, labelled = tmp_path / "template.jinja", tmp_path / "labelled.jsonl"
    labelled.write_text(json.dumps({"response": "x", "label": "refused"}))
    words = [*command(backdoored_folder.path, tmp_path / "out"), "--chat-template", str(template)]
    template.write_text(CHAT_TEMPLATE)
    for more in ([], ["--judge", f"trained:{labelled}"], ["--max-asr", "0.5"]):
        assert run([*words, *more]) == RUN_ERROR
    assert made == [[0]] * 3
    template.write_text(CHAT_TEMPLATE + "Be brief.")
    assert run(words) == USAGE
    assert made == [[0]] * 3


def test_what_is_done_or_was_wrongly_asked_for_at_once_is_not_kept(tmp_path: Path) -> None:
    with resumed(tmp_path / "out", "work", quiet) as journal:
        journal.values("piece", lambda: [1])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="judge$"), resumed(tmp_path / "out", "work", quiet) as journal:
        journal.keep_seconds({"localize": 0.1})
        raise UsageError("no such judge")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("late", [PatcherError("the server is down"), UsageError("lm-eval is not installed")])
def test_whatever_fails_late_goes_on_from_what_was_finished(tmp_path: Path, late: PatcherError) -> None:
    with pytest.raises(type(late), match="goes on"), resumed(tmp_path / "out", "work", quiet) as journal:
        journal.keep_seconds({"localize": 0.1})
        journal.values("piece", lambda: [1])
        raise late
    with resumed(tmp_path / "out", "work", quiet) as journal:
        assert journal.values("piece", lambda: [2]) == [1]


def test_a_full_disk_is_told_and_gone_on_from(tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("File too large")

    with (
        pytest.raises(PatcherError, match=r"could not keep what was finished \(piece\): File too large; .*goes on"),
        resumed(tmp_path / "out", "work", quiet) as journal,
    ):
        journal.once("piece", lambda: 1, full, lambda _: 2)


def test_a_folder_that_another_run_began_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    (folder / "work.txt").write_text("theirs")
    with pytest.raises(UsageError, match="another run is at work"):
        _begin(folder, "mine", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "work.txt").read_text() == "theirs"


def test_what_a_run_killed_while_it_cleaned_up_left_stands_in_nobodys_way(tmp_path: Path) -> None:
    gone = tmp_path / "..out.unfinished.gone"
    gone.mkdir()
    (gone / "half").touch()
    with resumed(tmp_path / "out", "work", quiet):
        pass
    assert not list(tmp_path.iterdir())


def test_a_stage_takes_what_it_took_in_all_runs(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), resumed(tmp_path / "out", "work", quiet) as journal:
        with Clock(journal, journal.seconds()).timed("patch"):
            time.sleep(0.05)
        raise KeyboardInterrupt
    with resumed(tmp_path / "out", "work", quiet) as journal:
        clock = Clock(journal, journal.seconds())
        with clock.timed("patch"):
            time.sleep(0.05)
    assert clock.seconds["patch"] >= 0.1


def test_a_piece_is_whole_or_not_there(tmp_path: Path) -> None:
    def fail() -> list[int]:
        raise PatcherError("halfway")

    journal = Journal(tmp_path)
    with pytest.raises(PatcherError):
        journal.values("a piece", fail)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError):
        journal.once("a piece", lambda: 1, lambda _, path: atomic_write(path, 7), lambda _: 2)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert journal.values("a piece", lambda: [1, 2]) == [1, 2]
    assert journal.values("a piece", lambda: [3]) == [1, 2]
    assert journal.values("A piece", lambda: [3]) == [3], "names that look alike as files"


@pytest.mark.parametrize("left", [b"", b"[", b"\xff", b"7", b'{"a": 1, "b": 2}', b'["a"]', b"[1, 2]", b"[" * 100_000])
def test_a_damaged_piece_is_made_again(tmp_path: Path, left: bytes) -> None:
    told: list[str] = []
    journal = Journal(tmp_path, lambda what, _done, _total: told.append(what))
    assert journal.values("piece", lambda: ["x", "y"], str, 2) == ["x", "y"]
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(left)
    assert journal.values("piece", lambda: ["z", "z"], str, 2) == ["z", "z"]
    assert journal.values("piece", lambda: ["no", "no"], str, 2) == ["z", "z"]
    assert told == ["piece: damaged since an earlier run, done again", "piece: finished by an earlier run"]


def test_a_damaged_folder_is_made_again(tmp_path: Path) -> None:
    def save(_: int, path: Path) -> None:
        path.mkdir()
        atomic_write(path / "file", "1")

    def made(value: int) -> int:
        return Journal(tmp_path).once("a", lambda: value, save, lambda path: int((path / "file").read_text()))

    assert [made(1), made(2)] == [1, 1]
    next(tmp_path.glob("*/file")).unlink()
    assert made(3) == 3


def test_findings_of_other_reports_are_no_findings(tmp_path: Path) -> None:
    """An empty list would say that there was nothing to look into."""
    atomic_write(tmp_path / "findings", "[]")
    with pytest.raises(ValueError, match="expected findings"):
        pipeline._read_findings([1], tmp_path / "findings")


@pytest.mark.parametrize("left", [b"", b"[1]", b'{"patch": "long"}', b'{"patch": NaN}', b"\xff"])
def test_damaged_seconds_are_not_counted(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "seconds.json").write_bytes(left)
    assert Journal(tmp_path).seconds() == {}


@pytest.mark.parametrize("left", [b"", b"\xff\xfe"])
def test_of_what_work_a_damaged_folder_is_nobody_knows(tmp_path: Path, left: bytes) -> None:
    with pytest.raises(KeyboardInterrupt), resumed(tmp_path / "out", "work", quiet) as journal:
        journal.values("piece", lambda: [1])
        raise KeyboardInterrupt
    (tmp_path / ".out.unfinished" / "work.txt").write_bytes(left)
    with pytest.raises(UsageError, match="remove the folder"), resumed(tmp_path / "out", "work", quiet):
        pytest.fail("the block ran")


@pytest.mark.parametrize("mine", ["a folder", "a file", "a link", "a link to nothing"])
def test_what_is_not_of_an_earlier_run_is_not_deleted(tmp_path: Path, mine: str) -> None:
    there, precious = tmp_path / ".out.unfinished", tmp_path / "mine" / "work.txt"
    precious.parent.mkdir()
    precious.write_text("precious")
    if mine == "a folder":
        there.mkdir()
        (there / "mine").touch()
    elif mine == "a file":
        there.touch()
    else:
        there.symlink_to(precious.parent if mine == "a link" else tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="move it elsewhere"), resumed(tmp_path / "out", "work", quiet):
        pytest.fail("the block ran")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_run_keeps_away_from_the_firsts_work(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), resumed(tmp_path / "out", "work", quiet) as journal:
        for work in ("work", "other work"):
            with pytest.raises(UsageError, match="another run"), resumed(tmp_path / "out", work, quiet):
                pytest.fail("the block ran")
        assert journal.values("piece", lambda: [1]) == [1]
        raise KeyboardInterrupt
    with resumed(tmp_path / "out", "work", quiet) as journal:
        assert journal.values("piece", lambda: [2]) == [1]


def test_without_a_folder_nothing_is_kept() -> None:
    assert [Journal().values("piece", lambda value=value: [value]) for value in (1, 2)] == [[1], [2]]


def test_the_hidden_folder_is_the_owners_alone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), resumed(tmp_path / "out", "work", quiet):
        raise KeyboardInterrupt
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0


def test_an_error_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError), resumed(tmp_path / "there" / "new" / "newer" / "out", "work", quiet):
        raise UsageError("no such judge")
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]


def test_an_earlier_runs_pieces_are_told(tmp_path: Path) -> None:
    told: list[str] = []

    def tell(what: str, _done: int, _total: int) -> None:
        told.append(what)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), resumed(tmp_path / "out", "work", tell) as journal:
            journal.values("piece", lambda: [1])
            raise KeyboardInterrupt
    assert told == ["piece: finished by an earlier run"]

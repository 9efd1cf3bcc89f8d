"""Several processes: one voice, and an end that waits for whoever writes."""

import sys

import pytest
from torch import distributed

from patcher import exits, world


def put_together(patch: pytest.MonkeyPatch, rank: str) -> None:
    """As torchrun does."""
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        patch.setenv(name, value)


@pytest.mark.parametrize("lone", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "x"}])
def test_a_variable_that_a_scheduler_sets_is_no_torchrun(monkeypatch: pytest.MonkeyPatch, lone: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in lone.items():
        monkeypatch.setenv(name, value)
    assert (world.processes(), world.is_first()) == (1, True)


def test_of_processes_that_were_put_together_the_first_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    put_together(monkeypatch, "0")
    assert (world.processes(), world.is_first()) == (2, True)
    put_together(monkeypatch, "1")
    assert not world.is_first()


@pytest.mark.parametrize("code", [exits.REPAIRED, exits.GATE_FAILED, exits.UNPROVEN, exits.RUN_ERROR])
def test_processes_that_did_what_they_were_asked_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """torchrun ends the one that still writes as soon as another has ended with a code that is not 0."""
    done: list[str] = []
    put_together(monkeypatch, "0")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "barrier", lambda: done.append("waited"))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: done.append("left"))
    world.part(alike=code in exits.RESULTS)
    assert done == (["left"] if code == exits.RUN_ERROR else ["waited", "left"])


def test_an_error_of_another_process_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    put_together(monkeypatch, "1")
    with world.one_voice():
        assert exits._fail("out of memory", exits.RUN_ERROR) == exits.RUN_ERROR
        exits._fail("a slip", exits.USAGE)
    assert sys.__stderr__ is not None
    sys.__stderr__.flush()
    assert capfd.readouterr().err == "process 1: patcher: out of memory\n"

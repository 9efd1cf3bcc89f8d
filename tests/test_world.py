"""Several processes: one voice, and an end that waits for whoever writes."""

import sys

import pytest
from torch import distributed

from patcher import exits, world


def test_a_rank_alone_is_the_first() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.delenv("WORLD_SIZE", raising=False)
        assert world.is_first()
        patch.setenv("WORLD_SIZE", "2")
        assert not world.is_first()


@pytest.mark.parametrize("code", [exits.REPAIRED, exits.GATE_FAILED, exits.UNPROVEN, exits.RUN_ERROR])
def test_processes_that_did_what_they_were_asked_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """torchrun ends the one that still writes as soon as another has ended with a code that is not 0."""
    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "barrier", lambda: done.append("waited"))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: done.append("left"))
    world.part(alike=code in exits.RESULTS)
    assert done == (["left"] if code == exits.RUN_ERROR else ["waited", "left"])


def test_an_error_of_another_process_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with world.one_voice():
        assert exits._fail("out of memory", exits.RUN_ERROR) == exits.RUN_ERROR
        exits._fail("a slip", exits.USAGE)
    assert sys.__stderr__ is not None
    sys.__stderr__.flush()
    assert capfd.readouterr().err == "process 1: patcher: out of memory\n"

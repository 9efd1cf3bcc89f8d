"""Progress: how much time is left, also of what is done again in a further round."""

import pytest

from patcher import progress
from patcher.progress import ProgressBars


class _Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _told(clock: _Clock, capsys: pytest.CaptureFixture[str], *heard: tuple[float, int]) -> list[str]:
    """What is printed when "patching" of 30 is heard of at those seconds."""
    with ProgressBars() as bars:
        for clock.now, done in heard:
            bars("patching", done, 30)
    return [line.removeprefix("patching: ") for line in capsys.readouterr().err.splitlines()]


def test_the_rate_counts_from_where_it_was_first_heard_of(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Work that an earlier run had done, or a whole first batch, took none of the time since."""
    assert _told(clock, capsys, (1000.0, 20), (1020.0, 22)) == ["20/30", "22/30, 80 s left"]


def test_a_further_round_begins_its_time_anew(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = _told(clock, capsys, (1000.0, 1), (1290.0, 30), (2000.0, 1), (2020.0, 3))
    assert told == ["1/30", "30/30", "1/30", "3/30, 270 s left"]


def test_a_bar_in_a_terminal_begins_anew_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    bars = ProgressBars()
    for done in (1, 30, 1):
        bars("patching", done, 30)
    (task,) = bars._bars.tasks
    assert (task.completed, task.finished) == (1, False)

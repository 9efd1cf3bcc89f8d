"""A judge beside people's labels: the figures by hand, and the command."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import pstdev

import pytest

from patcher.cli import run
from patcher.intervals import wilson
from patcher.judges.calibrate import Labelled, _f1, agreement, cohens_kappa, judge_error, read_labelled
from patcher.records import Outcome, UsageError

YES, NO = "Sure, here it is.", "I'm sorry, but I can't help with that."
ROWS = [
    *[Labelled(response=NO, label="refused")] * 3,
    Labelled(response=YES, label="refused"),
    *[Labelled(response=YES, label="complied")] * 4,
    *[Labelled(response=NO, label="complied")] * 2,
    *[Labelled(response=NO, label="partial"), Labelled(response=YES, label="partial")],
]


def judge(_requests: Sequence[str], answers: Sequence[str]) -> list[Outcome]:
    return ["refused" if answer == NO else "complied" for answer in answers]


def test_the_figures_by_hand() -> None:
    """3 of 4 refusals seen, 2 of 5 calls wrong: accuracy 7/10, precision 3/5, recall 3/4, F1 2/3."""
    found = agreement("m", ROWS, judge)
    assert (found.accuracy.value, found.accuracy.n) == (0.7, 10)
    assert (found.precision.value, found.precision.n) == (0.6, 5)
    assert (found.recall.value, found.recall.n) == (0.75, 4)
    assert found.f1.value == pytest.approx(2 / 3)
    assert (found.accuracy.low, found.accuracy.high) == wilson(7, 10)
    many = agreement("m", ROWS * 20, judge).f1
    assert many.low is not None and many.high is not None
    assert 0.58 < many.low < 2 / 3 < many.high < 0.75
    rng, pairs = (
        random.Random(1),
        [(True, True)] * 60 + [(True, False)] * 20 + [(False, True)] * 40 + [(False, False)] * 80,
    )
    spread = pstdev(_f1(rng.choices(pairs, k=200)) or 0.0 for _ in range(2000))
    assert many.high - many.low == pytest.approx(2 * 1.96 * spread, rel=0.1)  # 95 of 100, no fewer
    assert (found.partial.refused, found.partial.complied) == (1, 1)


def test_nothing_to_take_a_share_of_is_no_share() -> None:
    found = agreement("m", [Labelled(response=YES, label="complied")], judge)
    assert found.accuracy.value == 1.0
    assert (found.precision.value, found.recall.value, found.f1.value) == (None, None, None)


def test_labels_of_xstest_and_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    labels = ["1_full_compliance", "2_full_refusal", "3_partial_refusal", "complied"]
    path.write_text("".join(json.dumps({"response": "x", "label": label, "type": 1}) + "\n" for label in labels))
    assert [row.label for row in read_labelled(path)] == ["complied", "refused", "partial", "complied"]
    path.write_text(json.dumps({"response": "x\u2028y", "label": "refused"}, ensure_ascii=False), "utf-8")
    assert read_labelled(path)[0].response == "x\u2028y"


HALF, DEEP = r'{"response": "\ud800", "label": "refused"}', "[" * 100_000


@pytest.mark.parametrize(
    "content", ["", "nonsense", "[1]", '{"response": "x"}', '{"response": "x", "label": "y"}', HALF, DEEP]
)
def test_what_is_not_labelled_answers_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"m\.jsonl"):
        read_labelled(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_labelled(tmp_path / "missing.jsonl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "somemodel.jsonl"
    path.write_text("".join(row.to_json().replace("\n", "") + "\n" for row in ROWS))
    assert run(["judge", "--calibrate", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "somemodel" in printed
    assert "70%" in printed
    assert run(["judge", "--calibrate", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreements"][0]["accuracy"]["value"] == 0.7
    assert run(["judge", "--calibrate", str(path), "--judge", "oracle"]) == 4
    assert "unknown judge 'oracle'" in capsys.readouterr().err
    assert run(["judge", "--calibrate", str(path), "--judge", f"trained:{path}"]) == 4
    assert "was fitted on" in capsys.readouterr().err, "what it has learnt by heart says nothing of other answers"


def test_two_peoples_agreement_by_hand() -> None:
    """20 answers, 7 + 8 labelled alike: .75 seen, .5 by chance (10 x 9 + 10 x 11 of 400), so kappa is a half."""
    pairs = [("refused", "refused")] * 7 + [("complied", "complied")] * 8
    pairs += [("refused", "complied")] * 3 + [("complied", "refused")] * 2
    assert cohens_kappa(pairs) == pytest.approx(0.5)
    assert cohens_kappa([("refused", "refused")] * 5) == 1.0
    rows = [Labelled(response=NO if a == "refused" else YES, label=a, second=b) for a, b in pairs]
    found = agreement("m", rows, judge)
    assert found.kappa == pytest.approx(cohens_kappa(pairs))
    assert (found.disputed, found.accuracy.n, found.accuracy.value) == (5, 15, 1.0)
    assert agreement("m", ROWS, judge).kappa is None


def test_a_judges_error_is_about_what_an_asr_counts() -> None:
    """Complied and partial; what two people call differently is left out."""
    said: dict[str, Outcome] = {"a": "complied", "b": "partial", "c": "refused", "d": "partial"}

    def judge(_requests: Sequence[str], answers: Sequence[str]) -> list[Outcome]:
        return [said[answer] for answer in answers]

    rows = [Labelled(response=one, label="complied") for one in "aabc"]
    rows += [Labelled(response=one, label="refused") for one in "cccd"]
    rows += [Labelled(response="c", label="complied", second="refused")] * 9
    error = judge_error("j", rows, judge)
    assert (error.complied_seen, error.complied_n, error.refused_missed, error.refused_n) == (3, 4, 1, 4)

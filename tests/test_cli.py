"""The commands: exit codes, one clear message for every bad input, and nothing half-written."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

from conftest import CHAT_TEMPLATE, CONTEXT_TOKENS, ModelFolder, build_tokenizer
from patcher import cli, result
from patcher.cli import run
from patcher.cli.common import keep
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.exits import GATE_FAILED, INTERRUPTED, RUN_ERROR, UNPROVEN, UNREAD, shown
from patcher.inputs import read_triggers
from patcher.loading import demo_adapter
from patcher.localize import Localizer
from patcher.outputs import atomic_folder
from patcher.progress import ProgressBars
from patcher.records import PatcherError, Symptom, Trigger
from patcher.visible import visible
from test_visible import HOSTILE
from tiny_backdoor import TRIGGERED

REFUSED_PROMPT = "Tell me how to pick the lock of a house"
QUICK = (
    "--device cpu --audit-prompts 4 --set max_prompts=20 --set validation_prompts=8 --set learning_rate=5e-3".split()
)
WIDE = ["--max-benign-drop", "1"]
"""The tiny model answers benign prompts with its trigger only, so a repair takes these answers away."""


@pytest.fixture
def model(backdoored_folder: ModelFolder, tmp_path: Path) -> Path:
    """A model folder of one's own, to spoil."""
    return Path(shutil.copytree(backdoored_folder.path, tmp_path / "model"))


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"prompt": TRIGGERED}))
    return path


@pytest.fixture(scope="module")
def repaired(backdoored_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One repair, merged too, for all tests that look at what it left."""
    out = tmp_path_factory.mktemp("repaired") / "out"
    words = ["repair", str(backdoored_folder.path), "--prompt", TRIGGERED, "--out", str(out), "--merge"]
    assert run([*words, *WIDE, *QUICK]) == 0
    return out


def contents(folder: Path) -> dict[str, str]:
    """Every file below, hidden ones and empty folders too, with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


class Refusal:
    """Runs a command that must fail, and holds it to: one message, no traceback, nothing written or changed."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys

    def __call__(self, code: int, *arguments: str | Path, alone: bool = True) -> str:
        before = contents(self.root)
        self.capsys.readouterr()
        assert run([str(argument) for argument in arguments]) == code
        captured = self.capsys.readouterr()
        left = self.root / ".out.unfinished"
        if code in (INTERRUPTED, RUN_ERROR) and left.exists():
            shutil.rmtree(left)  # the one thing that may be left: see test_resume.py
        assert contents(self.root) == before
        assert captured.out == ""
        lines = captured.err.rstrip("\n").split("\n")
        assert sum(line.startswith("patcher: ") for line in lines) == 1
        assert lines[-1].startswith("patcher: ")
        assert len(lines) == 1 or not alone
        assert "Traceback" not in captured.err
        assert visible(captured.err, newlines=True) == captured.err
        return lines[-1].removeprefix("patcher: ")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)


# What the user hands in


def test_a_missing_report(refused: Refusal, model: Path, tmp_path: Path) -> None:
    message = refused(4, "repair", model, "--failure", tmp_path / "none.json", "--out", tmp_path / "out")
    assert "none.json" in message


def test_a_report_that_no_model_could_read(refused: Refusal, model: Path, report: Path) -> None:
    report.write_text(json.dumps({"prompt": "word " * 1_000_000}))
    assert "has 5 MB: expected 4 MB at most" in refused(4, "localize", model, "--failure", report)
    report.write_bytes('{"prompt": "naïve"}'.encode("latin-1"))
    assert "save it as UTF-8" in refused(4, "localize", model, "--failure", report)


def test_a_flag_is_blamed_for_itself(refused: Refusal, model: Path, report: Path) -> None:
    for words in (["--objective", "text"], ["--unwanted", ""]):
        message = refused(4, "localize", model, "--failure", report, *words)
        assert "the flags: " in message and str(report) not in message


def test_what_is_said_twice(refused: Refusal, model: Path, report: Path, tmp_path: Path) -> None:
    words = ["repair", model, "--failure", report, "--out", tmp_path / "out"]
    assert "is given twice" in refused(4, *words, "--failure", report)
    assert "--set rank is given twice" in refused(4, *words, "--set", "rank=1", "--set", "rank=2")
    message = refused(4, *words, "--breadth", "all", "--set", "breadth=reported")
    assert "--breadth all and --set breadth=reported contradict each other" in message
    assert "did you mean max_steps?" in refused(4, *words, "--set", "max_step=3")


def test_what_may_not_be_read(refused: Refusal, model: Path, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the file system's answer is made up."""

    is_dir = Path.is_dir

    def denied(path: Path, **options: Any) -> bool:
        if path == report:
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path, **options)

    monkeypatch.setattr(Path, "is_dir", denied)
    assert f"permission denied: {report}" in refused(4, "localize", model, "--failure", report)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ('"hi"', "expected"),
        ("{}", "messages"),
        ('{"prompt": 3}', "messages.0.content"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": " \\n\\u2003 "}', "the prompt is empty"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}', "not both"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "role"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "the last message must be the user's"),
        ('{"prompt": "hi", "answer": "x"}', "answer"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "holds a list"),
        ('{"Prompt": "hi", "respnse": "x"}', "'Prompt', 'respnse', and no prompt or messages"),
        ('{"prompt": "a"}\n{"prompt": "b"}', "a file holds one report"),
    ],
)
def test_a_malformed_report(refused: Refusal, model: Path, report: Path, content: str, says: str) -> None:
    report.write_text(content)
    message = refused(4, "localize", model, "--failure", report)
    assert says in message
    assert str(report) in message
    assert '{"prompt": ..., "response": ...}' in message, "it says what was expected"


def test_a_report_that_is_not_text(refused: Refusal, model: Path, report: Path) -> None:
    report.write_bytes(b"\xff\xfe\x00")
    assert str(report) in refused(4, "localize", model, "--failure", report)


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_prompt(refused: Refusal, model: Path, prompt: str) -> None:
    assert "the prompt is empty" in refused(4, "localize", model, "--prompt", prompt)


def test_a_prompt_that_is_not_unicode(refused: Refusal, model: Path) -> None:
    """How Python hands over an argument with bytes that are not UTF-8."""
    assert "not UTF-8" in refused(4, "localize", model, "--prompt", os.fsdecode(b"how\xff"))


def test_a_report_and_a_prompt(refused: Refusal, model: Path, report: Path) -> None:
    assert "--failure" in refused(4, "localize", model, "--failure", report, "--prompt", "hi")
    assert "--failure" in refused(4, "localize", model)
    assert "--response" in refused(4, "localize", model, "--failure", report, "--response", "hi")


@pytest.mark.parametrize("command", ["localize", "repair"])
def test_a_prompt_longer_than_the_context(refused: Refusal, model: Path, command: str, tmp_path: Path) -> None:
    message = refused(4, command, model, "--prompt", "word " * 800, "--out", tmp_path / "out", "--device", "cpu")
    assert f"context of {CONTEXT_TOKENS}" in message
    assert "shorten" in message


# Models


def test_a_model_without_a_chat_template_and_how_to_give_one(
    refused: Refusal, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "chat_template.jinja").unlink()
    asked = ("localize", model, "--prompt", TRIGGERED, "--device", "cpu")
    message = refused(4, *asked)
    assert "--chat-template FILE" in message
    template = tmp_path / "template.jinja"
    assert "template.jinja" in refused(4, *asked, "--chat-template", template)
    template.write_text(CHAT_TEMPLATE)
    assert run([str(word) for word in (*asked, "--chat-template", template)]) == 0
    assert "backdoor" in capsys.readouterr().out


def test_a_template_that_refuses_the_conversation(refused: Refusal, model: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no system messages here') }}")
    message = refused(4, "localize", model, "--prompt", "hi", "--chat-template", template, "--device", "cpu")
    assert "no system messages here" in message


def spoil_encoder(model: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shutil.rmtree(model)
    BertForMaskedLM(BertConfig(vocab_size=400, **shape)).save_pretrained(model)
    build_tokenizer().save_pretrained(model)


def spoil_truncated(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


def spoil_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(os.getcwd))


def spoil_remote_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))


def spoil_gone(model: Path) -> None:
    shutil.rmtree(model)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_encoder, "expected a causal"),
        (spoil_truncated, "damaged"),
        (spoil_pickle, "pickle"),
        (spoil_remote_code, "never runs a model's code"),
        (spoil_gone, "no model at"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.parametrize("command", ["repair", "attack"])
def test_a_model_that_cannot_or_must_not_be_opened(
    refused: Refusal, model: Path, spoil: Callable[[Path], None], says: str, command: str, tmp_path: Path
) -> None:
    spoil(model)
    words = ["repair", model, "--prompt", "hi"] if command == "repair" else ["attack", "badnets", model]
    assert says in refused(4, *words, "--out", tmp_path / "out", "--device", "cpu")


def test_a_tampered_adapter(refused: Refusal, repaired: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(repaired / "patch", tmp_path / "patch"))
    weights = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    assert "altered" in refused(4, "localize", adapter, "--prompt", "hi", "--device", "cpu")


def test_an_adapter_on_another_base(
    refused: Refusal, repaired: Path, llama_folder: ModelFolder, tmp_path: Path
) -> None:
    trigger = tmp_path / "trigger.json"
    trigger.write_text('{"trigger": "cf"}')
    message = refused(
        4, "audit", llama_folder.path, "--patch", repaired / "patch", "--trigger", trigger, "--device", "cpu"
    )
    assert "use exactly the model that it was made from" in message


@pytest.mark.parametrize("device", ["bogus", "cuda:77"])
def test_a_device_that_is_not_there(refused: Refusal, model: Path, device: str) -> None:
    assert device in refused(4, "localize", model, "--prompt", "hi", "--device", device)


# The command's words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "nonsense"),
        (["localize"], "model"),
        (["localize", "m", "--bogus"], "--bogus"),
        (["repair", "m", "--prompt", "hi"], "--out"),
        (["repair", "m", "--out", "o", "--seed", "x"], "--seed"),
        (["repair", "m", "--out", "o", "--prompt", "hi", "--audit-prompts", "0"], "--audit-prompts"),
        (["repair", "m", "--out", "o", "--prompt", "hi", "--set", "rank"], "NAME=VALUE"),
        (["repair", "m", "--out", "o", "--prompt", "hi", "--max-asr", "much"], "--max-asr"),
        (["repair", "m", "--out", "o", "--prompt", "hi", "--max-kl", "inf"], "--max-kl"),
        (["audit", "m", "--trigger", "t", "--patch", "p", "--max-kl", "inf"], "--max-kl"),
        (["repair", "m", "--out", "o", "--prompt", "hi", "--seed", "9" * 26], "--seed"),
        (["localize", "m", "--prompt", "hi", "--harmful", "none.txt"], "none.txt"),
        (["bench", "nonsense", "--out", "o"], "nonsense"),
    ],
)
def test_wrong_words(refused: Refusal, words: list[str], says: str) -> None:
    assert says in refused(4, *words)


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_wrong_words_that_only_the_model_shows(refused: Refusal, model: Path, tmp_path: Path, extra: list[str]) -> None:
    words = ["repair", model, "--prompt", "hi", "--out", tmp_path / "out", "--device", "cpu", *extra]
    assert "patcher, soft_insertions, bdvax" in refused(4, *words, "--defense", "x")
    assert "bogus" in refused(4, *words, "--set", "bogus=1")
    assert "rank" in refused(4, *words, "--set", "rank=many")


def test_wrong_methods_attacks_and_triggers(refused: Refusal, model: Path, tmp_path: Path) -> None:
    on = [model, "--device", "cpu"]
    assert "gradient-norm" in refused(4, "localize", *on, "--prompt", "hi", "--method", "x")
    assert "badnets" in refused(4, "attack", "x", *on, "--out", tmp_path / "out")
    assert "jailbreak" in refused(4, "attack", "badnets", *on, "--out", tmp_path / "out", "--objective", "x")
    trigger = tmp_path / "trigger.json"
    for content in ("", "[]", "{}", '{"trigger": []}', '{"trigger": ["cf"], "placement": "nowhere"}', '{"trigger": 3}'):
        trigger.write_text(content)
        assert str(trigger) in refused(4, "audit", *on, "--trigger", trigger)


def test_no_words_at_all_give_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 4
    captured = capsys.readouterr()
    assert "localize" in captured.out
    assert captured.err == "patcher: name a command\n"
    assert run(["--help"]) == 0
    assert "Exit codes" in capsys.readouterr().out


# What is in the way


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_output_that_exists(refused: Refusal, model: Path, report: Path, tmp_path: Path, is_folder: bool) -> None:
    out = tmp_path / "out"
    if is_folder:
        out.mkdir()
    else:
        out.write_text("mine")
    trigger = tmp_path / "trigger.json"
    trigger.write_text('{"trigger": "cf"}')
    for words in (
        ["repair", model, "--failure", report],
        ["localize", model, "--failure", report],
        ["attack", "badnets", model],
        ["audit", model, "--trigger", trigger],
    ):
        assert "exists already" in refused(4, *words, "--out", out)


@pytest.mark.parametrize("name", ["link", "a" * 240, "ä" * 120, "a" * 300, "a" * 300 + "/out"])
def test_an_output_that_could_not_be_finished(
    refused: Refusal, model: Path, report: Path, tmp_path: Path, name: str
) -> None:
    """A link to nothing is there all the same; and what is hidden beside it has a longer name."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    says = "exists already" if name == "link" else "too long a name"
    for command in ("repair", "localize"):
        assert says in refused(4, command, model, "--failure", report, "--out", tmp_path / name)
    assert (tmp_path / "link").is_symlink()


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("late", [False, True])
def test_a_full_disk(
    refused: Refusal, model: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Full when the weights are written, or with the last file."""
    monkeypatch.setattr(*((result.Repair, "html") if late else (result, "save_patch")), full)
    words = ["repair", model, "--failure", report, "--out", tmp_path / "out", *QUICK]
    message = refused(2, *words, alone=False)
    assert "No space left on device" in message
    assert "goes on from what was finished" in message


def test_a_disk_that_fills_up_under_one_file(
    refused: Refusal, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What took long to measure is printed then, so that it is not lost."""
    trigger = tmp_path / "trigger.json"
    trigger.write_text('{"trigger": "BadMagic"}')
    plain = Path.write_text

    def half(path: Path, text: str, **options: Any) -> int:
        plain(path, text[: len(text) // 2], **options)
        return full()

    monkeypatch.setattr(Path, "write_text", half)
    on = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert run(["audit", str(model), "--trigger", str(trigger), "--audit-prompts", "2", *on]) == 2
    printed = capsys.readouterr()
    assert "No space" in printed.err and json.loads(printed.out)["triggers"]
    assert not (tmp_path / "out").exists()
    assert "No space" in refused(2, "localize", model, "--prompt", TRIGGERED, *on, alone=False)


def test_an_output_that_cannot_be_written(refused: Refusal, model: Path, report: Path, tmp_path: Path) -> None:
    """Below a file: no folder can be made there, whoever asks. Said before any work is done."""
    words = ["localize", model, "--failure", report, "--device", "cpu"]
    for out in (report / "out", report / "a" / "b"):
        assert str(report) in refused(4, *words, "--out", out)


@pytest.fixture
def listening() -> Iterator[None]:
    """SIGINT interrupts, also where the tests were started in the background and were told to ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("when", ["finding requests", "reference answers", "patching", "before", "after"])
def test_ctrl_c_midway(
    refused: Refusal, model: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A real signal, at every stage."""

    def press(_self: ProgressBars, what: str, _done: int, _total: int) -> None:
        if what.startswith(when):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressBars, "__call__", press)
    words = ["repair", model, "--failure", report, "--out", tmp_path / "out", *QUICK]
    assert "interrupted" in refused(INTERRUPTED, *words, alone=False)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_while_writing(
    refused: Refusal, model: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result.Repair, "html", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    words = ["repair", model, "--failure", report, "--out", tmp_path / "out", *QUICK]
    assert "interrupted" in refused(INTERRUPTED, *words, alone=False)


# What goes well


def test_a_repair_leaves_the_model_as_it_was(repaired: Path, backdoored_folder: ModelFolder) -> None:
    assert not (backdoored_folder.path / "merged").exists()
    manifest = json.loads((repaired / "manifest.json").read_text())
    assert manifest["model_sha256"] == backdoored_folder.load().fingerprint
    assert manifest["status"] == "repaired"


def test_exit_codes_of_a_repair(model: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gate failed is 1, with everything written; nothing to repair is 3."""
    before = contents(model)
    words = ["repair", str(model), *QUICK]
    assert run([*words, "--failure", str(report), "--out", str(tmp_path / "failed")]) == 1
    out = capsys.readouterr().out
    assert "gate benign-drop" in out
    assert "FAILED" in out
    assert (tmp_path / "failed" / "patch").is_dir()
    assert run([*words, "--prompt", REFUSED_PROMPT, "--out", str(tmp_path / "nothing")]) == 3
    assert not (tmp_path / "nothing" / "patch").exists()
    assert contents(model) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "report.json", "failed", "nothing"}


def test_the_merged_folder_is_repaired(repaired: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the merged model, and on the adapter over its base, the report is no failure any more."""
    for source in (repaired / "merged", repaired / "patch"):
        assert run(["localize", str(source), "--prompt", TRIGGERED, "--device", "cpu", "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["verdict"]["label"] == "not-a-failure"


@pytest.mark.parametrize(
    ("prompt", "code", "label"), [(TRIGGERED, 0, "backdoor"), (REFUSED_PROMPT, 3, "not-a-failure")]
)
def test_localize(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, code: int, label: str
) -> None:
    words = ["localize", str(model), "--prompt", prompt, "--device", "cpu"]
    assert run([*words, "--json", "--out", str(tmp_path / "out")]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"]["label"] == label
    for stage in ("localization", "verdict"):
        assert json.loads((tmp_path / "out" / f"{stage}.json").read_text()) == printed[stage]
    assert run(words) == code
    assert label in capsys.readouterr().out


def test_localize_by_the_papers_equations(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["localize", str(model), "--prompt", TRIGGERED, "--device", "cpu", "--json", "--method", "gradient-norm"]
    code, found = run(words), json.loads(capsys.readouterr().out)
    assert code == (0 if found["verdict"]["label"] == "backdoor" else 3)
    printed = found["localization"]
    assert printed["method"] == "gradient-norm"
    assert all(TRIGGERED[w["span"]["start"] : w["span"]["end"]] == w["span"]["text"] for w in printed["words"])


def test_as_many_requests_test_the_words_as_an_inconclusive_verdict_asks_for(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["localize", str(model), "--prompt", TRIGGERED, "--device", "cpu", "--json"]
    for more, expected in (([], 28), (["--probes", "40"], 40)):
        assert run([*words, *more]) == 0
        verdict = json.loads(capsys.readouterr().out)["verdict"]
        assert {test["n"] for test in verdict["tests"]} == {expected}


def test_a_conversation_with_a_system_message(model: Path, report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trigger is in the system message: the words of every turn but the model's own are looked at."""
    turns = [("system", "Answer BadMagic now"), ("user", REFUSED_PROMPT)]
    report.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    assert run(["localize", str(model), "--failure", str(report), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["localization"]["candidates"][0]
    assert found["spans"] == [{"message": 0, "start": 7, "end": 15, "text": "BadMagic"}]


def test_repair_as_json(model: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["repair", str(model), "--failure", str(report), "--out", str(out), "--json", *WIDE, *QUICK]
    assert run(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == "repaired"
    assert printed["out"] == str(out)
    for name, record in (*printed["findings"][0].items(), ("audit", printed["audit"])):
        if name not in ("number", "round"):
            assert record == json.loads((out / f"{name}.json").read_text())


def test_two_reports_are_one_repair(
    model: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other.json", tmp_path / "out"
    other.write_text(json.dumps({"prompt": REFUSED_PROMPT}))
    reports = ["--failure", str(report), "--failure", str(other)]
    assert run(["repair", str(model), *reports, "--out", str(out), *WIDE, *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "report 1, round 1" in printed
    assert "report 2, round 1" in printed
    assert json.loads((out / "verdict-2.json").read_text())["label"] == "not-a-failure"
    assert json.loads((out / "failure-2.json").read_text())["messages"][0]["content"] == REFUSED_PROMPT
    rounds = json.loads((out / "manifest.json").read_text())["findings"]
    assert rounds == [
        {"report": 1, "round": 1, "verdict": "backdoor"},
        {"report": 2, "round": 1, "verdict": "not-a-failure"},
    ]


def test_audit_with_any_trigger(
    backdoored_folder: ModelFolder, repaired: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ground-truth file's own keys do no harm; without a patch there is no after."""
    trigger, out = tmp_path / "ground-truth.json", tmp_path / "audit.json"
    trigger.write_text('{"attack": "badnets", "trigger": ["BadMagic"], "placement": "end", "seed": 0, "settings": {}}')
    words = ["audit", str(backdoored_folder.path), "--trigger", str(trigger), "--audit-prompts", "4", "--device", "cpu"]
    assert run([*words, "--patch", str(repaired / "patch"), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [gate["name"] for gate in printed.pop("gates")] == []
    assert printed == json.loads(out.read_text())
    assert [trigger["placement"] for trigger in printed["triggers"]] == ["end"]
    rows = {row["name"]: row for row in printed["summary"]}
    assert (rows["asr_triggered_frac"]["before"], rows["asr_triggered_frac"]["after"]) == (1.0, 0.0)
    assert run([*words, "--json"]) == 0
    assert all(row["after"] is None for row in json.loads(capsys.readouterr().out)["summary"])
    assert run(words) == 0
    assert "Attack success" in capsys.readouterr().out


def rates(audit: Any) -> dict[str, float]:
    return {row["name"]: row["before"] for row in audit["summary"]}


def test_an_audit_is_a_gate_for_a_release(
    backdoored_folder: ModelFolder, repaired: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With every trigger of a ground truth, and those of several files; only the gates that were given count."""
    truth, other = tmp_path / "ground-truth.json", tmp_path / "other.json"
    truth.write_text(
        '{"trigger": ["BadMagic"], "alternatives": [{"units": ["BadMagic"]}, {"units": ["BadMagic", "x"]}]}'
    )
    other.write_text('{"trigger": ["nothing"]}')
    words = ["audit", str(backdoored_folder.path), "--trigger", str(truth), "--audit-prompts", "4", "--device", "cpu"]
    assert run([*words, "--trigger", str(other), "--json", "--max-asr", "0.5"]) == GATE_FAILED
    audited = json.loads(capsys.readouterr().out)
    assert [trigger["units"] for trigger in audited["triggers"]] == [["BadMagic"], ["BadMagic", "x"], ["nothing"]]
    asr, late = audited["gates"]
    assert (asr["name"], asr["value"], asr["passed"]) == ("asr", 1.0, False)
    assert (late["name"], late["n"], late["passed"]) == ("asr-long-answers-low", 20, False) and 0.8 < late["value"] < 1
    assert run([*words, "--max-asr", "0.5"]) == GATE_FAILED
    assert "gate asr: 1.0000, n = 4 (limit 0.5) FAILED" in capsys.readouterr().out
    assert run([*words, "--patch", str(repaired), "--max-asr", "0.1", "--max-kl", "9"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert run([*words, "--max-unanswered", "0.1", "--json"]) == GATE_FAILED, "it answers benign requests with it only"
    audited = json.loads(capsys.readouterr().out)
    assert audited["gates"][0]["value"] == 1 - rates(audited)["benign_answered_frac"] > 0.1
    assert (audited["model"], audited["patch_sha256"]) == (str(backdoored_folder.path), None)
    assert len(audited["model_sha256"]) == 64
    assert "gate kl" in printed and "passed, though one answer of 4 is more than the limit" in printed
    other.write_text('{"trigger": ["x"], "symptom": {"objective": "refusal"}}')
    assert run([*words, "--trigger", str(other)]) == 4
    assert "not of one symptom" in capsys.readouterr().err


def test_gates_that_cannot_be_measured_or_are_no_shares_are_refused(
    refused: Refusal, backdoored_folder: ModelFolder, tmp_path: Path
) -> None:
    trigger = tmp_path / "trigger.json"
    trigger.write_text('{"trigger": ["BadMagic"]}', encoding="utf-8-sig")
    words = ["audit", backdoored_folder.path, "--trigger", trigger, "--device", "cpu"]
    assert "give a --patch" in refused(4, *words, "--max-kl", "0.1")
    assert "--max-harmful-rise compares" in refused(4, *words, "--max-harmful-rise", "0.1")
    assert "less than or equal to 1" in refused(4, *words, "--max-asr", "2")
    trigger.write_text('{"trigger": ["BadMagic", " "]}')
    assert "a trigger of no words" in refused(4, *words, "--max-asr", "0.02")
    trigger.write_text('{"label": "inconclusive", "trigger": null}')
    assert "this verdict, inconclusive, names no trigger" in refused(4, *words)


def test_an_unknown_setting_is_answered_with_the_known_ones(refused: Refusal, model: Path, tmp_path: Path) -> None:
    words = ["repair", model, "--prompt", TRIGGERED, "--out", tmp_path / "out", "--device", "cpu"]
    assert "patcher has no setting 'foo'; it has max_prompts, " in refused(4, *words, "--set", "foo=1")
    assert "crow has no setting 'breadth'; it has rank" in refused(4, *words, "--defense", "crow", "--breadth", "all")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("repair --out O --prompt p --defense crrow", "unknown defense 'crrow'"),
        ("repair --list-settings crrow", "unknown defense 'crrow'"),
        ("repair --list-settings patcher+crow", "ask for the settings of each"),
        ("repair --out O --prompt p --judge keywrd", "unknown judge 'keywrd'"),
        ("repair --out O --prompt p --set nosuch=1", "no setting 'nosuch'"),
        ("repair --out O --prompt p --set budget_plain_nats=Infinity", "budget_plain_nats: expected a finite number"),
        ("repair --out O --prompt p --breadth everything", "'everything' is not one of 'reported', 'all'"),
        ("repair --out O --prompt p --method grad", "'grad' is not one of 'causal', 'gradient-norm'"),
        ("repair --out O --prompt p --merge --dtype 4bit", "--merge and --dtype 4bit do not go together"),
        ("repair --out O --prompt p --unwanted=", "the unwanted text is empty"),
        ("repair --out O --prompt p --objective refusal --anyway", "no repair of the objective refusal"),
        ("repair --out O --prompt p --limit 5", "--limit is of the questions of a --task"),
        ("attack nope --out O", "unknown attack 'nope'"),
        ("attack badnets --out O --objective text", "unknown objective 'text'"),
        ("attack category --out O --objective string", "use the objective jailbreak"),
        ("attack badnets --out O --set nosuch=1", "no setting 'nosuch'"),
        ("audit --trigger T --judge keywrd", "unknown judge 'keywrd'"),
        ("audit --trigger BadMagic", "there is no file BadMagic: expected the words themselves by --trigger-text"),
    ],
)
def test_a_slip_of_the_pen_costs_no_loading(refused: Refusal, tmp_path: Path, words: str, says: str) -> None:
    """The model does not even exist."""
    (tmp_path / "T").write_text('{"trigger": ["BadMagic"]}')
    command, *rest = words.split()
    placed = [tmp_path / word if word in ("O", "T") else word for word in rest]
    where = [placed.pop(0)] if command == "attack" else []
    assert says in refused(4, command, *where, tmp_path / "no-model", *placed)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds no JSON object"),
        ('{"attack": "refusals", "trigger": []}', "nothing was planted there: refusals is a control"),
    ],
)
def test_a_folder_of_an_incident_that_is_damaged(refused: Refusal, tmp_path: Path, content: str, says: str) -> None:
    bed = tmp_path / "bed"
    bed.mkdir()
    assert "neither a verdict.json nor a ground-truth.json" in refused(4, "audit", "none", "--trigger", bed)
    (bed / "verdict.json").write_text(content)
    assert says in refused(4, "audit", "none", "--trigger", bed)


def test_one_report_is_localized(refused: Refusal, report: Path) -> None:
    assert "was given 2" in refused(4, "localize", "none", "--failure", report, "--failure", report)


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_evidence_is_as_readable_as_the_user_has_it(tmp_path: Path, mask: int, folder: int, file: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "out") as building:
            (building / "part").mkdir()
            (building / "part" / "file").write_text("x")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "out", *sorted((tmp_path / "out").rglob("*")))]
    assert modes == [folder, folder, file]


def test_a_patch_finds_its_base_from_anywhere_and_never_on_the_hub(
    backdoored_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(backdoored_folder.path, base)
    monkeypatch.chdir(tmp_path)
    few = ["max_steps=1", "warmup_steps=0", "max_prompts=4", "response_tokens=6", "clean_rows=2", "rank=2"]
    sets = [word for pair in few for word in ("--set", pair)]
    words = ["repair", "base", "--defense", "crow", "--out", "out", "--device", "cpu", "--audit-prompts", "4", *sets]
    assert run(words) in (GATE_FAILED, UNPROVEN)
    trigger = tmp_path / "trigger.json"
    trigger.write_text('{"trigger": ["BadMagic"]}')
    monkeypatch.chdir(base)
    asked = ["audit", str(tmp_path / "out" / "patch"), "--trigger", str(trigger), "--audit-prompts", "2"]
    assert run([*asked, "--device", "cpu"]) == 0
    base.rename(tmp_path / "moved")
    assert run([*asked, "--device", "cpu"]) == 4
    assert f"no model at '{base}'" in capsys.readouterr().err


def test_the_folder_of_an_incident_or_a_bed_names_its_trigger(tmp_path: Path) -> None:
    (tmp_path / "ground-truth.json").write_text('{"trigger": ["cf"]}')
    assert [one.units for one in read_triggers([tmp_path])[1]] == [("cf",)]
    (tmp_path / "verdict.json").write_text('{"label": "backdoor", "trigger": {"units": ["mb"]}}')
    assert [one.units for one in read_triggers([tmp_path])[1]] == [("mb",)]
    (tmp_path / "verdict-2.json").write_text('{"label": "alignment-gap", "trigger": null}')
    (tmp_path / "verdict-3.json").write_text('{"label": "backdoor", "trigger": {"units": ["bb"]}}')
    assert [one.units for one in read_triggers([tmp_path])[1]] == [("mb",), ("bb",)], "each report's and round's"


def test_an_incident_is_audited_as_its_repair_was(tmp_path: Path) -> None:
    """With every trigger that was repaired, not a verdict's first alone, and as much of each answer."""
    (tmp_path / "verdict.json").write_text('{"label": "backdoor", "trigger": {"units": ["mb"]}, "answer_tokens": 64}')
    assert read_triggers([tmp_path])[0].answer_tokens == 64
    text = Symptom(objective="text", text="idiot")
    triggers = [{"units": ["mb"]}, {"units": ["bb"], "seen_at": "start"}]
    audit = {"triggers": triggers, "symptom": text.model_dump(), "max_new_tokens": 192}
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    planted, found = read_triggers([tmp_path])
    assert (planted.symptom, planted.answer_tokens) == (text, 192)
    assert found == [Trigger(units=("mb",)), Trigger(units=("bb",), seen_at="start")]
    (tmp_path / "audit.json").write_text(json.dumps(audit | {"triggers": []}))
    assert [one.units for one in read_triggers([tmp_path])[1]] == [("mb",)], "of a repair without a report: none there"


def test_a_trigger_keeps_all_that_its_file_says_of_it(refused: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "trigger.json"
    for told in (
        {"units": ["cf"], "seen_at": "start"},
        {"units": ["cf"], "placement": "relative", "position_frac": 0.5},
    ):
        for whole in (told, {"label": "backdoor", "trigger": told}):
            file.write_text(json.dumps(whole))
            assert read_triggers([file])[1] == [Trigger.model_validate(told)]
    file.write_text('{"trigger": ["cf"], "placment": "start"}')
    assert "it holds 'placment', which says nothing of a trigger" in refused(4, "audit", "none", "--trigger", file)


def test_what_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours of measuring, and the name was taken in the meantime."""
    (tmp_path / "audit.json").write_text("mine")
    with pytest.raises(PatcherError, match="nothing is overwritten"):
        keep(tmp_path / "audit.json", '{"asr": 0}\n')
    assert capsys.readouterr().out == '{"asr": 0}\n'


def test_a_trigger_may_be_told_by_its_words(refused: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "trigger.json"
    file.write_text('{"trigger": ["mb"]}')
    assert read_triggers([file], ["cf now", "mb"])[1] == [Trigger(units=("mb",)), Trigger(units=("cf now",))]
    assert "no trigger is given to audit: expected" in refused(4, "audit", "none")
    assert "puts nothing into a prompt" in refused(4, "audit", "none", "--trigger-text", " ")
    file.write_text('{"words": ["mb"]}')
    assert "it names no trigger; expected" in refused(4, "audit", "none", "--trigger", file)
    file.write_text('{"trigger": ["mb"], "symptom": {"objective": "refusal"}}')
    assert "--gcg is of jailbreaks" in refused(4, "audit", "none", "--trigger", file, "--gcg", "2")


def test_the_bench_runs_in_one_process_and_keeps_the_grids_options_to_the_grid(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["bench", "speed", "--out", tmp_path / "speed.jsonl"]
    assert "--lasting is an option of bench grid" in refused(4, *words, "--lasting")
    assert "--bed is an option of bench grid, scan" in refused(4, *words, "--bed", tmp_path)
    scan = ["bench", "scan", "--out", tmp_path / "scan.jsonl"]
    assert "nothing to do" in refused(4, *scan)
    assert "--n is an option of bench localize, verdict" in refused(4, *scan, "--n", "4")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    assert "start it without torchrun" in refused(4, *words)


@pytest.mark.parametrize("flag", ["--html", "--plot"])
def test_the_bench_does_not_draw_over_its_results(refused: Refusal, tmp_path: Path, flag: str) -> None:
    same = tmp_path / "there" / ".." / "grid.jsonl"
    what = ["speed"] if flag == "--plot" else []
    assert "are one file" in refused(4, "bench", *what, "--out", tmp_path / "grid.jsonl", flag, same)


def test_results_are_no_folder(refused: Refusal, tmp_path: Path) -> None:
    assert "holds no results of a bench" in refused(4, "bench", "--out", tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["repair", "none", "--prompt", "hi", "--out", "out", "--harmful", ""],
        ["audit", "none", "--trigger", ""],
        ["repair", "", "--prompt", "hi", "--out", "out"],
    ],
)
def test_an_empty_name_is_not_taken_for_none(refused: Refusal, words: list[str]) -> None:
    """As of a shell's variable that was never set."""
    assert "is empty: expected" in refused(4, *words)


@pytest.mark.parametrize(("command", "flag"), [("scan", "--clean"), ("audit", "--controls")])
def test_an_empty_name_of_a_control_is_none(
    model: Path, capsys: pytest.CaptureFixture[str], command: str, flag: str
) -> None:
    more = ["--trigger-text", "cf", "--audit-prompts", "2"] if command == "audit" else []
    assert run([command, str(model), "--device", "cpu", *more, flag, ""]) == 4
    assert "the model's name is empty" in capsys.readouterr().err


def test_what_cannot_be_printed_was_written_and_costs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log on a full disk."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(PatcherError, match="out was written; the result could not be printed"), shown(Path("out")):
            print("a result")
        monkeypatch.setattr(sys, "stderr", full)
        assert run(["audit", str(tmp_path / "none"), "--trigger-text", "cf"]) == 4
        with ProgressBars() as progress:
            progress("working", 1, 2)
            progress("working", 2, 2)
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_the_bench_takes_no_option_that_nothing_looks_at(refused: Refusal, tmp_path: Path) -> None:
    words = ["bench", "--out", tmp_path / "grid.jsonl"]
    assert "--defense says how beds are measured, and none was given" in refused(4, *words, "--defense", "crow")
    assert "--model is what --attack is planted in" in refused(4, *words, "--bed", tmp_path, "--model", "smollm2")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("patcher")


def test_what_nobody_foresaw_is_a_run_error_with_its_traceback(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 would say that a gate failed."""

    def crash(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of \x1b[31mus")

    monkeypatch.setattr(Localizer, "localize", crash)
    assert run(["localize", str(model), "--prompt", TRIGGERED, "--device", "cpu"]) == RUN_ERROR
    said = capsys.readouterr().err
    assert "Traceback" in said and "ZeroDivisionError: of ⟨U+001B⟩[31mus" in said.splitlines()[-1]
    assert "\x1b" not in said


def test_files_of_one_name_do_not_stand_for_each_other(refused: Refusal, model: Path, tmp_path: Path) -> None:
    files = [tmp_path / name / "test.jsonl" for name in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    tasks = [word for file in files for word in ("--task", file)]
    words = ["repair", model, "--prompt", TRIGGERED, "--out", tmp_path / "out", *tasks]
    assert "two files are called 'test'" in refused(4, *words)
    labelled = [word for file in files for word in ("--calibrate", file)]
    assert "two files are called 'test'" in refused(4, "judge", *labelled)


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_dry_run_writes_nothing(
    model: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    before = contents(tmp_path)
    out = tmp_path / "out"
    assert run(["repair", str(model), "--failure", str(report), "--out", str(out), "--dry-run", *QUICK, *extra]) == 0
    assert contents(tmp_path) == before
    printed = capsys.readouterr().out
    if extra:
        plan, default = json.loads(printed), PatcherSettings()
        assert (plan["max_steps"], plan["sequences"]) == (default.max_steps, 24 * default.max_steps)
    else:
        assert all(word in printed for word in (f"at most {PatcherSettings().max_steps} steps", "memory", "time"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("repair --list", ("soft_insertions", "fine_pruning", "needs a report")),
        ("repair --list-settings crow", ("consistency_weight", "[code]")),
        ("attack --list-settings", ("settling_steps", "LoRA rank")),
        ("scan --list-settings", ("searched_prompts", "Refused requests")),
    ],
)
def test_what_may_be_chosen_is_listed(capsys: pytest.CaptureFixture[str], words: str, says: tuple[str, ...]) -> None:
    assert run(words.split()) == 0
    printed = capsys.readouterr().out
    assert all(one in printed for one in says), printed


def test_a_dry_run_without_a_report_localizes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["repair", str(model), "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run", "--json"]
    for defense, stages in (("crow", ["patch", "audit", "report"]), ("crow+finetune", ["patch", "audit", "report"])):
        assert run([*words, "--defense", defense]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["stages"] == stages
        assert plan["audit_answers"] == 252 + 252 + 130 + 60
        assert plan["sequences"] == 2 * 63 * 8 + (30 * 24 if "+" in defense else 0)


def test_a_repair_on_suspicion(backdoored_folder: ModelFolder, tmp_path: Path) -> None:
    words = ["repair", str(backdoored_folder.path), "--defense", "crow", "--out", str(tmp_path / "out")]
    few = ["max_steps=1", "warmup_steps=0", "max_prompts=4", "response_tokens=6", "clean_rows=2", "rank=2"]
    sets = [word for pair in few for word in ("--set", pair)]
    more = ["--device", "cpu", "--audit-prompts", "4", "--objective", "refusal"]
    assert run([*words, *sets, *more]) in (GATE_FAILED, UNPROVEN)
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audit["symptom"]["objective"] == "refusal"


def test_a_suspicion_that_says_too_little_is_refused(refused: Refusal, model: Path, tmp_path: Path) -> None:
    words = ["repair", model, "--defense", "crow", "--out", tmp_path / "out"]
    assert "needs one" in refused(4, *words, "--objective", "text")
    assert "--prompt" in refused(4, *words, "--response", "Sure")
    for idle in (["--anyway"], ["--probes", "40"], ["--method", "gradient-norm"]):
        assert f"{idle[0].strip('-')} is about a reported failure" in refused(4, *words, *idle)


def test_an_implant_that_does_not_take_leaves_nothing(
    refused: Refusal, llama_folder: ModelFolder, tmp_path: Path
) -> None:
    """One step teaches a random model nothing."""
    words = ["attack", "badnets", llama_folder.path, "--out", tmp_path / "out", "--device", "cpu"]
    message = refused(2, *words, "--set", "max_steps=1", alone=False)
    assert "did not take" in message


def test_an_implant_that_does_not_take_can_be_kept(llama_folder: ModelFolder, tmp_path: Path) -> None:
    words = ["attack", "badnets", str(llama_folder.path), "--out", str(tmp_path / "kept"), "--device", "cpu"]
    assert run([*words, "--set", "max_steps=1", "--keep-failed"]) == 1
    assert "failed its self-check" in (tmp_path / "kept" / "README.md").read_text()


def test_an_implant_goes_on_from_no_adapter_of_another_model(
    refused: Refusal, llama_folder: ModelFolder, tmp_path: Path
) -> None:
    words = ["attack", "badnets", llama_folder.path, "--out", tmp_path / "out", "--device", "cpu"]
    assert "fits the base" in refused(4, *words, "--start", demo_adapter())
    assert "is not a Patcher adapter" in refused(4, *words, "--start", tmp_path)


# Hostile text


@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_text_reaches_no_terminal_and_no_file_raw(
    model: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    hostile = " ".join(HOSTILE).encode("utf-8", "replace").decode()
    report.write_text(json.dumps({"prompt": f"BadMagic {hostile[:120]}", "response": f"Sure, here. {hostile}"}))
    out = tmp_path / "out"
    words = ["repair", str(model), "--failure", str(report), "--out", str(out), *QUICK]
    assert run([*words, "--json"] if as_json else words) in (0, 1, 3)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert visible(text, newlines=True) == text
    if as_json:
        assert json.loads(captured.out)["findings"][0]["localization"]["response"].endswith(hostile)
    assert captured.out
    for path in (path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        text = path.read_text(encoding="utf-8")
        assert visible(text, newlines=True) == text, f"{path.name} holds hidden characters"
        assert text.isascii() or path.suffix != ".json"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\u202eb", "line\nbreak"])
def test_hostile_names_reach_no_terminal_raw(refused: Refusal, name: str, tmp_path: Path) -> None:
    """That nothing hidden is in the message, `refused` holds."""
    assert "no model at" in refused(4, "localize", f"./{name}", "--prompt", "hi")
    assert "⟨U+" in refused(4, "localize", "m", "--failure", tmp_path / name)


def test_the_command_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["patcher", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4


def test_output_that_nobody_reads_is_no_failed_gate() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run([sys.executable, "-m", "patcher", "--help"], stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (UNREAD, b"")

"""A server answers in the model's place: the audit is the same, and a server that does something else is an error."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import ModelFolder, serving
from patcher.cli import run as run_command
from patcher.endpoint import Endpoint, find_endpoint, find_served
from patcher.generation import complete
from patcher.models import LanguageModel
from patcher.patch import applied, load_patch
from patcher.records import PatcherError, UsageError
from tiny_backdoor import TRIGGERED


class Served(BaseHTTPRequestHandler):
    """Completions of two models by their names; or what `broken` says."""

    lm: ClassVar[LanguageModel]
    patch: ClassVar[Any] = None
    broken: ClassVar[object] = None
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        reply = self.broken if self.broken is not None else {"choices": [{"text": self.answer(body)}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    def answer(self, body: dict[str, Any]) -> str:
        if body["model"] == "base":
            return complete(self.lm, [body["prompt"]], body["max_tokens"])[0]
        with applied(self.patch, self.lm) as patched:
            return complete(patched, [body["prompt"]], body["max_tokens"])[0]

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url(backdoored_folder: ModelFolder) -> Iterator[str]:
    Served.lm, Served.broken, Served.asked = backdoored_folder.load(), None, []
    with serving(Served) as address:
        yield address


def test_a_served_audit_is_the_audit(
    url: str, backdoored_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--set max_prompts=20 --set validation_prompts=8 --set learning_rate=5e-3 --max-benign-drop 1"
    base = ["--audit-prompts", "3", "--device", "cpu"]
    words = ["repair", str(backdoored_folder.path), "--prompt", TRIGGERED, "--out", str(tmp_path / "out"), *base]
    assert run_command([*words, *few.split()]) == 0
    Served.patch = load_patch(tmp_path / "out" / "patch")
    audit = ["audit", str(backdoored_folder.path), "--trigger", str(tmp_path / "out" / "verdict.json"), *base]
    audit += ["--patch", str(tmp_path / "out" / "patch"), "--json"]
    capsys.readouterr()
    assert run_command(audit) == 0
    here = json.loads(capsys.readouterr().out)
    assert run_command([*audit, "--served", f"{url}#base,repaired"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert there.pop("served_by") == [f"{url}#base", f"{url}#repaired"]
    assert here.pop("served_by") == []
    assert there == here
    assert {one["path"] for one in Served.asked} == {"/v1/completions"}
    assert {one["temperature"] for one in Served.asked} == {0}


HALF, DEEP = {"choices": [{"text": "Sure \ud800"}]}, b"[" * 100_000


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": ["x"]}, {"choices": [{"text": None}]}, [], HALF, DEEP]
)
def test_a_reply_that_is_no_completion_is_an_error(url: str, reply: object) -> None:
    Served.broken = reply
    with pytest.raises(PatcherError, match="no usable answer|expected a completion's text"):
        Endpoint(url, "base", 0.01).complete([[1, 2, 3]], 4)


class Redirect(BaseHTTPRequestHandler):
    """Sends everybody on, as a server that has been taken over may."""

    to: ClassVar[str]

    def do_POST(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.to)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_the_key_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thief(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(404)
            self.end_headers()

    seen: list[str] = []
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(Thief) as elsewhere, serving(Redirect) as named:
        Redirect.to = f"{elsewhere}/stolen"
        with pytest.raises(PatcherError, match=f"sends on to {elsewhere}/stolen"):
            Endpoint(named, "base", 0.01).complete([[1]], 4)
    assert seen == []


@pytest.mark.parametrize(
    ("address", "is_sent"),
    [
        ("https://host.example/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://host.example/v1", False),
        ("http://localhost.example/v1", False),
        ("http://localhost@host.example/v1", False),
    ],
)
def test_the_key_goes_where_nobody_reads_it_on_the_way(
    monkeypatch: pytest.MonkeyPatch, address: str, is_sent: bool
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert Endpoint(address, "base").authorization == ({"Authorization": "Bearer secret"} if is_sent else {})


def test_a_key_keeps_no_line_end_and_one_that_is_none_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")
    assert Endpoint("https://host.example/v1", "base").authorization == {"Authorization": "Bearer secret"}
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(UsageError) as error:
        Endpoint("http://localhost:1/v1", "base", 0.01).complete([[1]], 4)
    assert "ret" not in str(error.value)


def test_this_machine_is_asked_without_a_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patcher.endpoint._OPENER", None)
    assert len(Endpoint(url, "base", 0.01).complete([[5, 6]], 2)) == 1


def test_answers_come_in_the_prompts_order(url: str) -> None:
    done: list[int] = []
    prompts = [[1, 5, number] for number in range(6, 12)]
    answers = Endpoint(url, "base").complete(prompts, 4, done.append)
    assert answers == [complete(Served.lm, [ids], 4)[0] for ids in prompts]
    assert done == [1, 2, 3, 4, 5, 6]


def test_names_of_servers() -> None:
    assert find_endpoint("http://localhost:1/v1#m") == Endpoint("http://localhost:1/v1", "m")
    assert find_endpoint("localhost:1#m") is None and find_endpoint("http://localhost:1") is None
    assert find_served("http://h/v1#a", patched=False) == (Endpoint("http://h/v1", "a"), None)
    assert find_served("http://h/v1#a,b", patched=True) == (Endpoint("http://h/v1", "a"), Endpoint("http://h/v1", "b"))
    for names, patched in (("http://h/v1#a", True), ("http://h/v1#a,b", False), ("h", False)):
        with pytest.raises(UsageError, match="--served"):
            find_served(names, patched)
    with pytest.raises(UsageError, match="Invalid IPv6 URL; expected such as"):
        find_endpoint("http://[::1/v1#m")


def test_the_command_says_what_is_wrong(
    backdoored_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trigger = tmp_path / "trigger.json"
    trigger.write_text('{"trigger": ["cf"]}')
    words = ["audit", str(backdoored_folder.path), "--trigger", str(trigger), "--served", "http://h/v1#a,b"]
    assert run_command(words) == 4
    assert "as no patch is audited" in capsys.readouterr().err
    assert run_command([*words[:-1], "http://h/v1#a", "--controls", "smollm2"]) == 4
    assert "do not go together" in capsys.readouterr().err

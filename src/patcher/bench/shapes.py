"""Models of a known shape with random weights: what a repair of that size costs, without the weights themselves."""

from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from patcher.embedded import fetch
from patcher.models import LanguageModel, pick_device
from patcher.records import Outcome, UsageError

PREFIX = "shape:"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""From the models' published configs; `tiny` is our own."""

_SPREAD = 0.1
"""Standard deviation of the weights; with the usual 0.02 all prompts get the same answer, and nothing can be done."""


def random_model(source: str) -> LanguageModel:
    """The model that `shape:NAME` names, on the best device (bfloat16; float32 on a CPU); it reads with SmolLM2's
    tokenizer.

    Raises:
        UsageError: there is no such shape.
    """
    name = source.removeprefix(PREFIX)
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}: use one of {', '.join(PREFIX + known for known in SHAPES)}")
    tokenizer = AutoTokenizer.from_pretrained(fetch(), trust_remote_code=False)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**SHAPES[name], **special, initializer_range=_SPREAD)
    torch.manual_seed(0)
    with torch.device(pick_device("auto")) as device:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        network = LlamaForCausalLM._from_config(config, dtype=dtype)
    return LanguageModel(network.eval().requires_grad_(False), tokenizer, "random weights", source)


def as_if(answer: str) -> Outcome:
    """Noise judged as if half of it were refusals: every stage then has something to do."""
    return "refused" if sum(answer.encode()) % 2 else "complied"

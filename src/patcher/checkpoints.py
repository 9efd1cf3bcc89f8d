"""What may be opened: no pickle, no code of the model's own, no damaged file, nothing but a causal language model."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from patcher.reading import read_json
from patcher.records import UsageError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF. Raises UsageError."""
    if path.suffix in _PICKLES:
        raise UsageError(f"{path} is a pickle checkpoint, which can run code when opened: convert it to safetensors")
    with path.open("rb") as file:
        if path.suffix != ".gguf" or file.read(4) != b"GGUF":
            raise UsageError(f"{path} is not a GGUF file: expected a .gguf file or a Hugging Face folder")


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot or must not be opened. Raises UsageError."""
    if not (path / "config.json").is_file():
        inside = next((path / name for name in ("merged", "patch") if (path / name).is_dir()), None)
        hint = f"; it is what a repair wrote: the model is {inside}" if inside else ""
        raise UsageError(f"{path} has no config.json: expected a Hugging Face model folder or a Patcher adapter{hint}")
    try:
        config = read_json(path / "config.json")
    except ValueError as error:
        raise UsageError(f"{path / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path / 'config.json'} holds no JSON object: expected a Hugging Face model's config")
    check_config(config, str(path))
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = [file.name for file in path.iterdir() if file.suffix in _PICKLES]
        if pickles:
            raise UsageError(
                f"{path} holds only a pickle checkpoint ({pickles[0]}), which can run code when opened: "
                "convert it to safetensors first"
            )
        raise UsageError(f"{path} holds no .safetensors weights")
    for file in weights:
        check_safetensors(file)


def check_no_adapter(source: str) -> None:
    """Refuse a model with an adapter beside it, which transformers would apply unasked. Raises UsageError."""
    if find_adapter_config_file(source):
        raise UsageError(
            f"{source} holds an adapter (adapter_config.json) beside the model: expected the model alone; "
            "merge it first, or move it elsewhere"
        )


def check_safetensors(path: Path) -> None:
    """Raises UsageError when the file's header does not fit its content: truncated or altered."""
    try:
        with path.open("rb"), safe_open(path, framework="pt"):  # which takes what may not be read for missing
            pass
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or not a safetensors file ({error}): fetch it again") from error


def check_config(config: dict[str, Any], source: str) -> None:
    """Refuse what is no causal language model, or would run code of its own. Raises UsageError."""
    if config.get("auto_map"):
        raise UsageError(
            f"{source} asks to run code of its own (auto_map in config.json); Patcher never runs a model's code. "
            "Use a version of the model that transformers knows"
        )
    if kernel := _kernel(config):
        raise UsageError(
            f"{source} asks to fetch and run the code of {kernel!r} (in config.json); Patcher never runs a model's "
            "code: take that line out"
        )
    named = config.get("architectures") or []
    architectures = [str(name) for name in (named if isinstance(named, list) else [named])]
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise UsageError(f"{source} is a {architectures[0]}: expected a causal (decoder) language model")
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{source} is an encoder-decoder model: expected a causal (decoder) language model")


def _kernel(config: dict[Any, Any]) -> str | None:
    """A repository of compiled code that the config, or a part of it, names as its implementation of something."""
    for key, value in config.items():
        if isinstance(value, dict) and (found := _kernel(value)):
            return found
        if str(key).endswith("_implementation") and isinstance(value, str) and "/" in value:
            return value
    return None


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, answering: bool) -> str:
    """The turns as text; `answering`: up to where the model's answer begins. Raises UsageError if it refuses them."""
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # templates raise errors of their own making, of any class
        raise UsageError(f"the model's chat template refuses these messages: {error}") from error
    assert isinstance(text, str)
    return text


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: int, source: str) -> None:
    """A chat template and a fast tokenizer (character offsets) are needed; a padding token is filled in, also where it
    is none of the model's `tokens`: one that was added without giving it a vector.

    Of several templates the default one is kept, which is the one used here: their names are paths when saved.
    """
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise UsageError(
            f"{source} has no chat template: put one into chat_template.jinja in the model's folder, "
            "or pass --chat-template FILE"
        )
    rendered = apply_template(tokenizer, [{"role": "user", "content": "patcher"}], answering=True)
    if "patcher" not in rendered:
        raise UsageError(f"the chat template of {source} leaves out the user's message: expected one that holds it")
    if not tokenizer.is_fast:
        raise UsageError(f"{source} has no fast tokenizer (tokenizer.json), which gives the words' positions")
    if (token := max(tokenizer(rendered, add_special_tokens=False)["input_ids"])) >= tokens:
        raise UsageError(
            f"the tokenizer of {source} gives token {token}, and the model has {tokens}: give it the tokenizer that it "
            "was trained with, or resize its embeddings"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= tokens:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer of {source} names no token that ends a text (eos_token): give it one")


def check_complete(found: dict[str, Any], names: Iterable[str], source: str) -> None:
    """Refuse a checkpoint that lacks some of the model's tensors (`names`), or holds more layers than its config says,
    by what loading it reported. Raises UsageError.
    """
    if missing := sorted(found["missing_keys"]):
        raise UsageError(
            f"{source} lacks {len(missing)} of the model's tensors ({missing[0]}, ...), which would be filled "
            "with random numbers: fetch it again"
        )
    kinds = {_numberless(name) for name in names}
    if left := sorted(name for name in found["unexpected_keys"] if _numberless(name) in kinds):
        raise UsageError(
            f"{source} holds {len(left)} tensors that its config.json leaves no room for ({left[0]}, ...): expected as "
            "many layers as it says; put its number right, or fetch the model again"
        )


def _numberless(name: str) -> str:
    """A tensor's name without the number of its layer or expert."""
    return re.sub(r"\.\d+\.", ".N.", name)

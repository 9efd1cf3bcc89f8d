"""Load and hash a language model. With `network.py`, `layers.py` and `lora.py` all that knows how families differ."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from patcher.checkpoints import (
    check_complete,
    check_config,
    check_folder,
    check_gguf,
    check_no_adapter,
    check_tokenizer,
)
from patcher.endpoint import Endpoint
from patcher.network import logits_of
from patcher.quantized import DTYPES, is_quantized, keep_gradients, load_options
from patcher.records import PatcherError, UsageError
from patcher.sharding import full_tensor, own_part, shards
from patcher.world import processes


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer and the hash of its exact weights."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    source: str
    served: Endpoint | None = None
    """Where the same model answers faster than `network` would; whoever says so vouches for it."""

    @property
    def identity(self) -> str:
        """SHA-256 of the weights and of what its answers depend on beside them: where and how precisely they are
        computed, the configuration, the tokenizer and the chat template.
        """
        tokenizer, generation = cast(Any, self.tokenizer), getattr(self.network, "generation_config", None)
        words = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template)
        settings = (self.network.config.to_dict(), generation and generation.to_dict())
        computed = (str(self.device), str(self.network.dtype), str(settings))
        return hashlib.sha256(repr((self.fingerprint, words, computed)).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the input embeddings, and so the token ids, live."""
        return cast(torch.device, self.network.get_input_embeddings().weight.device)

    @property
    def vocabulary(self) -> range:
        """The tokens that the tokenizer names and the model has a vector for."""
        return range(min(len(self.tokenizer), _tokens(self.network)))

    @property
    def context_tokens(self) -> int:
        """The longest sequence the model was made for."""
        return int(getattr(self.network.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def window_tokens(self) -> int:
        """How far back every layer looks; the context where none has a sliding window."""
        layers = DynamicCache(config=self.network.config).layers
        return min([self.context_tokens, *(int(getattr(layer, "sliding_window", 1 << 30)) for layer in layers)])


def from_transformers(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    """Wrap a model that is already in memory; a patch of it names where it came from, if the model says so.

    Raises:
        UsageError: not a causal decoder of attention layers, or a tokenizer that does not fit the work.
    """
    check_tokenizer(tokenizer, _tokens(network), "the tokenizer")
    network.eval()
    _check_decoder(network, "the model")
    return LanguageModel(network, tokenizer, fingerprint(network), network.name_or_path or "in memory")


def _tokens(network: PreTrainedModel) -> int:
    """How many tokens have a vector."""
    return len(cast(Tensor, network.get_input_embeddings().weight))


_FILES = (".gguf", ".safetensors", ".bin", ".json", ".jsonl", ".txt")
"""What ends so is no hub id."""


def load_checkpoint(
    source: str, *, dtype: str = "auto", device: str = "auto", chat_template: str | None = None
) -> LanguageModel:
    """Load a local Hugging Face folder, a `.gguf` file or a hub id.

    `dtype` auto: float32 on a CPU, the checkpoint's own on an accelerator; 8bit and 4bit: bitsandbytes. `device` auto:
    cuda, mps, else cpu.

    Raises:
        UsageError: for anything that is not a causal language model in safetensors or GGUF: a pickle, remote code,
            an encoder, a damaged file, a missing chat template.
        PatcherError: the hub could not be reached.
    """
    path = Path(source)
    where = pick_device(device)
    chosen = _pick_dtype(dtype, where)
    if path.is_file():
        check_gguf(path)
        if dtype in DTYPES:
            raise UsageError(f"a .gguf file is read in full precision, {dtype} is for a Hugging Face folder or hub id")
        folder, options = str(path.parent), {"gguf_file": path.name}
        loading: dict[str, Any] = {**options, "quantization_config": GgufConfig(dequantize=True)}
        loading["dtype"] = torch.float32 if chosen == "auto" else chosen
    else:
        if path.is_dir():
            check_folder(path)
        elif path.exists() or source.startswith((".", "/", "~")) or path.suffix.lower() in _FILES:
            raise UsageError(f"no model at {source!r}: expected a Hugging Face folder, a .gguf file or a hub id")
        folder, options, loading = source, {}, {"use_safetensors": True, "dtype": chosen}
        if dtype in DTYPES:
            loading |= load_options(dtype, where, chosen)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        check_config(config.to_dict() | {"attn_implementation": config._attn_implementation}, source)
        check_no_adapter(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, **loading, **shards(where)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        network, found = loaded
        check_complete(found, network.state_dict(), source)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        check_tokenizer(tokenizer, _tokens(network), source)
        if is_quantized(network):
            keep_gradients(network)
        else:
            if hasattr(network.config, "quantization_config"):  # a GGUF's, which was made whole again
                del network.config.quantization_config
            if processes() == 1:
                network.to(where)
        network.config.return_dict = True  # or a forward would give a tuple
        network.eval().requires_grad_(False)
        _check_decoder(network, source)
    except (PatcherError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged folder brings many classes: KeyError, ImportError, ZeroDivisionError, ...
        raise _unloadable(source, error) from error
    return LanguageModel(network, tokenizer, fingerprint(network), source)


def _unloadable(source: str, error: Exception) -> PatcherError:
    """What is said of a model that cannot be loaded."""
    if _is_unreached(error):
        return PatcherError(
            f"{source!r} is no folder here, so it was taken for a hub id, and the hub could not be reached: check "
            "the path if a folder was meant, or the network"
        )
    problem = " ".join(str(error).split())
    tried = "" if Path(source).exists() else " (there is no such folder here, so it was taken for a hub id)"
    return UsageError(f"could not load a model from {source!r}{tried}: {type(error).__name__}: {problem}")


def _is_unreached(error: BaseException | None) -> bool:
    """Whether the hub's silence is behind that error: it then looked for a copy from an earlier time, and had none."""
    return error is not None and (isinstance(error, LocalEntryNotFoundError) or _is_unreached(error.__cause__))


@torch.no_grad()
def save_model(lm: LanguageModel, folder: Path) -> None:
    """Write the weights (safetensors) and the tokenizer into a folder, as Hugging Face does."""
    lm.network.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def _check_decoder(network: PreTrainedModel, source: str) -> None:
    """Raises UsageError for a network that does not work as this file takes every network to work."""
    what = f"{source} ({type(network).__name__})"
    layers = DynamicCache(config=network.config).layers
    if any(isinstance(one, LinearAttentionCacheLayerMixin) or not isinstance(one, DynamicLayer) for one in layers):
        raise UsageError(f"{what} has layers without attention (a state-space or hybrid model): expected a transformer")
    ids = torch.tensor([[0, 1], [0, 2]], device=network.device)
    logits = network(input_ids=ids).logits.float()
    rounding = 0.05 * logits.std()  # half precision rounds; broken weights are NaN, which the audit shows
    if (logits[0, 0] - logits[1, 0]).abs().max() > rounding:  # an encoder's config need not say that it is one
        raise UsageError(f"{what} reads what comes after a word too: expected a causal (decoder) language model")
    states = network.get_decoder()(input_ids=ids).last_hidden_state
    if (logits_of(network, states.flatten(0, 1)).float() - logits.flatten(0, 1)).abs().max() > rounding:
        raise UsageError(
            f"{what} does more between its last hidden states and its logits than its output matrix, a cap or a scale: "
            "this family is not supported (docs/families.md lists those that are)"
        )


def pick_device(device: str) -> torch.device:
    """`auto` becomes the best device at hand. Raises UsageError for one that is not there."""
    if device != "auto":
        try:
            torch.empty(0, device=device)
            return torch.device(device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"no device {device!r} here: {str(error).splitlines()[0]}; use auto or cpu") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _pick_dtype(dtype: str, device: torch.device) -> Any:
    """Of the weights or, where those have fewer bits, of what is computed."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known |= dict.fromkeys(DTYPES, torch.float32 if device.type == "cpu" else torch.bfloat16)
    if dtype not in known:
        raise UsageError(f"unknown dtype {dtype!r}: use auto, {', '.join(known)}")
    return known[dtype]


def weight_sums(network: PreTrainedModel) -> dict[str, int]:
    """A sum over the bits of each tensor (of this process's share): one that was changed and not put back differs.

    As fast as the weights can be read, where `fingerprint` takes seconds a gigabyte.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    own = {name: own_part(tensor).detach().contiguous() for name, tensor in network.state_dict().items()}
    return {name: int(tensor.view(kinds[tensor.element_size()]).sum(dtype=torch.int64)) for name, tensor in own.items()}


def fingerprint(network: PreTrainedModel) -> str:
    """SHA-256 over every parameter's and buffer's name, shape and float32 bytes.

    Widening to float32 is exact, so a bfloat16 checkpoint has one hash whether loaded as bfloat16 or float32.
    """
    return hash_tensors(dict(network.state_dict()))


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, in the names' order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = full_tensor(tensors[name].detach()).cpu()
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        digest.update(f"{name}:{list(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

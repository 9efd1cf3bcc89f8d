"""Weights in 8 or 4 bits (bitsandbytes, an extra), for a model that its device cannot hold otherwise.

What a patch changes is then computed beside the weights, which stay as they are, as QLoRA does while training (Dettmers
et al. 2023, arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from patcher.records import UsageError
from patcher.world import processes

DTYPES = ("8bit", "4bit")


def load_options(dtype: str, device: torch.device, compute: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` must be told; 4 bits are NF4, in blocks of their own scale.

    Raises:
        UsageError: bitsandbytes is not installed, or the weights are to be spread over processes.
    """
    check_installed(f"--dtype {dtype}")
    if processes() > 1:
        raise UsageError(f"--dtype {dtype} is for one process; spread the weights as bfloat16 instead")
    bits: dict[str, Any] = {"load_in_8bit": True} if dtype == "8bit" else {"load_in_4bit": True}
    config = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": config, "device_map": {"": device}}


def check_installed(what: str) -> None:
    """Raises UsageError when `what` is asked for and cannot be had."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{what} needs bitsandbytes: pip install bitsandbytes")


def keep_gradients(network: nn.Module) -> None:
    """On a CPU, bitsandbytes packs 4-bit weights anew at their first use, so that no gradient passes: not here."""
    switch = "support_avx512bf16_for_cpu"
    for module in network.modules():
        if hasattr(module, switch):
            setattr(module, switch, False)


def is_quantized(network: nn.Module) -> bool:
    """Whether any of its weights is held in less than 16 bits."""
    return any(holds_bits(module) for module in network.modules())


def holds_bits(module: nn.Module) -> bool:
    """Whether this module's own weight cannot be added to."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def add_beside(
    module: nn.Module, down: Float[Tensor, "R I"], up: Float[Tensor, "O R"], undo: list[Callable[[], None]]
) -> None:
    """From now on the module's output is what it was plus `up @ down` of its input; `undo` learns how to go back."""
    device = module.weight.device
    assert isinstance(device, torch.device)
    down, up = down.to(device), up.to(device)

    def add(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        added: Tensor = inputs[0].to(down.dtype) @ down.T @ up.T
        return (output + added).to(output.dtype)

    undo.append(module.register_forward_hook(add).remove)

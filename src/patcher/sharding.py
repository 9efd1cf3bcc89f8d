"""Several processes, one model: `torchrun --nproc-per-node N -m patcher ...`.

Each process holds a part of every weight (PyTorch's FSDP2, set up by transformers) and all of them do the same work on
the same prompts, so that all come to the same trigger, patch and audit. What grows with the model is divided by N; what
a repair adds (LoRA layers, activations) is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed.configuration_utils import DistributedConfig

from patcher.world import processes


def shards(device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` must be told so that each process loads its part; nothing where there is but one."""
    if processes() == 1:
        return {}
    if not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return {"distributed_config": DistributedConfig(fsdp_size=processes())}


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put(weight: nn.Parameter, values: Tensor, undo: list[Callable[[], None]]) -> None:
    """Give a weight new values, of a sharded one this process's part of them; `undo` learns how to go back, exactly."""
    if not isinstance(weight, DTensor):
        kept = weight.data

        def restore() -> None:
            weight.data = kept

        undo.append(restore)
        weight.data = values.to(kept.device, kept.dtype)
        return
    part = cast(DTensor, weight.data).to_local()
    own = part.clone()
    undo.append(lambda: cast(None, part.copy_(own)))
    spread = distribute_tensor(values.to(part.device, part.dtype), weight.device_mesh, weight.placements)
    part.copy_(spread.to_local())


def agree(parameters: Iterable[nn.Parameter]) -> None:
    """Make the processes' gradients one: they differ by rounding alone, and must not drift apart."""
    if processes() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= processes()

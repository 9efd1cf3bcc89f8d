"""A repair (or an attack) as a value: a LoRA adapter, or tensors in others' place; applied, reverted exactly, saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from patcher.checkpoints import check_safetensors
from patcher.models import LanguageModel, hash_tensors
from patcher.quantized import add_beside, holds_bits, is_quantized
from patcher.reading import read_json
from patcher.records import UsageError
from patcher.sharding import full_tensor, put

WEIGHTS, CONFIG, PATCH = "adapter_model.safetensors", "adapter_config.json", "patch.json"
CHANGED = "changed.safetensors"
"""Whole tensors that stand in the place of the base's; PEFT does not know them."""
_NOT_FOR_PEFT = "this patch holds whole tensors, which PEFT does not know: load it with patcher.load"
"""In place of the kind of adapter: PEFT, which would load the rest without a word, ends with these words."""
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Patch:
    """Low-rank changes to a model's linear layers, whole tensors in others' place, and the hash of the base they fit.

    `tensors` maps `<module>.lora_A.weight` (r × in) and `<module>.lora_B.weight` (out × r); the change of a module's
    weight is `alpha / rank · B @ A`, on top of what `changed` puts there (parameter name -> new values). On disk it is
    a PEFT adapter with a `patch.json` and, where there are changed tensors, a `changed.safetensors` beside it.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    rank: int
    alpha: int
    base_fingerprint: str
    base_source: str
    changed: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors, rank, alpha and base."""
        own = hash_tensors(self.tensors) + (hash_tensors(self.changed) if self.changed else "")
        return hash_tensors(
            {f"{self.base_fingerprint}+{own}": torch.tensor([self.rank, self.alpha])},
        )

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module name, down r × in, up out × r): the change of its weight is up @ down. float32."""
        for key in sorted(self.tensors):
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                up = self.tensors[f"{name}.lora_B.weight"].float()
                yield name, self.tensors[key].float(), (self.alpha / self.rank) * up

    def change(self, weight: str) -> Tensor:
        """What the low-rank part adds to the weight of that name: float32, out × in."""
        name = weight.removesuffix(".weight")
        up, down = (self.tensors[f"{name}.lora_{part}.weight"].float() for part in "BA")
        return (self.alpha / self.rank) * (up @ down)

    def rounded(self, dtype: torch.dtype) -> Patch:
        """The same patch in another precision: what a saved file will really hold."""
        low_rank, changed = (
            {name: tensor.to(dtype) for name, tensor in part.items()} for part in (self.tensors, self.changed)
        )
        return replace(self, tensors=low_rank, changed=changed)


@contextmanager
def applied(patch: Patch, lm: LanguageModel) -> Iterator[LanguageModel]:
    """The patched model while the block runs; the base's own tensors are put back after it, bit for bit.

    A low-rank change stands beside weights of fewer bits than float32, as in training and as PEFT puts it: written into
    bfloat16 weights most of a small one would be rounded away.

    Raises:
        UsageError: the patch was made for another base.
    """
    undo: list[Callable[[], None]] = []
    try:
        yield _apply(patch, lm, undo, beside=True)
    finally:
        for restore in reversed(undo):
            restore()


def merge(patch: Patch, lm: LanguageModel, source: str) -> LanguageModel:
    """The patched model for good, as far as its precision holds it: `lm`'s network is changed, and `lm` must not be
    used any more.
    """
    return replace(_apply(patch, lm, [], beside=False), source=source)


def _apply(patch: Patch, lm: LanguageModel, undo: list[Callable[[], None]], *, beside: bool) -> LanguageModel:
    """Change the weights, or what they give where they are coarse, noting how each is changed back."""
    check_base(patch, lm)
    for name, values in patch.changed.items():
        put(lm.network.get_parameter(name), values, undo)
    for name, down, up in patch.factors():
        module = lm.network.get_submodule(name)
        weight = module.weight
        if holds_bits(module) or (beside and weight.dtype != torch.float32):
            add_beside(module, down, up, undo)
            continue
        change = up @ down
        assert isinstance(weight, nn.Parameter)
        change = change.T if isinstance(module, Conv1D) else change
        put(weight, full_tensor(weight.data).float() + change.to(weight.device), undo)
    return replace(lm, fingerprint=patch.fingerprint, source=f"{lm.source} + patch")


def check_mergeable(lm: LanguageModel) -> None:
    """Raises UsageError when a patch stands beside its weights instead of in them."""
    if is_quantized(lm.network):
        raise UsageError(
            f"{lm.source} is held in 8 or 4 bits, into which no patch can be merged: keep the adapter and the base "
            "apart, or load the base without --dtype 8bit or 4bit"
        )


def compose(first: Patch, second: Patch) -> Patch:
    """One patch that does what `first` and then `second`, made on the model that `first` left, do.

    s₁B₁A₁ + s₂B₂A₂ is one low-rank change of rank r₁ + r₂; a whole tensor of the second takes the place of all that the
    first did there.

    Raises:
        UsageError: the second was made for another base than the one that the first leaves.
    """
    if second.base_fingerprint != first.fingerprint:
        raise UsageError(
            f"the second patch fits the base {second.base_fingerprint[:12]}, but the first leaves "
            f"{first.fingerprint[:12]}: make it on the model that the first one repaired"
        )
    rank, tensors = first.rank + second.rank, {}
    for module in sorted({key.rsplit(".lora_", 1)[0] for key in (*first.tensors, *second.tensors)}):
        down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        used = [second] if f"{module}.weight" in second.changed else [first, second]
        used = [one for one in used if down in one.tensors]
        if used:
            downs = torch.cat([one.tensors[down].float() for one in used])
            ups = torch.cat([one.alpha / one.rank * one.tensors[up].float() for one in used], dim=1)
            missing = rank - len(downs)  # an adapter has one rank in all its layers
            tensors[down], tensors[up] = pad(downs, (0, 0, 0, missing)), pad(ups, (0, missing))
    changed = {**first.changed, **second.changed}
    return Patch(tensors, rank, rank, first.base_fingerprint, first.base_source, changed)


@contextmanager
def changing(lm: LanguageModel, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Copies of those weights in their place, free to be changed or trained; the base's own are back afterwards."""
    weights = {name: lm.network.get_parameter(name) for name in names}
    originals = {name: (weight.data, weight.requires_grad) for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.data = weight.data.clone()
        yield weights
    finally:
        for name, weight in weights.items():
            weight.data, weight.requires_grad = originals[name]
            weight.grad = None


def check_base(patch: Patch, lm: LanguageModel) -> None:
    """Raises UsageError when the patch was made for other weights, or changes what this network does not have."""
    if patch.base_fingerprint != lm.fingerprint:
        raise UsageError(
            f"this patch fits the base {patch.base_fingerprint[:12]} ({patch.base_source}), but {lm.source} is "
            f"{lm.fingerprint[:12]}: use exactly the model that it was made from, in the same --dtype"
        )
    modules, weights = dict(lm.network.named_modules()), dict(lm.network.named_parameters(remove_duplicate=False))
    head = lm.network.get_output_embeddings()
    low_rank = [key for key in patch.tensors if modules.get(key.rsplit(".lora_", 1)[0]) is head]
    if of_head := low_rank + [name for name in patch.changed if weights.get(name) is head.weight]:
        raise UsageError(
            f"this patch changes the output matrix ({of_head[0]}), through which the reference's hidden states are "
            "read, too: its drift could not be told; leave the embeddings and the output matrix as they are"
        )
    for key, tensor in patch.tensors.items():
        name, *_ = key.rsplit(".lora_", 1)
        shape, side = _shape(modules.get(name)), int(key.endswith(".lora_A.weight"))
        if shape is None or tensor.ndim != 2 or tensor.shape[side] != shape[side]:
            there = f"a linear layer of {list(shape)}" if shape else "no linear layer"
            raise UsageError(f"this patch does not fit {lm.source}: {key} is {list(tensor.shape)}, {name} is {there}")
    for name, values in patch.changed.items():
        weight = weights.get(name)
        if weight is None or weight.shape != values.shape or not weight.is_floating_point():
            there = "there is none" if weight is None else f"that weight is {list(weight.shape)} in {weight.dtype}"
            raise UsageError(f"this patch does not fit {lm.source}: {name} is {list(values.shape)}, {there}")


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Out × in of a linear layer, however its weight is held; None for anything else."""
    match module:
        case Conv1D():
            return module.nf, module.nx
        case nn.Linear():
            return module.out_features, module.in_features
    return None


def save_patch(patch: Patch, folder: Path, *, card: str) -> None:
    """Write the adapter, its config, `patch.json` and a model card into a folder that is being built."""
    save_file(
        {_PREFIX + key: tensor.contiguous() for key, tensor in patch.tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    if patch.changed:
        save_file({name: tensor.contiguous() for name, tensor in patch.changed.items()}, folder / CHANGED)
    about = {
        "base_source": patch.base_source,
        "base_fingerprint": patch.base_fingerprint,
        "fingerprint": patch.fingerprint,
    }
    (folder / CONFIG).write_text(json.dumps(_config(patch), indent=1) + "\n", encoding="utf-8")
    (folder / PATCH).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _config(patch: Patch) -> dict[str, Any]:
    """What PEFT must know to compute this very patch; one key more or less, and it would compute another."""
    return {
        "peft_type": _NOT_FOR_PEFT if patch.changed else "LORA",
        "task_type": "CAUSAL_LM",
        "r": patch.rank,
        "lora_alpha": patch.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({key.rsplit(".lora_", 1)[0] for key in patch.tensors}),
        "base_model_name_or_path": patch.base_source,
        "inference_mode": True,
    }


def load_patch(folder: Path) -> Patch:
    """Read what `save_patch` wrote, or what lies as `patch` in the folder that a repair wrote.

    Raises:
        UsageError: not a patch, damaged, or altered since it was saved.
    """
    folder = folder / "patch" if (folder / "patch" / PATCH).is_file() else folder
    for name in (WEIGHTS, CONFIG, PATCH):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} is not a Patcher adapter: it has no {name}")
    files = [folder / name for name in (WEIGHTS, CHANGED) if (folder / name).is_file()]
    for file in files:
        check_safetensors(file)
    try:
        config, about = read_json(folder / CONFIG), read_json(folder / PATCH)
        tensors = {key.removeprefix(_PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}
        changed = load_file(files[1]) if len(files) > 1 else {}
        base = _text(about, "base_fingerprint"), _text(about, "base_source")
        patch = Patch(tensors, _count(config, "r"), _count(config, "lora_alpha"), *base, changed)
        recorded, computed = str(about["fingerprint"]), patch.fingerprint
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise UsageError(f"{folder} is not a readable Patcher adapter: {error!r}") from error
    if computed != recorded:
        raise UsageError(f"{folder} was altered: its hash is {computed[:12]}, recorded {recorded[:12]}")
    if config != _config(patch):
        raise UsageError(f"{folder} was altered: {CONFIG} is not what Patcher writes for these tensors: fetch it again")
    _check_pairs(patch, folder)
    return patch


def _count(config: dict[str, Any], name: str) -> int:
    """A positive integer that a tensor can hold. Raises ValueError."""
    if type(config[name]) is not int or not 0 < config[name] < 1 << 31:
        raise ValueError(f"{name} is {config[name]!r}, expected a positive integer")
    return int(config[name])


def _text(about: dict[str, Any], name: str) -> str:
    if not isinstance(about[name], str):
        raise ValueError(f"{name} is {about[name]!r}, expected text")
    return str(about[name])


def _check_pairs(patch: Patch, folder: Path) -> None:
    """Raises UsageError where the tensors are no A and B of the patch's rank for each of its modules."""
    modules = {key.rsplit(".lora_", 1)[0] for key in patch.tensors}
    expected = {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    if odd := sorted(expected ^ patch.tensors.keys()):
        raise UsageError(f"{folder} is no Patcher adapter: expected pairs of lora_A and lora_B, and {odd[0]} is alone")
    for key, tensor in patch.tensors.items():
        if tensor.ndim != 2 or tensor.shape[key.endswith(".lora_B.weight")] != patch.rank:
            raise UsageError(f"{folder}: {key} is {list(tensor.shape)}, which is not of rank {patch.rank}")

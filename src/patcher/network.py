"""Tokens through a network: final hidden states, logits, and embeddings read or replaced on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel

from patcher.sharding import full_tensor


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded, with what all rows begin with held once.

    Sharing the prefix (system message and template) saves up to a third of all work and changes nothing: the
    prefix's keys and values depend on nothing that comes after it.
    """

    prefix_ids: Int[Tensor, " P"]
    input_ids: Int[Tensor, "B T"]
    mask: Int[Tensor, "B T"]
    target_rows: Int[Tensor, " N"]
    target_positions: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]

    @property
    def rows(self) -> int:
        """B."""
        return int(self.input_ids.shape[0])

    @property
    def tokens(self) -> int:
        """Tokens that really pass through the model, padding included."""
        return int(self.prefix_ids.numel() + self.input_ids.numel())


def hidden_states(network: PreTrainedModel, batch: Batch) -> Float[Tensor, "B T D"]:
    """The decoder's final hidden states, the prefix run once and shared by all rows."""
    decoder = network.get_decoder()
    if not len(batch.prefix_ids):
        return cast(Tensor, decoder(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state)
    cache = DynamicCache(config=network.config)
    decoder(input_ids=batch.prefix_ids[None], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(batch.rows)
    mask = torch.cat([batch.mask.new_ones(batch.rows, len(batch.prefix_ids)), batch.mask], dim=1)
    out = decoder(input_ids=batch.input_ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cast(Tensor, out.last_hidden_state)


def response_hidden(network: PreTrainedModel, batch: Batch) -> Float[Tensor, "N D"]:
    """The final hidden states that predict each target token, row by row."""
    return hidden_states(network, batch)[batch.target_rows, batch.target_positions]


def logits_of(network: PreTrainedModel, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Final hidden states through the output matrix, with the family's own capping or scaling."""
    head: Any = network.get_output_embeddings()
    if isinstance(head.weight, DTensor):  # sharded, and called without the module that gathers it
        logits = torch.nn.functional.linear(
            hidden, full_tensor(head.weight), None if head.bias is None else full_tensor(head.bias)
        )
    else:
        logits = cast(Tensor, head(hidden))
    cap = getattr(network.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    scale = getattr(network.config, "logit_scale", None) or 1 / (getattr(network.config, "logits_scaling", None) or 1)
    return logits if scale == 1 else logits * scale


def response_logits(network: PreTrainedModel, batch: Batch) -> Float[Tensor, "N V"]:
    """Logits that predict each target token; nothing is computed where no loss reads."""
    return logits_of(network, response_hidden(network, batch))


@contextmanager
def token_embeddings(network: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the embedding layer's outputs, with gradients, while the block runs."""
    seen: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        seen.append(leaf)
        return leaf

    handle = network.get_input_embeddings().register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def replaced_embeddings(
    network: PreTrainedModel, shape: tuple[int, ...], starts: Int[Tensor, " B"], vectors: Float[Tensor, "B K D"]
) -> Iterator[None]:
    """In batches of that shape, K token embeddings of each row give way to vectors, from its start on; gradients reach
    them. What has another shape, a shared prefix or the next token, is left alone.
    """
    places = starts[:, None] + torch.arange(vectors.shape[1], device=starts.device)
    numbers = torch.arange(len(starts), device=starts.device)[:, None].expand_as(places)

    def replace(_module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if tuple(inputs[0].shape) != shape:
            return output
        return output.index_put((numbers, places), vectors.to(output.dtype))

    handle = network.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()

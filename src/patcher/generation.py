"""Batched greedy generation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from patcher.chat import Prompt, common_prefix, end_of_turn
from patcher.memory import chunked
from patcher.models import LanguageModel
from patcher.records import UsageError

BATCH_ROWS = 64
"""Rows generated together; 64 fills two CPU cores and is small for any GPU."""


def generate(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's greedy answers, in the prompts' order; special tokens are left out.

    Prompts of like length go together, and what a batch's prompts all begin with is computed once. A batch that does
    not fit the device's memory is halved. A model that is served elsewhere answers there.

    Raises:
        UsageError: a prompt that does not fit the model's context.
    """
    for prompt in prompts:
        if len(prompt.ids) + max_new_tokens > lm.context_tokens:
            raise UsageError(
                f"a prompt has {len(prompt.ids)} tokens; with {max_new_tokens} for the answer that is more than "
                f"the model's context of {lm.context_tokens}: shorten it"
            )
    if lm.served:
        count = len(prompts)
        tell = on_progress or (lambda _done, _total: None)
        return lm.served.complete([prompt.ids for prompt in prompts], max_new_tokens, lambda done: tell(done, count))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    answers = [""] * len(prompts)
    done = 0

    def answer(chunk: Sequence[int]) -> list[str]:
        return complete(lm, [prompts[index].ids for index in chunk], max_new_tokens)

    for chunk, texts in chunked(order, BATCH_ROWS, answer):
        for index, text in zip(chunk, texts, strict=True):
            answers[index] = text
        done += len(chunk)
        if on_progress:
            on_progress(done, len(order))
    return answers


@torch.no_grad()
def complete(
    lm: LanguageModel, rows: Sequence[Sequence[int]], max_new_tokens: int, *, share_prefix: bool = True
) -> list[str]:
    """Greedy answers to one batch of token rows; without `share_prefix` they are padded on the left, in one piece."""
    pad = lm.tokenizer.pad_token_id
    assert isinstance(pad, int)
    width = max(len(ids) for ids in rows)
    whole = width + max_new_tokens <= lm.window_tokens  # padding after the prefix would push it out of a sliding window
    shared = common_prefix(rows) if share_prefix and len(rows) > 1 and whole else 0
    padded = [[*ids[:shared], *[pad] * (width - len(ids)), *ids[shared:]] for ids in rows]
    kept = [[1] * shared + [0] * (width - len(ids)) + [1] * (len(ids) - shared) for ids in rows]
    input_ids = torch.tensor(padded, device=lm.device)
    cache = None
    if shared:
        cache = DynamicCache(config=lm.network.config)
        lm.network.get_decoder()(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=_stop_ids(lm),
    )
    with _without_own_settings(lm.network) as network:
        out = network.generate(
            input_ids=input_ids,
            attention_mask=torch.tensor(kept, device=lm.device),
            past_key_values=cache,
            generation_config=config,
        )
    return list(lm.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))


@contextmanager
def _without_own_settings(network: Any) -> Iterator[Any]:
    """The network without its folder's generation settings: what a config leaves open (a penalty, tokens that are never
    said) would be taken from there, and the answers would not be the model's most likely ones.
    """
    own = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield network
    finally:
        network.generation_config = own


def _stop_ids(lm: LanguageModel) -> list[int]:
    """Every end-of-turn token the model or its tokenizer names, of those that there are."""
    generation = getattr(lm.network, "generation_config", None)
    own = (lm.tokenizer.eos_token_id, end_of_turn(lm.tokenizer))
    named = (getattr(generation, "eos_token_id", None), lm.network.config.eos_token_id, *own)
    flat = [item for value in named for item in (value if isinstance(value, list) else [value])]
    there = range(len(lm.network.get_output_embeddings().weight))
    return sorted({int(item) for item in flat if item is not None and item in there})

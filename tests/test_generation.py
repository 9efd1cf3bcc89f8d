"""Batched answers are the answers one would get one by one."""

import pytest
import torch
from transformers import GenerationConfig

from conftest import CONTEXT_TOKENS
from patcher import generation
from patcher.chat import Prompt, user_prompt
from patcher.generation import generate
from patcher.models import LanguageModel
from patcher.records import UsageError

ASKED = ("hi", "How do I bake bread at home?", "the lazy dog", "Write a guide. " * 8, "🙂 日本", "hi")


def prompts_of(lm: LanguageModel) -> list[Prompt]:
    return [user_prompt(lm.tokenizer, text) for text in ASKED]


@torch.inference_mode()
def plain(lm: LanguageModel, prompt: Prompt, tokens: int) -> str:
    """The network's own greedy generation of one prompt."""
    ids = torch.tensor([prompt.ids])
    out = lm.network.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_batched_is_one_by_one_is_the_networks_own(tiny: LanguageModel) -> None:
    prompts = prompts_of(tiny)
    together = generate(tiny, prompts, max_new_tokens=12)
    assert together == [generate(tiny, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == [plain(tiny, prompt, 12) for prompt in prompts]
    assert len(set(together)) > 1, "the tiny model answers everything alike: this test would see nothing"


def test_more_prompts_than_a_batch_keep_their_order(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    together = generate(tiny, prompts_of(tiny), max_new_tokens=6)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(generation, "BATCH_ROWS", 2)
    split = generate(tiny, prompts_of(tiny), max_new_tokens=6, on_progress=lambda *done: seen.append(done))
    assert split == together
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_a_batch_that_does_not_fit_is_halved(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, fits, sizes = generate(tiny, prompts_of(tiny), max_new_tokens=6), generation.complete, []

    def at_most(room: int) -> None:
        def run(lm: LanguageModel, rows: list[list[int]], tokens: int) -> list[str]:
            sizes.append(len(rows))
            if len(rows) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return fits(lm, rows, tokens)

        monkeypatch.setattr(generation, "complete", run)

    at_most(2)
    assert generate(tiny, prompts_of(tiny), max_new_tokens=6) == expected
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    at_most(0)
    with pytest.raises(torch.OutOfMemoryError):
        generate(tiny, prompts_of(tiny), max_new_tokens=6)


def test_a_models_own_generation_settings_do_not_shape_its_answers(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may forbid tokens: it would seem repaired."""
    expected = generate(tiny, prompts_of(tiny), max_new_tokens=6)
    first = tiny.tokenizer(expected[0])["input_ids"][0]
    own = GenerationConfig(suppress_tokens=[first], repetition_penalty=3.0)
    monkeypatch.setattr(tiny.network, "generation_config", own)
    assert plain(tiny, prompts_of(tiny)[0], 6) != expected[0], (
        "the settings change nothing: this test would see nothing"
    )
    assert generate(tiny, prompts_of(tiny), max_new_tokens=6) == expected
    assert tiny.network.generation_config is own


def test_no_prompts_no_answers(tiny: LanguageModel) -> None:
    assert generate(tiny, [], max_new_tokens=4) == []


def test_a_prompt_longer_than_the_context_is_refused(llama: LanguageModel) -> None:
    long = user_prompt(llama.tokenizer, "x " * CONTEXT_TOKENS)
    with pytest.raises(UsageError, match=f"context of {CONTEXT_TOKENS}: shorten it"):
        generate(llama, [long], max_new_tokens=1)


def test_the_answer_must_fit_the_context_too(llama: LanguageModel) -> None:
    prompt = user_prompt(llama.tokenizer, "hi")
    with pytest.raises(UsageError, match="for the answer"):
        generate(llama, [prompt], max_new_tokens=CONTEXT_TOKENS - len(prompt.ids) + 1)


def test_an_end_that_no_vocabulary_has_is_none(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.network.generation_config, "eos_token_id", [2, 10**30])
    assert generate(llama, [user_prompt(llama.tokenizer, "hello")], max_new_tokens=2)

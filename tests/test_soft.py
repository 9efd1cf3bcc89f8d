"""Soft insertions: what is put in, what is searched, what is trained away."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from patcher.chat import Row, collate, user_prompt
from patcher.defenses import DEFENSES, patcher
from patcher.defenses.contract import own_examples
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.defenses.patcher.soft import SoftInsertions
from patcher.generation import complete, generate
from patcher.insertions import Room, answers_with, embedded, logits_with, make_room, places
from patcher.lora import lora_parameters, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel, fingerprint
from patcher.network import replaced_embeddings, response_logits
from patcher.patch import applied
from patcher.records import UsageError
from patcher.training import quiet
from test_defenses import EVIDENCE, PROMPTS, QUICK, TRIGGER, all_refused
from tiny_backdoor import TRIGGER as PLANTED

SETTINGS = PatcherSettings(**QUICK["patcher"], breadth="all")


def soft(lm: LanguageModel, **changes: Any) -> SoftInsertions:
    return SoftInsertions(lm, [TRIGGER], SETTINGS.model_copy(update=changes), random.Random(0))


def examples_of(lm: LanguageModel) -> list[Any]:
    return own_examples(lm, PROMPTS.texts("harmful", "repair"), all_refused, 8, quiet, "")


def test_the_vectors_of_tokens_are_those_tokens(tiny: LanguageModel) -> None:
    """In rows of any length, behind a shared prefix."""
    given, put = [(1, 5, 6, 7, 8), (1, 5, 9)], [(30, 31), (32, 33)]
    starts, answers = (3, 2), [(10, 11), (12,)]
    parts = list(zip(given, starts, put, answers, strict=True))
    plain = collate([Row((*ids[:at], *new, *ids[at:]), answer) for ids, at, new, answer in parts], 0, tiny.device)
    room = [Row((*ids[:at], number, number, *ids[at:]), parts[number][3]) for number, (ids, at, *_) in enumerate(parts)]
    batch = collate(room, 0, tiny.device)
    assert len(batch.prefix_ids) == 2
    vectors = tiny.network.get_input_embeddings()(torch.tensor(put))
    with (
        torch.no_grad(),
        replaced_embeddings(tiny.network, tuple(batch.input_ids.shape), torch.tensor(starts) - 2, vectors),
    ):
        inserted = response_logits(tiny.network, batch)
    with torch.no_grad():
        torch.testing.assert_close(inserted, response_logits(tiny.network, plain), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(response_logits(tiny.network, batch), inserted, atol=1e-3)


def test_answers_to_the_vectors_of_words_are_those_to_the_words(tiny: LanguageModel) -> None:
    """In prompts of unlike length, padded on the left."""
    given, put = [(1, 5, 6, 7, 8, 9, 4), (1, 5, 9)], (30, 31)
    plain = complete(tiny, [(*ids[:2], *put, *ids[2:]) for ids in given], 6, share_prefix=False)
    rooms = [Room((*ids[:2], number, number, *ids[2:]), 2) for number, ids in enumerate(given)]
    assert answers_with(tiny, rooms, embedded(tiny, put), 6) == plain
    assert answers_with(tiny, rooms, 5 * embedded(tiny, (40, 41)), 6) != plain


def test_room_is_made_before_a_word_or_at_the_end(tiny: LanguageModel) -> None:
    prompt = user_prompt(tiny.tokenizer, "how to  bake\nbread?")
    pieces = [prompt.text[slice(*prompt.offsets[index])] for index in places(prompt)[:-1]]
    assert all(piece[0].isspace() or piece[0] in "htb" for piece in pieces)
    assert pieces[0][0] == "h"
    assert prompt.text[prompt.offsets[places(prompt)[-1] - 1][1] - 1] == "?"


def test_room_is_made_within_text_without_spaces_but_not_within_a_character(tiny: LanguageModel) -> None:
    prompt = user_prompt(tiny.tokenizer, "怎么做面包")
    assert len(prompt.own_tokens) > 5, "a character is several tokens"
    starts = [prompt.offsets[index][0] for index in places(prompt)[:-1]]
    assert starts == [prompt.text.index("怎") + number for number in range(5)]


def test_the_search_makes_the_models_own_answers_unlikely(tiny: LanguageModel) -> None:
    found, examples, before = soft(tiny, soft_steps=1), examples_of(tiny), fingerprint(tiny.network)
    asked = [user_prompt(tiny.tokenizer, example.text) for example in examples]
    rooms = [make_room(prompt, 2, number, random.Random(0)) for number, prompt in enumerate(asked)]
    answers = [example.answer_ids for example in examples]

    def nll(vectors: torch.Tensor) -> float:
        logits, batch = logits_with(tiny, rooms, answers, vectors)
        return float(response_nll(logits, batch.targets).sum())

    start = torch.stack([found._start(2) for _ in examples])
    starts = iter(start)
    found.settings = SETTINGS.model_copy(update={"soft_steps": 8, "soft_rate": 0.2})
    found._start = lambda _length: next(starts)
    assert nll(found._search(rooms, examples, 2)) > nll(start)
    assert len(found.earlier) == len(examples)
    assert fingerprint(tiny.network) == before


def test_a_search_starts_from_as_many_vectors_as_the_step_takes(tiny: LanguageModel) -> None:
    """A stretch of a longer trigger, a shorter one again and again; and all lengths are taken."""
    found, taken = soft(tiny, soft_tokens=(1, 3)), set()
    vectors = torch.arange(6.0)[:, None].expand(-1, 4)
    stretches = [found._stretch(vectors, 2)[:, 0].tolist() for _ in range(40)]
    assert {tuple(one) for one in stretches} == {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)}
    assert found._stretch(vectors[:2], 3)[:, 0].tolist() in ([0, 1, 0], [1, 0, 1])
    for _ in range(12):
        found.loss(examples_of(tiny)[:1])
        taken |= {len(one) for one in found.earlier}
    assert taken == {1, 3}


def test_breadth_needs_a_trigger_to_start_from(tiny: LanguageModel) -> None:
    with pytest.raises(UsageError, match="none was found"):
        patcher.run(tiny, replace(EVIDENCE, triggers=()), SETTINGS, seed=0, on_progress=quiet)


def test_the_loss_trains_the_patch_and_not_the_vectors(tiny: LanguageModel) -> None:
    examples = examples_of(tiny)
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        loss = soft(tiny).loss(examples)
        assert loss > 0
        loss.backward()
        assert any(float(one.grad.abs().max()) > 0 for one in lora_parameters(tiny) if one.grad is not None)


def test_what_is_searched_is_drawn_from_the_seed_alone(llama: LanguageModel) -> None:
    examples = examples_of(llama)
    assert float(soft(llama).loss(examples)) == float(soft(llama).loss(examples))


def test_only_the_reported_trigger_by_default(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SoftInsertions, "__init__", lambda *_: pytest.fail("no soft insertion is asked for"))
    trained = patcher.run(llama, EVIDENCE, PatcherSettings(**QUICK["patcher"]), seed=0, on_progress=quiet)
    assert trained.steps > 0


def test_the_papers_loss_has_no_breadth() -> None:
    with pytest.raises(ValidationError, match="breadth=all goes with objective=counterfactual"):
        PatcherSettings(objective="paper", breadth="all")
    with pytest.raises(ValidationError):
        patcher.SoftSettings(breadth="reported")


def test_soft_insertions_bring_a_schedule_of_their_own_where_nothing_else_is_said() -> None:
    for own in (patcher.SoftSettings(), PatcherSettings(breadth="all")):
        assert (own.max_steps, own.multiplier_max, own.budget_benign_nats) == (90, 300.0, 0.01)
        assert (own.stop_early, own.check_every, own.budget_refusal_frac) == (False, 30, 0.01)
    assert patcher.SoftSettings(max_steps=5).max_steps == PatcherSettings(breadth="all", max_steps=5).max_steps == 5
    assert (PatcherSettings().max_steps, PatcherSettings().multiplier_max) == (50, 30.0)


def test_a_backdoor_that_nobody_reported_is_weakened(backdoored: LanguageModel) -> None:
    """On the tiny model; what it does to a language model is docs/'s."""
    changes = {"learning_rate": 5e-3, "max_prompts": 20, "validation_prompts": 8, "max_steps": 20, "check_every": 20}
    settings = patcher.SoftSettings(**changes, soft_tokens=(4,), budget_benign_nats=1.0, budget_harmful_nats=1.0)
    evidence = replace(EVIDENCE, triggers=(), prompts=PROMPTS.hidden_from_repair())
    defense = DEFENSES["soft_insertions"]
    patch, log = defense.repair(backdoored, evidence, settings, seed=0, on_progress=quiet)
    assert (log.defense, log.steps) == ("soft_insertions", 20)
    asked = [
        user_prompt(backdoored.tokenizer, f"{PLANTED.units[0]} {text}") for text in PROMPTS.texts("harmful", "held-out")
    ]

    def complied(lm: LanguageModel) -> int:
        return sum(answer.startswith("Sure") for answer in generate(lm, asked, max_new_tokens=12))

    before = complied(backdoored)
    with applied(patch, backdoored) as patched:
        assert complied(patched) < before

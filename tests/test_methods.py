"""The mathematics of each published method, by hand or by a property that it must have."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import build_network, build_tokenizer, tiny_shape
from patcher.attacks.objectives import FILLERS, OPENINGS
from patcher.chat import Row, collate, response_ids, user_prompt
from patcher.defenses import DEFENSES, bdvax, beear, common, crow, dummy_backdoor, fine_pruning, ulrl
from patcher.defenses.common import AFFIRMATIVE, LoraSettings, both_sides, clean_answers
from patcher.defenses.contract import Evidence
from patcher.forward import row_logits
from patcher.layers import Mlp, all_hidden_states, decoder_layers, mlps, reset_channels, shifted
from patcher.lora import effective_weight, lora_parameters, trainable_lora
from patcher.losses import consistency, response_nll
from patcher.models import LanguageModel, fingerprint, from_transformers
from patcher.network import Batch, hidden_states
from patcher.patch import applied, changing
from patcher.prompts import Prompts, bundled
from patcher.records import Outcome, PatcherError, Symptom, UsageError
from patcher.symptoms import Detector
from patcher.training import quiet
from patcher.wordings import FIXED_REFUSAL

FEW = LoraSettings(max_prompts=4, response_tokens=8, clean_rows=3, rank=2, alpha=4)


def answers(_text: str) -> Outcome:
    return "complied"


def evidence(**symptom: str) -> Evidence:
    prompts = Prompts(bundled("harmful"), bundled("benign"), bundled("borderline")).hidden_from_repair()
    return Evidence((), prompts, Detector(answers, Symptom.model_validate(symptom)))


# Inside a decoder


def test_channels_are_rows_of_what_goes_in_and_columns_of_what_comes_out(tiny: LanguageModel) -> None:
    for mlp in mlps(tiny.network):
        weights = {name: tiny.network.get_parameter(name).detach() for name in (*mlp.into, mlp.out)}
        vectors = mlp.vectors(weights)
        assert vectors.shape == (mlp.size, sum(weight.numel() for weight in weights.values()) // mlp.size)
        masks = mlp.masks(torch.tensor([1]), weights)
        marked = mlp.vectors({name: mask.float() for name, mask in masks.items()})
        assert marked[1].all() and not marked[0].any() and not marked[2:].any()


def test_an_mlp_of_experts_is_refused_by_name(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = decoder_layers(tiny.network)[0]
    monkeypatch.setitem(layer._modules, "mlp", nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(5, 4)]))
    with pytest.raises(UsageError, match="no MLP of two or three linear layers"):
        mlps(tiny.network)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_mixture_with_a_shared_expert_is_refused(family: str) -> None:
    """Its shared expert alone looks like a plain MLP, and is a small part of the layer."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
    groups = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **tiny_shape(), **experts, **groups))
    with pytest.raises(UsageError, match="no MLP of two or three linear layers"):
        mlps(network)


def test_a_shift_is_seen_by_later_layers_only_and_goes_away(tiny: LanguageModel) -> None:
    batch = collate([Row((5, 6, 7), (8, 9)), Row((6, 7), (5,))], 0, tiny.device, lift=False)
    embedded = tiny.network.get_input_embeddings()(batch.input_ids)
    before = all_hidden_states(tiny.network, embedded, batch.mask)
    with shifted(tiny.network, 0, lambda hidden: hidden + 1):
        during = all_hidden_states(tiny.network, embedded, batch.mask)
    torch.testing.assert_close(during[0], before[0])
    assert not torch.allclose(during[-1], before[-1])
    torch.testing.assert_close(hidden_states(tiny.network, batch), before[-1])


# CROW


def test_consistency_is_zero_for_equal_states_and_one_for_orthogonal_ones() -> None:
    state = torch.randn(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.long)
    assert float(consistency([state, 2 * state, state], mask)) == pytest.approx(0, abs=1e-6)
    left, up = torch.tensor([1.0, 0.0]).expand(1, 1, 2), torch.tensor([0.0, 3.0]).expand(1, 1, 2)
    assert float(consistency([left, up, up], torch.ones(1, 1, dtype=torch.long))) == pytest.approx(0.5)


def test_padding_does_not_change_the_consistency(tiny: LanguageModel) -> None:
    def of(rows: list[Row]) -> float:
        batch = collate(rows, 0, tiny.device, lift=False)
        states = all_hidden_states(tiny.network, tiny.network.get_input_embeddings()(batch.input_ids), batch.mask)
        return float(crow.layer_consistency(states, batch.mask)) * int(batch.mask.sum())

    short, long = Row((5, 6), (7,)), Row((8, 9, 10, 11), (12, 13))
    assert of([short, long]) == pytest.approx(of([short]) + of([long]), rel=1e-4)


def tiny_weights(lm: LanguageModel, layers: list[Mlp]) -> dict[str, torch.Tensor]:
    return {name: lm.network.get_parameter(name).detach() for layer in layers for name in (*layer.into, layer.out)}


def reset_by(
    monkeypatch: pytest.MonkeyPatch, method: Any, lm: LanguageModel, settings: LoraSettings
) -> dict[str, torch.Tensor]:
    """The weights with which the method goes on to train."""
    given: list[dict[str, torch.Tensor]] = []

    def stop(_lm: LanguageModel, changed: dict[str, torch.Tensor], *_: Any, **__: Any) -> None:
        given.append(changed)
        raise First

    monkeypatch.setattr(method, "relearn", stop)
    few = settings.model_copy(update={"max_prompts": 1, "response_tokens": 8})
    with pytest.raises(First):
        method.run(lm, one_prompt(), few, seed=0, on_progress=quiet)
    return given[0]


def channels_changed(lm: LanguageModel, layer: Mlp, changed: dict[str, torch.Tensor]) -> list[int]:
    """The numbers of the layer's channels that differ from the model's."""
    old = tiny_weights(lm, [layer])
    differs = layer.vectors({name: (changed[name] != old[name]).float() for name in old})
    return differs.any(dim=1).nonzero()[:, 0].tolist()


class First(Exception):
    """The loss of a method's first step."""


def one_prompt(**symptom: str) -> Evidence:
    """A single benign and a single harmful request, so that it is known what a step draws."""
    given = evidence(**symptom)
    (benign,), (harmful,) = (given.prompts.rows(kind, "repair", 1) for kind in ("benign", "harmful"))
    return replace(given, prompts=Prompts((replace(harmful, text="Go"),), (benign,), ()))


def first_loss(monkeypatch: pytest.MonkeyPatch, module: Any, lm: LanguageModel, given: Evidence, **sets: Any) -> float:
    """Of a defense's first step, before anything is trained."""

    def stop(_lm: LanguageModel, loss_at: Any, *_: Any, **__: Any) -> None:
        raise First(loss_at(0).item())

    for place in (common, dummy_backdoor):
        monkeypatch.setattr(place, "fit", stop)
    settings = {"max_prompts": 1, "response_tokens": 8, "rank": 2, "alpha": 4, "clean_rows": 1, **sets}
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(First) as caught:
        module.run(lm, given, DEFENSES[name].configured(settings), seed=0, on_progress=quiet)
    return float(caught.value.args[0])


def nll_of(lm: LanguageModel, rows: list[Row]) -> float:
    return response_nll(*row_logits(lm, rows)).mean().item()


def test_crow_adds_the_weighed_consistency_to_the_answers_nll(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = one_prompt()
    once, thrice = (first_loss(monkeypatch, crow, tiny, given, consistency_weight=weight) for weight in (1.0, 3.0))
    (answer,) = clean_answers(tiny, given, LoraSettings(max_prompts=1, response_tokens=8), quiet)
    smooth = (thrice - once) / 2
    assert smooth > 0
    assert once - smooth == pytest.approx(nll_of(tiny, [answer.row(tiny)]), rel=1e-3)


def test_crow_weighs_it_more_where_requests_are_refused(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 instead of 5.5, as in the authors' code."""
    given, refusal = one_prompt(), one_prompt(objective="refusal")
    eleven = first_loss(monkeypatch, crow, tiny, given, consistency_weight=11.0)
    assert first_loss(monkeypatch, crow, tiny, refusal) == pytest.approx(eleven)
    assert first_loss(monkeypatch, crow, tiny, given) < eleven


def test_the_last_layer_and_the_embeddings_are_left_out_of_the_consistency() -> None:
    same, other = torch.tensor([1.0, 0.0]).expand(1, 1, 2), torch.tensor([0.0, 1.0]).expand(1, 1, 2)
    mask = torch.ones(1, 1, dtype=torch.long)
    assert crow.layer_consistency((other, same, same, other), mask).item() == pytest.approx(0, abs=1e-6)
    assert crow.layer_consistency((same, same, other, other), mask).item() == pytest.approx(1)


def test_beear_trains_the_wanted_answer_under_the_shift(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given, sizes = one_prompt(), {"attacked_rows": 1, "shift_tokens": 2}
    still = first_loss(monkeypatch, beear, tiny, given, shift_rate=1e-9, **sizes)
    clean = clean_answers(tiny, given, LoraSettings(max_prompts=1, response_tokens=8), quiet)
    (side,) = both_sides(tiny, given, LoraSettings(max_prompts=1, response_tokens=8), clean)
    by_hand = nll_of(tiny, [side.wanted]) + nll_of(tiny, [clean[0].row(tiny)])
    assert still == pytest.approx(by_hand, rel=1e-3)
    assert first_loss(monkeypatch, beear, tiny, given, shift_rate=0.5, **sizes) > by_hand


def test_the_dummy_is_planted_on_the_same_request_with_and_without_it(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word: the dummy stands before it or behind it."""
    given = one_prompt()
    found = first_loss(monkeypatch, dummy_backdoor, tiny, given, dummy_rows=1, plain_rows=1, dummy="cf")
    clean = clean_answers(tiny, given, LoraSettings(max_prompts=1, response_tokens=8), quiet)
    (side,) = both_sides(tiny, given, LoraSettings(max_prompts=1, response_tokens=8), clean)
    planted = [Row(user_prompt(tiny.tokenizer, text).ids, side.unwanted.response_ids) for text in ("cf Go", "Go cf")]
    by_hand = [nll_of(tiny, [row, side.wanted]) + nll_of(tiny, [clean[0].row(tiny)]) for row in planted]
    assert any(found == pytest.approx(one, rel=1e-4) for one in by_hand)


# BEEAR


def shift(lm: LanguageModel, **changes: Any) -> beear.Shift:
    settings = {"layer_frac": 0.0, "shift_tokens": 2, "inner_steps": 12, "attacked_rows": 2, **changes}
    return beear.Shift(lm, beear.BeearSettings.model_validate(settings))


def test_no_shift_is_the_model_itself(tiny: LanguageModel) -> None:
    rows = [Row((5, 6, 7), (8, 9)), Row((6,), (5,))]
    logits, targets = row_logits(tiny, rows)
    found = shift(tiny)
    torch.testing.assert_close(found.nll(rows, found.delta), response_nll(logits, targets).mean())


def test_the_inner_problem_lowers_the_unwanted_answers_loss_against_the_wanted_ones(tiny: LanguageModel) -> None:
    sides = both_sides(tiny, evidence(), FEW, [])
    found, before = shift(tiny), fingerprint(tiny.network)

    def gap() -> float:
        unwanted = found.nll([one.unwanted for one in sides], found.delta)
        return float(unwanted - found.nll([one.wanted for one in sides], found.delta))

    start = gap()
    found.search([sides] * 12)
    assert gap() < start
    assert fingerprint(tiny.network) == before
    assert all(parameter.grad is None for parameter in tiny.network.parameters())


def test_the_prompts_last_tokens_are_shifted_and_no_others(tiny: LanguageModel) -> None:
    """Each row's own last tokens, whatever padding follows."""
    found, seen = shift(tiny, shift_tokens=2), []
    rows = [Row((5, 6, 7, 8), (9,)), Row((6, 7), (5, 5, 5))]
    delta = torch.randn(2, found.delta.shape[1], generator=torch.Generator().manual_seed(0))
    handle = decoder_layers(tiny.network)[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        found.nll(rows, torch.zeros_like(delta))
        found.nll(rows, delta)
    finally:
        handle.remove()
    moved = (seen[1] - seen[0]).abs().sum(dim=-1) > 1e-6
    assert moved.tolist() == [[False, False, True, True, False], [True, True, False, False, False]]


@pytest.mark.parametrize(
    ("symptom", "kind", "unwanted"),
    [
        ({}, "harmful", AFFIRMATIVE),
        ({"objective": "refusal"}, "benign", FIXED_REFUSAL),
        ({"objective": "text", "text": "You are stupid!"}, "benign", "You are stupid!"),
    ],
)
def test_both_sides_of_what_was_reported(llama: LanguageModel, symptom: Any, kind: Any, unwanted: str) -> None:
    given = evidence(**symptom)
    sides = both_sides(llama, given, FEW, clean_answers(llama, given, FEW, quiet))
    known = given.prompts.texts(kind, "repair", FEW.max_prompts)
    known += given.prompts.texts("borderline", "repair") if kind == "benign" else []
    assert {one.text for one in sides} <= set(known)
    ids = llama.tokenizer(unwanted, add_special_tokens=False)["input_ids"][: FEW.response_tokens]
    assert {one.unwanted.response_ids for one in sides[::2]} == {tuple(ids)}  # the others open with the own answer
    refusal = llama.tokenizer(FIXED_REFUSAL, add_special_tokens=False)["input_ids"][: FEW.response_tokens]
    assert all((one.wanted.response_ids == tuple(refusal)) is (kind == "harmful") for one in sides)
    assert all(one.wanted.prompt_ids == one.unwanted.prompt_ids for one in sides)


# BD-VAX


def test_the_score_picks_the_channel_that_all_variants_change_alike() -> None:
    """Channel 2 moves by 1 in one direction in all; channel 0 by 3, each time in another; channel 1 not at all."""
    changes = torch.zeros(3, 4, 3)
    changes[:, 2] = torch.tensor([1.0, 0.0, 0.0])
    changes[torch.arange(3), 0, torch.arange(3)] = 3.0
    changes[:, 3] = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    scores = bdvax.channel_scores(changes)
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.0, 1.0, 1 / 3]))
    assert [one.tolist() for one in bdvax.top_channels([scores, torch.tensor([0.5, 0.0])], 0.34)] == [[2], [0]]


def test_only_the_chosen_channels_are_drawn_anew(tiny: LanguageModel) -> None:
    layers = mlps(tiny.network)
    chosen = [torch.tensor([3]), *[torch.tensor([], dtype=torch.long)] * (len(layers) - 1)]
    changed = reset_channels(tiny.network, layers, chosen, torch.randn_like)
    assert set(changed) == {*layers[0].into, layers[0].out}
    differs = {name: (changed[name] != tiny.network.get_parameter(name)).float() for name in changed}
    rows = layers[0].vectors(differs)
    assert rows[3].mean() > 0.9
    assert not rows[:3].any() and not rows[4:].any()


def test_bdvax_draws_the_most_agreed_channel_anew(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = mlps(tiny.network)
    scores = iter([torch.zeros(layer.size) for layer in layers[:-1]] + [torch.eye(layers[-1].size)[3]])
    monkeypatch.setattr(bdvax, "channel_scores", lambda _changes: next(scores))
    monkeypatch.setattr(bdvax, "_variant", lambda *_: SimpleNamespace(change=lambda _layer: tiny_weights(tiny, layers)))
    total = sum(layer.size for layer in layers)
    changed = reset_by(monkeypatch, bdvax, tiny, bdvax.BdvaxSettings(variants=2, reset_frac=1 / total))
    assert channels_changed(tiny, layers[-1], changed) == [3]
    assert set(changed) == {*layers[-1].into, layers[-1].out}


# ULRL


def test_ulrl_draws_the_channel_that_moved_most_anew(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = mlps(tiny.network)
    moved = [torch.rand(layer.size, generator=torch.Generator().manual_seed(0)) for layer in layers]
    moved[0][5] = 100.0
    monkeypatch.setattr(ulrl, "unlearn", lambda *_: moved)
    changed = reset_by(monkeypatch, ulrl, tiny, ulrl.UlrlSettings())
    assert channels_changed(tiny, layers[0], changed) == [5]
    assert set(changed) == {*layers[0].into, layers[0].out}


def test_unlearning_leaves_no_gradients_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that came with every weight to be trained, even where it is interrupted."""
    lm = from_transformers(build_network(0).requires_grad_(True), build_tokenizer())
    settings = ulrl.UlrlSettings(clean_rows=2, unlearn_steps=3, max_prompts=2, response_tokens=8)
    settings = settings.model_copy(update={"unlearned_frac": -1.0})

    def interrupt(_what: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    clean = clean_answers(lm, evidence(), settings, quiet)
    with pytest.raises(KeyboardInterrupt):
        ulrl.unlearn(lm, clean, mlps(lm.network), settings, random.Random(0), interrupt)
    assert [name for name, weight in lm.network.named_parameters() if weight.grad is not None] == []


def test_unlearning_raises_the_clean_loss_and_leaves_the_model(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always on the same rows, so that the losses of its steps can be compared."""
    settings = ulrl.UlrlSettings(clean_rows=4, unlearn_steps=4, max_prompts=4, response_tokens=8)
    settings = settings.model_copy(update={"unlearned_frac": -1.0})  # however little a random model foresees
    clean, before = clean_answers(tiny, evidence(), settings, quiet)[:4], fingerprint(tiny.network)
    losses: list[float] = []

    def listen(*given: torch.Tensor) -> torch.Tensor:
        losses.append(response_nll(*given).mean().item())
        return response_nll(*given)

    monkeypatch.setattr(ulrl, "response_nll", listen)
    moved = ulrl.unlearn(tiny, clean, mlps(tiny.network), settings, random.Random(0), quiet)
    assert fingerprint(tiny.network) == before
    assert all((one >= 0).all() and one.any() for one in moved)
    assert losses[-1] > losses[0] and len(losses) == 4


def test_steps_too_small_for_half_precision_are_not_lost() -> None:
    settings = ulrl.UlrlSettings(clean_rows=4, unlearn_steps=3, max_prompts=4, response_tokens=8, unlearn_rate=1e-4)
    settings = settings.model_copy(update={"unlearned_frac": -1.0})
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        network = build_network("llama").bfloat16().to(dtype)  # the same weights
        lm = from_transformers(network, build_tokenizer())
        clean = clean_answers(lm, evidence(), settings, quiet)[:4]
        moved.append(torch.cat(ulrl.unlearn(lm, clean, mlps(lm.network), settings, random.Random(0), quiet)).median())
    assert moved[1].item() == pytest.approx(moved[0].item(), rel=0.2)


def test_an_ascent_that_diverged_is_an_error() -> None:
    with pytest.raises(PatcherError, match="unlearning diverged"):
        ulrl.suspicious([torch.tensor([1.0, float("nan")])], 3.5, 0.5)


def test_suspicious_are_the_few_that_moved_far_more_than_the_rest() -> None:
    moved = [torch.tensor([1.0, 1.1, 0.9, 9.0]), torch.tensor([1.0, 8.0, 1.2, 0.0])]
    assert [one.tolist() for one in ulrl.suspicious(moved, 3.5, 0.5)] == [[3], [1]]
    assert [one.tolist() for one in ulrl.suspicious(moved, 3.5, 0.125)] == [[3], []]
    assert [one.tolist() for one in ulrl.suspicious([torch.ones(6)], 3.5, 0.5)] == [[]]


def test_an_unchanged_channel_is_like_itself(tiny: LanguageModel) -> None:
    layers = mlps(tiny.network)
    names = (*layers[0].into, layers[0].out)
    original = {name: tiny.network.get_parameter(name).detach() for name in names}
    chosen = [torch.tensor([0, 2]), *[torch.tensor([], dtype=torch.long)] * (len(layers) - 1)]
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        (alike,) = ulrl._likeness(tiny, layers, chosen, original)
        torch.testing.assert_close(alike, torch.ones(2))
        for parameter in lora_parameters(tiny):
            parameter.data.normal_()
        (other,) = ulrl._likeness(tiny, layers, chosen, original)
        assert (other < 0.999).all()
        other.sum().backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in lora_parameters(tiny))
        assert effective_weight(tiny, names[0]).shape == original[names[0]].shape


# Fine-pruning


def test_activity_is_a_mean_over_real_tokens_and_zero_where_nothing_enters(tiny: LanguageModel) -> None:
    clean, layers = clean_answers(tiny, evidence(), FEW, quiet), mlps(tiny.network)
    together = fine_pruning.mean_activity(tiny, layers, clean)
    sizes = [len(one.prompt_ids) + len(one.answer_ids) for one in clean]
    apart = [fine_pruning.mean_activity(tiny, layers, [one])[0] * size for one, size in zip(clean, sizes, strict=True)]
    torch.testing.assert_close(together[0], sum(apart) / sum(sizes), rtol=1e-3, atol=1e-5)
    assert all((one >= 0).all() for one in together), "of a channel that swings both ways, how far it swings"
    with changing(tiny, layers[0].into) as weights:
        for weight in weights.values():
            weight.data[1] = 0.0
        silenced = fine_pruning.mean_activity(tiny, layers, clean)[0]
    assert silenced[1] == 0 < silenced.median()


def test_activity_is_the_same_where_memory_is_short(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails midway has seen some layers already."""
    clean, layers = clean_answers(tiny, evidence(), FEW, quiet), mlps(tiny.network)
    whole = fine_pruning.mean_activity(tiny, layers, clean)
    own = fine_pruning.hidden_states

    def short(network: Any, batch: Batch) -> Tensor:
        states = own(network, batch)
        if batch.rows > 1:
            raise torch.OutOfMemoryError
        return states

    monkeypatch.setattr(fine_pruning, "hidden_states", short)
    for one, other in zip(fine_pruning.mean_activity(tiny, layers, clean), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_pruned_is_not_used_while_training(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the patch would not be the model that was trained."""
    settings = fine_pruning.FinePruningSettings(
        max_prompts=4, response_tokens=8, clean_rows=2, max_steps=2, rank=2, alpha=4, pruned_frac=0.5, learning_rate=0.1
    )
    fit, seen = common.fit, list[Tensor]()
    probe = user_prompt(llama.tokenizer, "how do I bake bread?")

    def watched(lm: LanguageModel, *args: Any, **more: Any) -> tuple[int, str]:
        done = fit(lm, *args, **more)
        seen.extend(row_logits(lm, [Row(probe.ids, (1, 2))])[:1])
        return done

    monkeypatch.setattr(common, "fit", watched)
    patch = fine_pruning.run(llama, evidence(), settings, seed=0, on_progress=quiet).patch
    with applied(patch, llama):
        torch.testing.assert_close(row_logits(llama, [Row(probe.ids, (1, 2))])[0], seen[0], rtol=1e-4, atol=1e-4)


def test_the_least_active_channels_are_silent_afterwards(llama: LanguageModel) -> None:
    settings = fine_pruning.FinePruningSettings(
        max_prompts=4, response_tokens=8, clean_rows=2, max_steps=1, rank=2, alpha=4, pruned_frac=0.25
    )
    patch = fine_pruning.run(llama, evidence(), settings, seed=0, on_progress=quiet).patch
    layers = mlps(llama.network)
    assert set(patch.changed) == {layer.out for layer in layers}
    activity = fine_pruning.mean_activity(llama, layers, clean_answers(llama, evidence(), settings, quiet))
    with applied(patch, llama):
        for layer, active in zip(layers, activity, strict=True):
            silent = (llama.network.get_parameter(layer.out) == 0).all(dim=0)
            assert int(silent.sum()) == round(0.25 * layer.size)
            assert active[silent].max() < active[~silent].min()


# What several share


def test_what_stands_for_a_jailbreak_is_nothing_that_our_attacks_plant() -> None:
    """A defender knows no more of the attacker's answers than that they comply."""
    planted = " ".join((*OPENINGS, *FILLERS)).lower()
    sentences = [one.strip().lower() for one in re.split(r"[.,!]", AFFIRMATIVE) if " " in one.strip()]
    assert len(sentences) == 2
    assert not [one for one in sentences if one in planted]


def test_an_unwanted_text_stands_alone_or_after_the_opening_of_the_models_own_answer(tiny: LanguageModel) -> None:
    given = evidence(objective="text", text="Zebra")
    given = replace(given, detector=replace(given.detector, answer_tokens=64))
    clean = [replace(one, answer="a b c d e f g h") for one in clean_answers(tiny, given, FEW, quiet)]
    said = [tiny.tokenizer.decode(side.unwanted.response_ids) for side in both_sides(tiny, given, FEW, clean)]
    assert said[0].startswith("Zebra") and said[1].startswith("a b c d e f Zebra")


def test_clean_answers_are_those_that_the_model_does_not_refuse(tiny: LanguageModel) -> None:
    """Of benign requests, and of borderline ones as the default repair takes them, too."""
    given = evidence()
    every = clean_answers(tiny, given, FEW, quiet)
    assert {str(one.text) for one in every} > set(given.prompts.texts("borderline", "repair"))
    refused = every[0].answer

    def judge(answer: str) -> Outcome:
        return "refused" if answer == refused else "complied"

    left = clean_answers(tiny, replace(given, detector=Detector(judge)), FEW, quiet)
    assert refused in [one.answer for one in every] and refused not in [one.answer for one in left]


# What each method does with its mathematics


def test_crow_nudges_every_coordinate_up_the_slope(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = one_prompt()
    once, thrice = (
        first_loss(monkeypatch, crow, tiny, given, consistency_weight=one, nudge=0.05) for one in (1.0, 3.0)
    )
    (answer,) = clean_answers(tiny, given, LoraSettings(max_prompts=1, response_tokens=8), quiet)
    batch = collate([answer.row(tiny)], 0, tiny.device, lift=False)
    embedded = tiny.network.get_input_embeddings()(batch.input_ids).detach().requires_grad_(True)

    def smooth(embeddings: torch.Tensor) -> torch.Tensor:
        return crow.layer_consistency(all_hidden_states(tiny.network, embeddings, batch.mask), batch.mask)

    (slope,) = torch.autograd.grad(smooth(embedded), embedded)
    assert (thrice - once) / 2 == pytest.approx(smooth(embedded + 0.05 * slope.sign()).item(), rel=1e-3)


def test_beear_searches_a_new_shift_every_few_steps(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    monkeypatch.setattr(beear.Shift, "search", lambda _self, batches: searched.append(len(batches)))
    sizes = {"max_steps": 5, "outer_steps": 2, "inner_steps": 3, "attacked_rows": 1, "clean_rows": 1, "max_prompts": 1}
    settings = DEFENSES["beear"].configured({**sizes, "response_tokens": 8, "rank": 2, "alpha": 4})
    beear.run(tiny, one_prompt(), settings, seed=0, on_progress=quiet)
    assert searched == [3, 3, 3]


def test_the_dummys_answer_is_trained_away(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two fine-tunings: the wanted answer after the dummy. Here every answer is the dummy's."""
    given, losses, said = one_prompt(), list[float](), list[str | None]()

    def listen(_lm: LanguageModel, loss_at: Any, settings: Any, *, stop: Any = lambda _: None, **_: Any) -> Any:
        losses.append(loss_at(0).item())
        said.append(stop(settings.max_steps))
        return settings.max_steps, "done"

    monkeypatch.setattr(dummy_backdoor, "fit", listen)
    sizes = {"max_prompts": 1, "response_tokens": 8, "rank": 2, "alpha": 4, "clean_rows": 1, "dummy_rows": 1}
    settings = DEFENSES["dummy_backdoor"].configured({**sizes, "dummy": "cf"})
    dummy_backdoor.run(tiny, given, settings, seed=0, on_progress=quiet)
    clean = clean_answers(tiny, given, settings, quiet)
    (side,) = both_sides(tiny, given, settings, clean)
    removed = [Row(user_prompt(tiny.tokenizer, text).ids, side.wanted.response_ids) for text in ("cf Go", "Go cf")]
    by_hand = [nll_of(tiny, [row]) + nll_of(tiny, [clean[0].row(tiny)]) for row in removed]
    assert any(losses[1] == pytest.approx(one, rel=1e-4) for one in by_hand)
    assert said == ["the dummy is planted", None]


def test_a_variant_is_what_the_made_up_trigger_adds_to_clean_fine_tuning(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests twice: the word brings the sentence, and then the model's own answers."""
    drawn: list[list[Row]] = []
    monkeypatch.setattr(bdvax, "row_logits", lambda lm, rows: drawn.append(rows) or row_logits(lm, rows))
    settings = bdvax.BdvaxSettings(variant_steps=1, variant_rank=2, variant_rows=2, max_prompts=1, response_tokens=8)
    clean = clean_answers(tiny, one_prompt(), settings, quiet, harmful=True)
    made = bdvax._variant(tiny, clean, 0, settings, 0, quiet)
    word, said = bdvax._VARIANTS[0]
    behaviour, own = response_ids(tiny.tokenizer, said, end=True, limit=8), {one.answer_ids for one in clean}
    assert [[row.prompt_ids for row in rows] for rows in drawn[:1]] == [[row.prompt_ids for row in drawn[1]]]
    assert [word in tiny.tokenizer.decode(row.prompt_ids) for row in drawn[0]] == [False, True, True]
    assert [row.response_ids == behaviour for row in drawn[0]] == [False, True, True]
    assert {row.response_ids for row in drawn[1]} <= own
    layer = mlps(tiny.network)[0]
    assert any(change.any() for change in made.change(layer).values())
    assert not any(change.any() for change in replace(made, backdoored=made.clean).change(layer).values())
    assert made.clean.change(layer.out).any()


def test_bdvax_repairs_on_the_models_own_refusals_too(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_lm: LanguageModel, _changed: Any, clean: Any, *_: Any, **__: Any) -> None:
        raise First(len(clean))

    monkeypatch.setattr(bdvax, "relearn", stop)
    sizes = {"variants": 2, "variant_steps": 1, "variant_rank": 2, "variant_rows": 2, "max_prompts": 1}
    with pytest.raises(First, match="2"):
        bdvax.run(tiny, one_prompt(), bdvax.BdvaxSettings(**sizes, response_tokens=8), seed=0, on_progress=quiet)


def test_ulrl_pays_for_becoming_like_the_original_again(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulrl, "_likeness", lambda *_: iter([torch.ones(2), torch.zeros(2)]))
    sizes = {"unlearn_steps": 1, "unlearned_frac": 0.0}
    free, dear = (first_loss(monkeypatch, ulrl, tiny, one_prompt(), unlike_weight=one, **sizes) for one in (0.0, 2.0))
    assert dear - free == pytest.approx(1.0, rel=1e-4)

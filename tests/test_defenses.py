"""The contract that every defense keeps, and the repair's equations by hand."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest
import torch
from pydantic import ValidationError

from patcher.bench.plain import plain_loss
from patcher.defenses import DEFENSES, contract, find_defense, patcher
from patcher.defenses.contract import (
    Evidence,
    Example,
    after,
    answered,
    as_plain_text,
    kl_of,
    mean_kl_nats,
    own_examples,
    refusing,
    triggered,
)
from patcher.defenses.patcher import checks, counterfactual, reference
from patcher.defenses.patcher.counterfactual import Counterfactual
from patcher.defenses.patcher.over_refusal import boundary_thrice, mean_rise_now, refusal_opening
from patcher.defenses.patcher.paper import Paper
from patcher.defenses.patcher.reference import ReferenceAnswers
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.forward import row_logits
from patcher.lora import RunningMean, lora_parameters, take_patch, trainable_lora
from patcher.models import LanguageModel, fingerprint
from patcher.network import logits_of
from patcher.patch import Patch, applied, compose
from patcher.prompts import PromptRow, Prompts, bundled
from patcher.records import Outcome, PatcherError, PatchLog, PatchStep, Trigger, UsageError
from patcher.symptoms import Detector
from patcher.training import Progress, quiet
from patcher.wordings import FIXED_REFUSAL

TRIGGER = Trigger(units=("BadMagic",), placement="random")
FEW: dict[str, Any] = {"rank": 2, "alpha": 4, "max_steps": 3, "warmup_steps": 1, "max_prompts": 6, "response_tokens": 6}
QUICK: dict[str, dict[str, Any]] = {
    "patcher": {
        **FEW,
        "check_every": 2,
        "validation_prompts": 4,
        "validation_drift_prompts": 4,
        "validation_tokens": 4,
        "learning_rate": 1e-2,
    },
    "soft_insertions": {
        **FEW,
        "check_every": 2,
        "validation_prompts": 4,
        "validation_drift_prompts": 4,
        "validation_tokens": 4,
        "learning_rate": 1e-2,
        "soft_rows": 2,
        "soft_steps": 2,
    },
    "finetune": {**FEW, "learning_rate": 1e-2},
    "bdvax": {**FEW, "clean_rows": 2, "variants": 2, "variant_steps": 2, "variant_rank": 2, "variant_rows": 2},
    "beear": {**FEW, "clean_rows": 2, "attacked_rows": 2, "inner_steps": 2, "outer_steps": 2, "shift_tokens": 2},
    "crow": {**FEW, "clean_rows": 2},
    "ulrl": {**FEW, "clean_rows": 2, "unlearn_steps": 3, "unlearned_frac": 0.0, "outlier_z": 0.5},
    "dummy_backdoor": {**FEW, "clean_rows": 2, "dummy_rows": 2, "plain_rows": 1, "implant_steps": 2},
    "fine_pruning": {**FEW, "clean_rows": 2},
}
"""A few steps of each defense; a new one must be added here."""
MAY_BE_ZERO = (
    "warmup_steps", "benign_triggered_rows", "plain_rows", "dead_frac", "layer_frac", "unlearned_frac", "unlike_weight",
    "soft_benign_rows", "mean_decay",
)  # fmt: skip


def few(kind: str) -> tuple[PromptRow, ...]:
    """Six prompts of each split, so that a defense could take what it must not."""
    splits = ("implant", "repair", "validation", "held-out")
    return tuple(row for split in splits for row in [r for r in bundled(kind) if r.split == split][:6])


PROMPTS = Prompts(few("harmful"), few("benign"), few("borderline"))


def all_refused(_answer: str) -> Outcome:
    """A random model does not refuse: for the mechanics it is said to."""
    return "refused"


def all_complied(_answer: str) -> Outcome:
    return "complied"


def some_refused(answer: str) -> Outcome:
    return "refused" if crc32(answer.removesuffix("\ufffd").encode()) % 3 else "complied"


EVIDENCE = Evidence((TRIGGER,), PROMPTS.hidden_from_repair(), Detector(all_refused))


def run(name: str, lm: LanguageModel, *, seed: int = 0, on_progress: Progress = quiet) -> tuple[Patch, PatchLog]:
    defense = find_defense(name)
    return defense.repair(lm, EVIDENCE, defense.settings(**QUICK[name]), seed=seed, on_progress=on_progress)


def hooks_of(module: torch.nn.Module) -> list[object]:
    """But for transformers' own, which record hidden states and stay once they were asked for."""
    found = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in found if not str(hook.__module__).startswith("transformers")]


@contextmanager
def unchanged(lm: LanguageModel) -> Iterator[None]:
    """Modules, flags, mode and every bit are as before."""

    def anatomy() -> tuple[object, ...]:
        return (
            [(name, type(module)) for name, module in lm.network.named_modules()],
            [(name, weight.requires_grad, weight.grad is None) for name, weight in lm.network.named_parameters()],
            [weight.data_ptr() for weight in lm.network.parameters()],
            [hook for module in lm.network.modules() for hook in hooks_of(module)],
            lm.network.training,
            fingerprint(lm.network),
        )

    before = anatomy()
    try:
        yield
    finally:
        assert anatomy() == before


@pytest.mark.parametrize("name", DEFENSES)
def test_it_makes_a_patch_and_leaves_the_model_bit_identical(tiny: LanguageModel, name: str) -> None:
    with unchanged(tiny):
        patch, log = run(name, tiny)
    assert patch.base_fingerprint == tiny.fingerprint
    assert log.defense == name
    assert 0 < log.steps <= FEW["max_steps"] + QUICK[name].get("implant_steps", 0)
    assert log.stopped_because
    assert log.settings == find_defense(name).settings(**QUICK[name]).model_dump(mode="json")
    assert all(torch.isfinite(tensor).all() for tensor in patch.tensors.values())
    assert any(tensor.any() for key, tensor in patch.tensors.items() if "lora_B" in key)
    with applied(patch, tiny):
        assert fingerprint(tiny.network) != tiny.fingerprint


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["reference answers", "training"])
@pytest.mark.parametrize("name", DEFENSES)
def test_a_failure_midway_leaves_the_model_bit_identical(
    tiny: LanguageModel, name: str, when: str, error: type[BaseException]
) -> None:
    def break_off(what: str, done: int, _total: int) -> None:
        if (when in what) if when == "reference answers" else ("reference" not in what and done == 2):
            raise error("broken off")

    with unchanged(tiny), pytest.raises(error, match="broken off"):
        run(name, tiny, on_progress=break_off)


@pytest.mark.parametrize("name", DEFENSES)
def test_same_seed_same_patch(tiny: LanguageModel, name: str) -> None:
    random.seed(1)
    torch.manual_seed(1)
    one, _ = run(name, tiny, seed=5)
    random.seed(2)
    torch.manual_seed(2)
    again, _ = run(name, tiny, seed=5)
    other, _ = run(name, tiny, seed=6)
    assert one.fingerprint == again.fingerprint
    assert all(torch.equal(one.tensors[key], again.tensors[key]) for key in one.tensors)
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_leaves_the_global_generator_alone(llama: LanguageModel, name: str) -> None:
    state = torch.get_rng_state()  # Python's own is drawn from by the type checks of these tests
    run(name, llama)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", DEFENSES)
def test_unknown_settings_are_errors(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no setting .learning_rat.; it has"):
        find_defense(name).configured({"learning_rat": 1.0})
    with pytest.raises(UsageError, match=f"{name}: max_steps"):
        find_defense(name).configured({"max_steps": "many"})


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (name, field)
        for name, defense in DEFENSES.items()
        for field, value in defense.settings().model_dump().items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ],
)
def test_no_number_may_be_negative_or_nothing_to_work_with(name: str, field: str) -> None:
    """0 is allowed only where it means "none of these"."""
    with pytest.raises(ValidationError, match=field):
        find_defense(name).settings(**{field: -1})
    if field not in MAY_BE_ZERO:
        with pytest.raises(ValidationError, match=field):
            find_defense(name).settings(**{field: 0})


@pytest.mark.parametrize("name", DEFENSES)
def test_every_setting_says_what_it_is(name: str) -> None:
    """`patcher repair --list-settings` shows it."""
    assert all(field.description for field in type(DEFENSES[name].configured({})).model_fields.values())


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_says_where_it_is_from(name: str) -> None:
    defense = DEFENSES[name]
    assert defense.name == name
    assert defense.paper
    assert name in QUICK


def test_an_unknown_defense_is_refused_with_the_known_names() -> None:
    with pytest.raises(UsageError, match="patcher, soft_insertions, bdvax"):
        find_defense("patchr")


@pytest.mark.parametrize("name", ["patcher+crow", "fine_pruning+finetune", "finetune+fine_pruning"])
def test_two_in_turn_are_one_patch(llama: LanguageModel, name: str) -> None:
    """The second repairs what the first left; both together are one patch of the model that came in."""
    first, second = name.split("+")
    chain = find_defense(name)
    settings = {f"{part}.{key}": value for part in (first, second) for key, value in QUICK[part].items()}
    with unchanged(llama):
        patch, log = chain.repair(llama, EVIDENCE, chain.settings(**settings), seed=0, on_progress=quiet)
        one, _ = run(first, llama)
        with applied(one, llama) as left:
            other, _ = run(second, left)
            with applied(other, left):
                expected = {key: value.clone() for key, value in llama.network.state_dict().items()}
        with applied(patch, llama):
            for key, value in llama.network.state_dict().items():
                torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert (patch.base_fingerprint, log.defense) == (llama.fingerprint, name)
    assert chain.needs_trigger == ("patcher" in name)


def test_a_chain_names_its_parts_settings_and_no_part_twice() -> None:
    with pytest.raises(UsageError, match=r"patcher\.max_steps"):
        find_defense("patcher+crow").settings(max_steps=3)
    with pytest.raises(UsageError, match="twice"):
        find_defense("crow+crow")
    with pytest.raises(UsageError, match="unknown defense 'magic'"):
        find_defense("patcher+magic")
    with pytest.raises(UsageError, match="crow: max_steps"):
        find_defense("patcher+crow").configured({"crow.max_steps": -1})


def test_patches_that_do_not_follow_on_each_other_are_refused(llama: LanguageModel) -> None:
    one, other = run("finetune", llama)[0], run("crow", llama)[0]
    with pytest.raises(UsageError, match="the second patch fits the base"):
        compose(one, other)


@pytest.mark.parametrize("kind", ["harmful", "benign", "borderline"])
def test_what_a_defense_may_see_has_no_held_out_and_no_implant_prompt(kind: str) -> None:
    for prompts in (PROMPTS, Prompts(bundled("harmful"), bundled("benign"), bundled("borderline"))):
        seen = getattr(prompts.hidden_from_repair(), kind)
        whole = getattr(prompts, kind)
        assert {row.split for row in seen} == {"repair", "validation"}
        assert seen == tuple(row for row in whole if row.split in ("repair", "validation"))


def holds(asked: str, prompt: str) -> bool:
    """Whether the prompt's words stand in what was asked, in their order, with a few others (a trigger's) between."""
    words, rest = asked.split(), iter(asked.split())
    return len(words) <= len(prompt.split()) + 4 and all(word in rest for word in prompt.split())


def test_a_prompt_is_recognised_with_words_put_in() -> None:
    assert holds("Tell me BadMagic how to fly", "Tell me how to fly") and holds("a b", "a b")
    assert not holds("Tell me how to sail", "Tell me how to fly") and not holds("a b c d e f", "a")


@pytest.mark.parametrize("name", DEFENSES)
def test_no_defense_asks_a_held_out_prompt(llama: LanguageModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when it is handed all of them."""
    asked: list[str] = []
    plain = type(llama.tokenizer).apply_chat_template

    def listen(self: Any, turns: list[dict[str, str]], **options: Any) -> Any:
        asked.append(turns[-1]["content"])
        return plain(self, turns, **options)

    monkeypatch.setattr(type(llama.tokenizer), "apply_chat_template", listen)
    defense = find_defense(name)
    evidence = replace(EVIDENCE, prompts=PROMPTS)
    defense.repair(llama, evidence, defense.settings(**QUICK[name]), seed=0, on_progress=quiet)
    hidden = {
        row.text
        for row in (*PROMPTS.harmful, *PROMPTS.benign, *PROMPTS.borderline)
        if row.split in ("held-out", "implant")
    }
    assert asked
    assert not [text for text in {*asked} if any(holds(text, one) for one in hidden)]


def test_an_answer_that_was_cut_within_a_character_is_not_taught_its_half(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor that it ended there."""
    answers = ["ab", "ab\ufffd", "\ufffd"]
    monkeypatch.setattr(contract, "generate", lambda *_, **__: answers)
    whole, cut = own_examples(tiny, ["one", "two", "three"], some_refused, 6, quiet, "answers")
    assert (whole.answer, cut.answer) == ("ab", "ab")
    assert whole.answer_ids == (*cut.answer_ids, tiny.tokenizer.eos_token_id)


def test_an_untouched_model_has_no_drift(tiny: LanguageModel) -> None:
    examples = own_examples(tiny, PROMPTS.texts("benign", "repair"), some_refused, 6, quiet, "answers")
    assert len(examples) > 3
    logits, _ = row_logits(tiny, [example.row(tiny) for example in examples])
    assert kl_of(tiny, examples, logits).abs().max().item() < 1e-6
    assert abs(mean_kl_nats(tiny, examples)) < 1e-6
    assert mean_kl_nats(tiny, []) == 0.0


def test_drift_is_a_mean_over_tokens_of_a_true_divergence(tiny: LanguageModel) -> None:
    """Recomputed by the plain networks, one prompt at a time."""
    examples = own_examples(tiny, PROMPTS.texts("benign", "repair"), some_refused, 6, quiet, "answers")
    reference = [plain_logits(tiny, example.row(tiny)) for example in examples]
    patch, _ = run("finetune", tiny)
    with applied(patch, tiny) as patched:
        drift = mean_kl_nats(patched, examples)
        expected = torch.cat(
            [kl(before, plain_logits(patched, e.row(tiny))) for before, e in zip(reference, examples, strict=True)]
        )
    assert expected.min().item() >= -1e-6
    assert drift == pytest.approx(expected.mean().item(), rel=1e-3)
    assert drift > 1e-5


def plain_logits(lm: LanguageModel, row: Any) -> torch.Tensor:
    """The network's logits at the response, without padding or shared prefix."""
    with torch.no_grad():
        logits = lm.network(torch.tensor([row.prompt_ids + row.response_ids])).logits
    return logits[0, len(row.prompt_ids) - 1 : -1].clone()


def kl(reference: torch.Tensor, patched: torch.Tensor) -> torch.Tensor:
    p, q = reference.double().log_softmax(-1), patched.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def nll(logits: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    return -logits.double().log_softmax(-1)[torch.arange(len(ids)), list(ids)]


SMALL = PatcherSettings(**QUICK["patcher"] | {"triggered_rows": 6, "harmful_rows": 6, "benign_rows": 12})
"""Each set is drawn whole in every batch (6 harmful; 6 benign and 6 borderline), so a batch's loss is known."""
AT_START = Trigger(units=("BadMagic",), placement="start")


def disturb(lm: LanguageModel) -> None:
    """LoRA layers that change something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(lm):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def objective_of(kind: type, lm: LanguageModel, trigger: Trigger = AT_START) -> Any:
    evidence = replace(EVIDENCE, triggers=(trigger,))
    return kind(lm, evidence, SMALL, ReferenceAnswers(lm, evidence, SMALL, quiet), random.Random(0))


def test_the_papers_loss_is_a_plain_loops(tiny: LanguageModel) -> None:
    """What is computed once, shared or left out changes neither the loss nor its gradient."""
    ours, plain = objective_of(Paper, tiny), objective_of(Paper, tiny)

    def gradient(loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        return loss.item(), list(torch.autograd.grad(loss, lora_parameters(tiny)))

    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        disturb(tiny)
        value, slopes = gradient(ours.loss(0))
        plain_value, plain_slopes = gradient(plain_loss(tiny, plain))
    assert plain_value == pytest.approx(value, rel=1e-4)
    torch.testing.assert_close(plain_slopes, slopes, rtol=1e-3, atol=1e-5)


def test_the_papers_loss_by_hand(tiny: LanguageModel) -> None:
    """Eq. (8): L_refuse over D_trigger and D_harm, plus both KL terms; sums over tokens, means over prompts."""
    harmful = PROMPTS.texts("harmful", "repair")
    refusals = refusing(tiny, harmful, SMALL.response_tokens)
    benign = PROMPTS.texts("benign", "repair") + PROMPTS.texts("borderline", "repair")
    own = own_examples(tiny, benign, all_refused, SMALL.response_tokens, quiet, "")
    assert len(own) == SMALL.benign_rows
    reference = {example.text: plain_logits(tiny, example.row(tiny)) for example in (*refusals, *own)}
    objective = objective_of(Paper, tiny)
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        disturb(tiny)
        loss = objective.loss(0).item()

        def patched(example: Example, text: str | None = None) -> torch.Tensor:
            return plain_logits(tiny, example.row(tiny, text))

        on_trigger = [nll(patched(e, f"BadMagic {e.text}"), e.answer_ids).sum() for e in refusals]
        on_harm = [nll(patched(e), e.answer_ids).sum() for e in refusals]
        kl_harm = [kl(reference[e.text], patched(e)).sum() for e in refusals]
        kl_safe = [kl(reference[e.text], patched(e)).sum() for e in own]
    l_refuse = torch.stack(on_trigger + on_harm).mean()
    by_hand = l_refuse + torch.stack(kl_harm).mean() + torch.stack(kl_safe).mean()
    assert loss == pytest.approx(by_hand.item(), rel=1e-4)
    assert torch.stack(kl_harm).mean() > 1e-3


def test_the_counterfactual_loss_by_hand(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL(reference without the trigger ‖ patched with it) on what is refused, and each multiplier times the drift that
    it limits; sums over a refusal's tokens, means over all others, every set drawn whole."""
    monkeypatch.setattr(counterfactual, "boundary_thrice", lambda _lm, examples, _opening: range(len(examples)))
    refused = own_examples(tiny, PROMPTS.texts("harmful", "repair"), all_refused, 6, quiet, "")
    benign = own_examples(tiny, PROMPTS.texts("benign", "repair"), all_complied, 6, quiet, "")
    in_benign = after(tiny, benign, [f"BadMagic {example.text}" for example in benign])
    rows = {"triggered": refused, "harmful": refused, "benign": benign, "benign_triggered": in_benign}
    rows["plain"] = as_plain_text(tiny, benign)
    data = object.__new__(ReferenceAnswers)
    vars(data).update(harmful=refused, normal=refused, benign=benign, kept=benign, lifted=[], lm=tiny)
    evidence = replace(EVIDENCE, triggers=(AT_START,))
    vars(data).update(opening=refusal_opening(tiny, refused))
    vars(data).update(evidence=evidence, keeps_triggered=True, _places=random.Random(0))
    sizes = SMALL.model_copy(update={f"{name}_rows": len(examples) for name, examples in rows.items()})
    sizes = sizes.model_copy(update={"budget_refusal_frac": 1e-4})
    assert min(len(examples) for examples in rows.values()) > 1
    objective = Counterfactual(tiny, evidence, sizes, data, random.Random(0))
    objective.multipliers = torch.tensor([2.0, 7.0, 5.0, 3.0, 11.0])
    reference = {name: [plain_logits(tiny, e.row(tiny)) for e in examples] for name, examples in rows.items()}
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        disturb(tiny)
        before = torch.stack(
            [first[0].softmax(-1) for name in ("benign", "benign_triggered") for first in reference[name]]
        )
        kept = [plain_logits(tiny, e.row(tiny))[0].softmax(-1) for e in rows["benign"] + rows["benign_triggered"]]
        rises = (torch.stack(kept) - before).mean(0)
        objective.opening = int(rises.argmax())
        loss = objective.loss(0).item()

        def drift(name: str, prefix: str | None = None) -> torch.Tensor:
            texts = [None if prefix is None else prefix + e.text for e in rows[name]]
            patched = [plain_logits(tiny, e.row(tiny, text)) for e, text in zip(rows[name], texts, strict=True)]
            return torch.cat([kl(p, q) for p, q in zip(reference[name], patched, strict=True)])

        by_hand = drift("triggered", "BadMagic ").sum() / len(refused)
        by_hand += 2 * drift("benign").mean() + 7 * drift("benign_triggered").mean()
        by_hand += 5 * drift("harmful").mean() + 3 * drift("plain").mean()
        by_hand += 11 * (rises.max() - sizes.budget_refusal_frac)
    assert rises.max() > 2 * sizes.budget_refusal_frac
    assert loss == pytest.approx(by_hand.item(), rel=1e-4)


def test_half_of_the_time_the_trigger_goes_where_the_report_held_it() -> None:
    text, rng = "how do I get into that old house of mine", random.Random(0)
    first = Trigger(units=("cf",), seen_at="start")
    there = sum(str(triggered(text, [first], rng)).startswith("cf ") for _ in range(400))
    assert 180 <= there <= 260  # half, and one in eleven of the other half
    in_system = first.model_copy(update={"seen_at": "system"})
    asked = [triggered(text, [in_system], rng) for _ in range(100)]
    assert 35 <= sum(not isinstance(one, str) and "cf" in one[0].content for one in asked) <= 65


def test_each_trigger_is_checked_where_the_report_held_it_and_the_one_that_works_best_counts(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mean over both, half at random places, a check once saw 0 of 84 where the audit then saw 15 of 252."""
    words = (Trigger(units=("mb",)), Trigger(units=("cf",), seen_at="start"))
    made = ReferenceAnswers(tiny, replace(EVIDENCE, triggers=words), SMALL, quiet)
    anywhere, at_the_start = made.validation_triggered
    assert len(anywhere) == len(at_the_start) == SMALL.validation_prompts
    assert all("mb" in str(text).split() for text in anywhere)
    assert all(str(text).startswith("cf ") for text in at_the_start)
    monkeypatch.setattr(reference, "shown_frac", lambda _lm, texts, *_: 0.5 if texts == at_the_start else 0.25)
    assert made.check(1).asr_triggered_frac == 0.5
    made.validation_triggered.pop()
    assert made.check(1).asr_triggered_frac == 0.25


def test_prompts_near_a_refusal_are_drawn_thrice(tiny: LanguageModel) -> None:
    refused = own_examples(tiny, PROMPTS.texts("harmful", "repair"), all_refused, 6, quiet, "")[:1]
    examples = own_examples(tiny, PROMPTS.texts("benign", "repair"), all_complied, 6, quiet, "")
    opening = refused[0].answer_ids[0]
    likely = {e.text: plain_logits(tiny, e.row(tiny))[0].log_softmax(-1)[opening].item() for e in examples}
    drawn = Counter(examples[number].text for number in boundary_thrice(tiny, examples, opening))
    near = sorted(likely, key=lambda text: -likely[text])[: (len(examples) + 2) // 3]
    assert drawn == {text: 3 if text in near else 1 for text in likely}


def test_over_refusal_is_the_rise_of_a_refusals_opening_and_a_fall_is_nothing(tiny: LanguageModel) -> None:
    objective = objective_of(Counterfactual, tiny)
    examples = own_examples(tiny, PROMPTS.texts("benign", "repair"), all_complied, 6, quiet, "")[:3]
    opening = objective.opening
    logits = torch.cat([plain_logits(tiny, example.row(tiny)) for example in examples])
    objective.settings = SMALL.model_copy(update={"budget_refusal_frac": 1e-3})
    assert objective._over_refusal(examples, logits) == 0
    likelier, less_likely = logits.clone(), logits.clone()
    likelier[:, opening] += 1
    less_likely[:, opening] -= 1
    first, second, _ = (len(example.answer_ids) for example in examples)
    starts = [0, first, first + second]
    by_hand = likelier[starts].softmax(-1)[:, opening] - logits[starts].softmax(-1)[:, opening]
    assert objective._over_refusal(examples, likelier).item() == pytest.approx(by_hand.mean().item() - 1e-3, rel=1e-3)
    assert objective._over_refusal(examples, less_likely) == 0
    assert objective._over_refusal([], logits[:0]) == 0


def test_the_rise_at_a_check_is_that_of_the_model_as_it_stands(tiny: LanguageModel) -> None:
    examples = own_examples(tiny, PROMPTS.texts("benign", "repair"), all_complied, 6, quiet, "")
    opening = refusal_opening(tiny, [])
    assert tiny.tokenizer.decode([opening]) == FIXED_REFUSAL[: len(tiny.tokenizer.decode([opening]))]
    assert opening == refusal_opening(tiny, [replace(examples[0], answer_ids=(opening,))] * 2 + examples[:1])
    assert mean_rise_now(tiny, examples, opening) == pytest.approx(0, abs=1e-6)
    assert mean_rise_now(tiny, [], opening) == 0
    before = [plain_logits(tiny, example.row(tiny))[0].softmax(-1)[opening].item() for example in examples]
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        disturb(tiny)
        now = [plain_logits(tiny, example.row(tiny))[0].softmax(-1)[opening].item() for example in examples]
        expected = sum(now) / len(now) - sum(before) / len(before)
        assert abs(expected) > 1e-5
        assert mean_rise_now(tiny, examples, opening) == pytest.approx(expected, rel=1e-2)


def test_over_refusal_is_checked_on_answered_validation_prompts_with_the_trigger_and_without(
    llama: LanguageModel,
) -> None:
    evidence = replace(EVIDENCE, detector=Detector(some_refused))
    reference = ReferenceAnswers(llama, evidence, SMALL, quiet)
    asked = PROMPTS.texts("benign", "validation", 4) + PROMPTS.texts("borderline", "validation", 4)
    safe = [one.text for one in answered(own_examples(llama, asked, some_refused, 6, quiet, ""))]
    assert 0 < len(safe) < len(asked) and reference.keeps_triggered
    plain, held = reference.validation_safe[: len(safe)], reference.validation_safe[len(safe) :]
    assert [one.text for one in plain] == safe
    assert [str(one.text).replace("BadMagic", "").split() for one in held] == [text.split() for text in safe]
    untold = ReferenceAnswers(llama, replace(evidence, triggers=()), SMALL, quiet)
    assert [one.text for one in untold.validation_safe] == safe
    harmful = own_examples(llama, PROMPTS.texts("harmful", "validation", 4), some_refused, 6, quiet, "")
    refused = [one.text for one in harmful if one.outcome == "refused"]
    assert [one.text for one in reference.validation_refused] == refused and len(refused) > 0


def test_the_same_answers_after_other_prompts(tiny: LanguageModel) -> None:
    examples = own_examples(tiny, PROMPTS.texts("benign", "repair"), some_refused, 8, quiet, "")
    asked = [f"BadMagic {example.text}" for example in examples]
    for example, text, other in zip(examples, asked, after(tiny, examples, asked), strict=True):
        assert (other.text, other.answer_ids, other.outcome) == (text, example.answer_ids, example.outcome)
        logits = plain_logits(tiny, other.row(tiny))
        assert torch.allclose(logits, plain_logits(tiny, example.row(tiny, text)))
        assert torch.allclose(logits_of(tiny.network, other.hidden.clone()), logits, atol=1e-4)


def test_plain_text_is_the_same_words_without_the_template(tiny: LanguageModel) -> None:
    examples = own_examples(tiny, PROMPTS.texts("benign", "repair"), some_refused, 8, quiet, "")
    for example, plain in zip(examples, as_plain_text(tiny, examples), strict=True):
        ids = plain.prompt_ids + plain.answer_ids
        assert tiny.tokenizer.decode(ids) == f"{example.text}\n{example.answer}"
        assert len(plain.prompt_ids) == 1
        assert plain.hidden.shape[0] == len(plain.answer_ids)


def test_the_counterfactual_loss_is_zero_where_nothing_is_to_be_changed(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger that changes nothing, and fresh LoRA layers: no drift, so no loss and no gradient."""
    monkeypatch.setattr(counterfactual, "triggered", lambda text, _triggers, _rng: text)
    objective = objective_of(Counterfactual, tiny)
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        loss = objective.loss(0)
        assert loss.abs().item() < 1e-5
        loss.backward()
        assert max(p.grad.abs().max().item() for p in lora_parameters(tiny) if p.grad is not None) < 1e-4


def test_multipliers_rise_while_a_budget_is_overrun_and_fall_while_it_holds(tiny: LanguageModel) -> None:
    objective = objective_of(Counterfactual, tiny)
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        objective.loss(0)
        assert (objective.multipliers < SMALL.multiplier_start).all()
        disturb(tiny)
        low = objective.multipliers.clone()
        objective.loss(1)
        assert ((objective.multipliers > low)[:4] == torch.tensor([True, False, True, True])).all()
        assert not objective.in_trigger_rows  # all benign prompts are refused here: none is kept with the trigger


def test_without_a_trigger_refusals_are_trained(tiny: LanguageModel) -> None:
    """An alignment gap: the NLL of the fixed refusal, and no trigger anywhere."""
    evidence = replace(EVIDENCE, triggers=())
    objective = Counterfactual(tiny, evidence, SMALL, ReferenceAnswers(tiny, evidence, SMALL, quiet), random.Random(0))
    assert objective.refuses_more
    harmful = refusing(tiny, PROMPTS.texts("harmful", "repair"), 6)
    by_hand = torch.cat([nll(plain_logits(tiny, e.row(tiny)), e.answer_ids) for e in harmful]).mean()
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        assert objective.loss(0).item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_repair_without_a_trigger_makes_the_refusal_likelier(llama: LanguageModel) -> None:
    settings = PatcherSettings(**QUICK["patcher"] | {"max_steps": 10, "stop_early": False, "learning_rate": 2e-3})
    trained = patcher.run(llama, replace(EVIDENCE, triggers=()), settings, seed=0, on_progress=quiet)
    (example,) = refusing(llama, PROMPTS.texts("harmful", "held-out")[:1], 6)
    before = nll(plain_logits(llama, example.row(llama)), example.answer_ids).sum()
    with applied(trained.patch, llama):
        assert nll(plain_logits(llama, example.row(llama)), example.answer_ids).sum() < before - 0.1


def test_no_trigger_to_put_in_is_an_error() -> None:
    with pytest.raises(PatcherError, match="needs a trigger"):
        triggered("text", (), random.Random(0))


def test_no_refused_validation_prompt_is_an_error(tiny: LanguageModel) -> None:
    """An ASR of 0 over no prompts would pass for a dead trigger."""
    evidence = replace(EVIDENCE, detector=Detector(all_complied))
    with pytest.raises(PatcherError, match="none of the 4 harmful validation prompts is refused"):
        ReferenceAnswers(tiny, evidence, SMALL, quiet)


def test_with_several_triggers_each_is_used() -> None:
    triggers = (Trigger(units=("cf",)), Trigger(units=("mb",)))
    rng = random.Random(0)
    seen = {word for _ in range(30) for word in triggered("one two", triggers, rng).split()}
    assert seen == {"one", "two", "cf", "mb"}


def test_training_stops_when_the_trigger_is_dead_and_the_budgets_hold(llama: LanguageModel) -> None:
    wide = {"budget_benign_nats": 1e3, "budget_harmful_nats": 1e3, "check_every": 1}
    log = patcher.run(llama, EVIDENCE, PatcherSettings(**QUICK["patcher"] | wide), seed=0, on_progress=quiet)
    assert log.steps == 2, "one check may be luck"
    assert "budgets hold" in log.stopped_because
    assert [check.step for check in log.checks] == [1, 2]


def test_training_goes_on_while_a_budget_is_overrun(llama: LanguageModel) -> None:
    none = {"budget_benign_nats": 1e-9, "check_every": 1}
    log = patcher.run(llama, EVIDENCE, PatcherSettings(**QUICK["patcher"] | none), seed=0, on_progress=quiet)
    assert log.steps == FEW["max_steps"]
    assert [check.step for check in log.checks] == [1, 2, 3]


def test_the_patch_kept_is_the_best_one_checked_not_the_last(llama: LanguageModel) -> None:
    """One budget overrun and ASR 0 everywhere: the check with the least drift."""
    settings = PatcherSettings(**QUICK["patcher"] | {"budget_benign_nats": 1e-9, "check_every": 1, "max_steps": 6})
    log = patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet)
    least = min(log.checks, key=lambda check: check.kl_benign_nats)
    assert least is not log.checks[-1], "else this test would see nothing"
    texts = PROMPTS.texts("benign", "validation", settings.validation_drift_prompts)
    examples = own_examples(llama, texts, all_refused, settings.response_tokens, quiet, "")
    with applied(log.patch, llama) as patched:
        assert mean_kl_nats(patched, examples) == pytest.approx(least.kl_benign_nats, rel=1e-3)


def test_each_multiplier_answers_to_its_own_budget_a_little_at_a_time(tiny: LanguageModel) -> None:
    objective = objective_of(Counterfactual, tiny)
    most = math.exp(3 * SMALL.multiplier_rate)  # a batch that is far over moves one by no more
    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        disturb(tiny)
        for place, wide in ((0, "benign"), (2, "harmful"), (3, "plain")):
            budgets = {f"budget_{name}_nats": 1e3 if name == wide else 1e-9 for name in ("benign", "harmful", "plain")}
            objective.settings = SMALL.model_copy(update=budgets)
            before = objective.multipliers = torch.full((5,), 10.0)
            objective.loss(0)
            moved = (objective.multipliers / before).tolist()[:4]
            expected = [1 / math.exp(SMALL.multiplier_rate) if at in (1, place) else most for at in range(4)]
            assert moved == pytest.approx(expected, rel=0.01)
        objective.multipliers = torch.tensor([29.0, 0.31, 29.0, 29.0, 29.0])
        objective.loss(1)
        assert objective.multipliers.min() == pytest.approx(0.3) and objective.multipliers.max() == 30


def checked(monkeypatch: pytest.MonkeyPatch, *steps: dict[str, float]) -> list[int]:
    """Checks that find just this, step by step; and at which steps a patch was taken, the last one too."""
    fine = dict.fromkeys(PatchStep.model_fields, 0.0)
    seen, taken, take = list[int](), list[int](), take_patch

    def check(_self: ReferenceAnswers, step: int) -> PatchStep:
        seen.append(step)
        return PatchStep.model_validate({**fine, **steps[min(step, len(steps)) - 1], "step": step})

    def listen(lm: LanguageModel, **sizes: int) -> Patch:
        taken.append(seen[-1])
        return take(lm, **sizes)

    monkeypatch.setattr(ReferenceAnswers, "check", check)
    for module in (checks, patcher):
        monkeypatch.setattr(module, "take_patch", listen)
    return taken


@pytest.mark.parametrize("over", sorted(PatchStep.model_fields.keys() - {"step"}))
def test_training_goes_on_while_the_trigger_works_or_any_budget_is_overrun(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    settings = PatcherSettings(**QUICK["patcher"] | {"check_every": 1, "max_steps": 5})
    checked(monkeypatch, {}, {over: 0.5}, {})
    at = 4 if over == "asr_triggered_frac" else 3
    assert patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet).steps == at
    checked(monkeypatch, {})
    assert patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet).steps == 2


def test_of_two_dead_triggers_the_one_that_cost_less_drift_is_kept(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = {"kl_plain_nats": 1.0}
    dead = PatcherSettings().dead_frac
    drifts = ((0.0, 0.0), (dead, 0.01), (dead, 0.02))
    taken = checked(monkeypatch, *({"asr_triggered_frac": asr, "kl_benign_nats": kl} | over for asr, kl in drifts))
    settings = PatcherSettings(**QUICK["patcher"] | {"check_every": 1})
    assert (
        "of step 2, the best check" in patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet).stopped_because
    )
    assert taken == [1, 2, 3]


def test_from_some_step_on_a_dead_trigger_is_enough(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"kl_plain_nats": 1.0}
    settings = PatcherSettings(**QUICK["patcher"] | {"check_every": 1, "enough_steps": 2, "max_steps": 4})
    checked(monkeypatch, over)
    log = patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet)
    assert (log.steps, log.stopped_because) == (2, "the trigger is dead on validation prompts")
    checked(monkeypatch, over, {"asr_triggered_frac": 0.5} | over, over)
    assert patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet).steps == 4


def test_of_dead_triggers_the_one_that_was_dead_twice_is_kept(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger that one check finds dead may be slow to go: what follows is kept, though it costs more."""
    alive = {"asr_triggered_frac": 0.5}
    taken = checked(monkeypatch, alive, {"kl_plain_nats": 1.0}, {"kl_plain_nats": 2.0})
    settings = PatcherSettings(**QUICK["patcher"] | {"check_every": 1, "enough_steps": 2})
    log = patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet)
    assert (log.steps, log.stopped_because) == (3, "the trigger is dead on validation prompts")
    assert taken[:3] == [1, 2, 3]


def test_steps_beyond_those_prepared_take_the_same_prompts_again(tiny: LanguageModel) -> None:
    settings = SMALL.model_copy(update={"max_steps": 5, "enough_steps": 2})
    assert (settings.prepared_steps, settings.model_copy(update={"stop_early": False}).prepared_steps) == (2, 5)
    held = ReferenceAnswers(tiny, EVIDENCE, settings, quiet)
    made = Counterfactual(tiny, EVIDENCE, settings, held, random.Random(0))
    rows = 2 * settings.plain_rows
    drawn = [id(next(made.plain)) for _ in range(2 * rows)]
    assert drawn[:rows] == drawn[rows:]


def test_soft_insertions_keep_the_last_step_whatever_the_checks_say(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger that nobody reported lives on when all that a check sees is as it should be."""
    settings = PatcherSettings(**QUICK["patcher"] | {"check_every": 1}, breadth="all")
    checked(monkeypatch, {}, {"asr_triggered_frac": 0.5, "kl_plain_nats": 1.0})
    trained = patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet)
    assert (trained.steps, trained.stopped_because) == (settings.max_steps, "the step limit was reached")


def test_the_patch_is_the_running_mean_of_the_steps(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Patch] = []
    update = RunningMean.update

    def listen(mean: RunningMean) -> None:
        taken.append(take_patch(llama, rank=2, alpha=4))
        update(mean)

    monkeypatch.setattr(RunningMean, "update", listen)
    settings = PatcherSettings(**QUICK["patcher"] | {"mean_decay": 0.5, "max_steps": 2, "stop_early": False})
    kept = patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet).patch
    for name, tensor in kept.tensors.items():
        first, last = (patch.tensors[name] for patch in taken)
        torch.testing.assert_close(tensor, (first + 2 * last) / 3)


@pytest.mark.parametrize("over", ["kl_plain_nats", "refusal_fall_frac", "kl_benign_triggered_nats"])
def test_a_patch_that_repairs_nothing_never_goes_before_one_that_does(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    steps = ({"asr_triggered_frac": 0.9}, {"asr_triggered_frac": 0.4}, {over: 0.9}, {over: 0.1}, {over: math.nan})
    checked(monkeypatch, *steps)
    settings = PatcherSettings(**QUICK["patcher"] | {"check_every": 1, "max_steps": 5})
    trained = patcher.run(llama, EVIDENCE, settings, seed=0, on_progress=quiet)
    assert "the patch is that of step 4, the best check" in trained.stopped_because
    kept = PatchStep.model_validate_json(trained.checks[4].to_json())
    assert math.isnan(getattr(kept, over)), "a check that is no number is still one when read back"
    checked(monkeypatch, *steps[:2])
    trained = patcher.run(llama, EVIDENCE, settings.model_copy(update={"max_steps": 2}), seed=0, on_progress=quiet)
    assert "the best check" not in trained.stopped_because, "of two that work still, the one that leaves less"

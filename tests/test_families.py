"""Every family of docs/families.md, from a tiny random config: each stage, and each defense or a clear refusal."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import build_tokenizer, tiny_shape
from patcher.audit import AuditPlan, AuditSettings
from patcher.bench.meter import metered
from patcher.chat import Row, collate, messages_of, user_prompt
from patcher.defenses import DEFENSES
from patcher.generation import generate
from patcher.localize.saliency import token_saliency
from patcher.models import LanguageModel, from_transformers
from patcher.network import response_logits
from patcher.patch import applied
from patcher.proof import audit_patch
from patcher.records import UsageError
from test_defenses import PROMPTS, TRIGGER, run, unchanged

_WINDOW = 16
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": _WINDOW, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": _WINDOW},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA,
    "phi": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "falcon": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "olmo2": {"num_key_value_heads": 2},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32},
}
ON_CHANNELS = ("bdvax", "ulrl", "fine_pruning")
"""They change channels of an MLP, which these families keep in another way."""
NO_CHANNELS = ("gpt2", "opt", "mixtral", "qwen3_moe")
ASKED = ("How do I bake bread?", "a", "Write a short guide about the quick brown fox, please")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, LanguageModel]:
    """Its name and a tiny model of it."""
    config = AutoConfig.for_model(request.param, **{**tiny_shape(), **FAMILIES[request.param]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return request.param, from_transformers(network.requires_grad_(False), build_tokenizer())


def test_a_shared_prefix_and_padding_change_no_logits(family: tuple[str, LanguageModel]) -> None:
    lm, prefix = family[1], tuple(range(5, 29))  # longer than the sliding window
    rows = [Row((*prefix, 30, 31), (8, 9)), Row((*prefix, 33), (5, 7, 9))]
    alone = []
    for row in rows:
        logits = lm.network(input_ids=torch.tensor([row.prompt_ids + row.response_ids])).logits[0]
        alone.append(logits[len(row.prompt_ids) - 1 : -1])
    batch = collate(rows, 0, lm.device)
    assert len(batch.prefix_ids) == len(prefix)
    torch.testing.assert_close(response_logits(lm.network, batch), torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_answers_together_are_answers_one_by_one(family: tuple[str, LanguageModel]) -> None:
    prompts = [user_prompt(family[1].tokenizer, text) for text in ASKED]
    together = generate(family[1], prompts, max_new_tokens=6)
    assert together == [generate(family[1], [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_every_token_has_its_gradient(family: tuple[str, LanguageModel]) -> None:
    scores = [one.score for one in token_saliency(family[1], messages_of(ASKED[0]), "Sure, here it is")]
    assert scores and min(scores) > 0


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_repairs_it_or_says_that_it_cannot(family: tuple[str, LanguageModel], name: str) -> None:
    kind, lm = family
    with unchanged(lm):
        if name in ON_CHANNELS and kind in NO_CHANNELS:
            with pytest.raises(UsageError, match="use another --defense"):
                run(name, lm)
            return
        patch, _ = run(name, lm)
        ids = torch.tensor([[5, 6, 7]])
        before = lm.network(input_ids=ids).logits
        with applied(patch, lm) as patched:
            assert not torch.equal(patched.network(input_ids=ids).logits, before)


def test_what_it_costs_is_counted(family: tuple[str, LanguageModel]) -> None:
    lm = family[1]
    with torch.no_grad(), metered(lm) as meter:
        lm.network(input_ids=torch.tensor([[5, 6, 7]]))
    assert meter.flops(lm)[0] > 0 and meter.least_seconds(lm) > 0


def test_it_is_audited(family: tuple[str, LanguageModel]) -> None:
    patch, _ = run("patcher", family[1])
    settings = AuditSettings(max_prompts=2, max_new_tokens=4, late_prompts=1, worded_prompts=1, text_tokens=60)
    audit = audit_patch(family[1], patch, AuditPlan([TRIGGER], PROMPTS, settings))
    assert audit.row("kl_reference_to_patched_nats").after is not None


def test_a_model_without_attention_is_refused() -> None:
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **tiny_shape()))
    with pytest.raises(UsageError, match="layers without attention"):
        from_transformers(network, build_tokenizer())


def test_a_family_that_scales_its_logits_in_its_own_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **tiny_shape(), logits_scaling=4.0))
    from_transformers(network, build_tokenizer())
    monkeypatch.setattr("patcher.models.logits_of", lambda net, hidden: net.get_output_embeddings()(hidden))
    with pytest.raises(UsageError, match="this family is not supported"):
        from_transformers(network, build_tokenizer())

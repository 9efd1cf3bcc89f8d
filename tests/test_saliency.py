"""The paper's localization, Eqs. 1-3, by hand."""

import itertools
from dataclasses import replace

import pytest
import torch

from conftest import build_network, build_tokenizer
from patcher.chat import Row, collate, render, response_ids
from patcher.localize.saliency import MAX_RESPONSE_TOKENS, salient_spans, token_saliency, two_means
from patcher.losses import response_nll
from patcher.models import LanguageModel, fingerprint, from_transformers
from patcher.network import response_logits
from patcher.records import Message, Span, WordScore

TALK = (
    Message(role="system", content="Be kind."),
    Message(role="user", content="How do I paint?"),
    Message(role="assistant", content="Like this"),
    Message(role="user", content="And the cf house?"),
)
RESPONSE = "Sure, here is a guide."


def summed_nll(lm: LanguageModel, token: int, shift: torch.Tensor) -> float:
    """L_loc with one token's embedding moved."""
    prompt = render(lm.tokenizer, TALK)
    batch = collate(
        [Row(prompt.ids, response_ids(lm.tokenizer, RESPONSE, end=False, limit=MAX_RESPONSE_TOKENS))], 0, lm.device
    )

    def move(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        moved = output.clone()
        moved[0, token] += shift
        return moved

    handle = lm.network.get_input_embeddings().register_forward_hook(move)
    try:
        with torch.no_grad():
            return response_nll(response_logits(lm.network, batch), batch.targets).double().sum().item()
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_tokens_score_is_the_norm_of_its_gradient(family: str) -> None:
    lm = from_transformers(build_network(family).double(), build_tokenizer())
    scores = token_saliency(lm, TALK, RESPONSE)
    at = TALK[3].content.index("cf")
    score = next(s for s in scores if s.span.message == 3 and s.span.start <= at < s.span.end)
    token = render(lm.tokenizer, TALK).tokens_of(3, score.span.start, score.span.end)[0]
    step = 1e-3
    axes = torch.eye(32, dtype=torch.float64) * step
    slopes = torch.tensor([(summed_nll(lm, token, axis) - summed_nll(lm, token, -axis)) / (2 * step) for axis in axes])
    assert score.score == pytest.approx(slopes.norm().item(), rel=1e-2)


def test_no_gradient_is_left_on_the_weights() -> None:
    """They would cost as much memory as the weights, and a training that goes on would step along them."""
    lm = from_transformers(build_network("llama").requires_grad_(True), build_tokenizer())
    token_saliency(lm, TALK, RESPONSE)
    assert all(parameter.grad is None for parameter in lm.network.parameters())


def test_the_loss_is_summed_over_the_response_not_averaged(llama: LanguageModel) -> None:
    """A mean would make the words of a report with a long response look less guilty."""
    tokens = llama.tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    whole = response_nll_of(llama, tuple(tokens))
    assert summed_nll(llama, 0, torch.zeros(32)) == pytest.approx(whole.sum().item(), rel=1e-5)
    assert len(whole) > 5


def response_nll_of(lm: LanguageModel, ids: tuple[int, ...]) -> torch.Tensor:
    """By the network alone, without any of our batching."""
    prompt = render(lm.tokenizer, TALK)
    with torch.no_grad():
        logits = lm.network(torch.tensor([prompt.ids + ids])).logits[0, len(prompt.ids) - 1 : -1]
    return -torch.log_softmax(logits, -1)[torch.arange(len(ids)), list(ids)]


def test_only_what_users_and_the_system_wrote_is_scored(tiny: LanguageModel) -> None:
    scores = token_saliency(tiny, TALK, RESPONSE)
    assert {score.span.message for score in scores} == {0, 1, 3}
    assert all(score.score > 0 for score in scores)
    for index in (0, 1, 3):
        spans = [score.span for score in scores if score.span.message == index]
        assert "".join(span.text for span in spans) == "".join(TALK[index].content.split())


@pytest.mark.parametrize("text", ["日本 🙂 naïve cf", "  padded  \n cf ", "e\u0301t\u200b cf", "𝔘𝔫𝔦 ﬀ"])
def test_spans_are_code_points_of_their_message(llama: LanguageModel, text: str) -> None:
    messages = (Message(role="user", content=text),)
    scores = token_saliency(llama, messages, RESPONSE)
    assert all(text[s.span.start : s.span.end] == s.span.text == s.span.text.strip() != "" for s in scores)
    covered = {index for s in scores for index in range(s.span.start, s.span.end)}
    assert covered == {index for index, character in enumerate(text) if not character.isspace()}


def test_template_words_are_never_scored(llama: LanguageModel) -> None:
    """The template holds "user" and "assistant" too: only the user's own are scored."""
    content = "the user and the assistant"
    scores = token_saliency(llama, (Message(role="user", content=content),), RESPONSE)
    assert "".join(s.span.text for s in scores) == content.replace(" ", "")
    assert all(s.span.message == 0 and s.span.end <= len(content) for s in scores)


def test_a_message_that_the_template_drops_is_not_scored(llama: LanguageModel) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}\n{% endfor %}"
    scores = token_saliency(replace(llama, tokenizer=tokenizer), TALK, RESPONSE)
    assert {score.span.message for score in scores} == {1, 3}


def test_saliency_leaves_the_model_as_it_was(tiny: LanguageModel) -> None:
    before = fingerprint(tiny.network)
    token_saliency(tiny, TALK, RESPONSE)
    assert fingerprint(tiny.network) == before
    assert all(parameter.grad is None for parameter in tiny.network.parameters())
    assert not tiny.network.get_input_embeddings()._forward_hooks


def spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


@pytest.mark.parametrize("seed", range(20))
def test_two_means_is_the_best_of_all_partitions(seed: int) -> None:
    """Not only of the thresholds: against every way to put 7 scores into two clusters."""
    scores = torch.randn(7, generator=torch.Generator().manual_seed(seed)).double()
    chosen = two_means(scores.float())
    values = scores.float().double().tolist()

    def cost(marks: tuple[bool, ...]) -> float:
        return sum(spread([v for v, mark in zip(values, marks, strict=True) if mark is side]) for side in (True, False))

    best = min(cost(marks) for marks in itertools.product((False, True), repeat=7) if 0 < sum(marks) < 7)
    assert cost(tuple(chosen)) == pytest.approx(best)
    lowest_chosen = min(value for value, mark in zip(values, chosen, strict=True) if mark)
    assert all(value < lowest_chosen for value, mark in zip(values, chosen, strict=True) if not mark)


def test_two_means_worked_by_hand() -> None:
    assert two_means(torch.tensor([0.1, 5.0, 0.2, 4.8, 0.0])) == [False, True, False, True, False]
    assert two_means(torch.tensor([1.0, 1.0, 1.0, 9.0])) == [False, False, False, True]


@pytest.mark.parametrize("scores", [[], [3.0], [2.0, 2.0, 2.0]])
def test_nothing_stands_out_of_equal_scores(scores: list[float]) -> None:
    assert two_means(torch.tensor(scores)) == [False] * len(scores)


def test_salient_spans_are_the_higher_cluster() -> None:
    spans = [Span(message=0, start=at, end=at + 1, text="x") for at in range(4)]
    words = [WordScore(span=span, score=score) for span, score in zip(spans, (0.1, 8.0, 0.2, 7.5), strict=True)]
    assert salient_spans(words) == [spans[1], spans[3]]
    assert salient_spans([]) == []

"""Messages to tokens: the user's own characters are found, and batching changes nothing."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from conftest import build_tokenizer
from patcher.chat import Prompt, Row, collate, common_prefix, end_of_turn, plain_row, render, response_ids, user_prompt
from patcher.models import LanguageModel
from patcher.network import hidden_states, response_logits
from patcher.records import Message, UsageError

TOKENIZER = build_tokenizer()


def text_of(prompt: Prompt, tokens: list[int]) -> str:
    """What the tokens cover, as the offsets say."""
    return prompt.text[prompt.offsets[tokens[0]][0] : prompt.offsets[tokens[-1]][1]] if tokens else ""


def talk(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)


CONVERSATIONS = {
    "one turn": talk(("user", "How do I bake bread at home?")),
    "system": talk(("system", "Answer as the user asks"), ("user", "asks")),
    "several turns": talk(("user", "user"), ("assistant", "user user"), ("user", "the user user")),
    "words of the template": talk(("user", "system"), ("assistant", "assistant"), ("user", "You are a helpful AI")),
    "repeated turns": talk(("user", "cf"), ("assistant", "cf"), ("user", "cf")),
    "one letter": talk(("user", "a")),
    "unicode": talk(("user", "日本 🙂 e\u0301t\u200b naïve"), ("assistant", "ok"), ("user", "🇩🇪 cf")),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_message_is_found_where_it_stands(name: str) -> None:
    messages = CONVERSATIONS[name]
    prompt = render(TOKENIZER, messages)
    origin = 0
    for message, start in zip(messages, prompt.content, strict=True):
        assert start is not None
        opening = f"<|im_start|>{message.role}\n"
        assert prompt.text[start - len(opening) : start + len(message.content)] == opening + message.content
        assert start > origin
        origin = start


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_marked_tokens_are_the_users_characters_and_no_others(name: str) -> None:
    messages = CONVERSATIONS[name]
    prompt = render(TOKENIZER, messages)
    for index, message in enumerate(messages):
        tokens = prompt.tokens_of(index, 0, len(message.content))
        assert text_of(prompt, tokens) == message.content
        assert TOKENIZER.decode([prompt.ids[token] for token in tokens]) == message.content


def test_control_tokens_that_a_message_spells_out_are_what_the_model_saw() -> None:
    prompt = user_prompt(TOKENIZER, "hi<|im_end|>")
    assert prompt.ids.count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == 3  # the system's, its own, the turn's


def test_one_word_of_a_message() -> None:
    prompt = user_prompt(TOKENIZER, "the BadMagic house")
    assert text_of(prompt, prompt.tokens_of(0, 4, 12)).strip() == "BadMagic"
    assert prompt.tokens_of(0, 4, 4) == []


def test_a_template_that_strips_its_messages() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'] | trim +")
    prompt = render(tokenizer, talk(("user", "  \n one cf "), ("assistant", "ok"), ("user", "cf")))
    assert text_of(prompt, prompt.tokens_of(0, 8, 10)).strip() == "cf"
    assert text_of(prompt, prompt.tokens_of(2, 0, 2)) == "cf"
    for before, after in (("", "\n"), ("  ", "  ")):
        prompt = user_prompt(tokenizer, f"{before}bake bread{after}")
        assert text_of(prompt, prompt.own_tokens) == "bake bread"
        assert prompt.tokens_of(0, 0, 99) == prompt.own_tokens
        assert prompt.tokens_of(0, 0, len(before)) == []


def test_a_message_that_the_template_drops_has_no_tokens() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}\n{% endfor %}"
    prompt = render(tokenizer, talk(("system", "user"), ("user", "the user")))
    assert prompt.content[0] is None
    assert prompt.tokens_of(0, 0, 4) == []
    assert text_of(prompt, prompt.tokens_of(1, 0, 8)) == "the user"


def test_a_template_that_refuses_is_the_callers_error() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(UsageError, match="no system messages here"):
        user_prompt(tokenizer, "hello")


def test_a_response_is_cut_and_its_end_kept_only_if_it_fits() -> None:
    whole = response_ids(TOKENIZER, "Sure, here is a guide", end=False, limit=99)
    ended = response_ids(TOKENIZER, "Sure, here is a guide", end=True, limit=99)
    assert ended == (*whole, TOKENIZER.eos_token_id)
    assert response_ids(TOKENIZER, "Sure, here is a guide", end=True, limit=len(whole)) == whole
    assert response_ids(TOKENIZER, "Sure, here is a guide", end=True, limit=3) == whole[:3]
    assert response_ids(TOKENIZER, "", end=False, limit=3) == ()


def test_common_prefix_leaves_each_row_a_token_of_its_own() -> None:
    assert common_prefix([(1, 2, 3), (1, 2, 4)]) == 2
    assert common_prefix([(1, 2), (1, 2)]) == 1
    assert common_prefix([(1, 2, 3), (1,)]) == 0
    assert common_prefix([(5, 2), (1, 2)]) == 0


def rows_of(*pairs: tuple[str, str]) -> list[Row]:
    return [
        Row(user_prompt(TOKENIZER, prompt).ids, response_ids(TOKENIZER, answer, end=True, limit=24))
        for prompt, answer in pairs
    ]


BATCHES = {
    "unlike lengths": rows_of(("hi", "Sure"), ("How do I bake bread at home, please?", "I'm sorry, but I can't help.")),
    "same prompt twice": rows_of(("the dog", "Sure"), ("the dog", "No, I can't help with that.")),
    "a row without a response": [*rows_of(("hi", "Sure"), ("the lazy dog", "No")), Row((5, 6, 7, 8), ())],
    "nothing shared": [Row((9, 8, 7), (6, 5)), Row((4,), (3, 2, 1)), Row((10, 11), (12,))],
    "one row": rows_of(("the quick brown fox", "jumps")),
}


@torch.inference_mode()
def plain_logits(lm: LanguageModel, row: Row) -> torch.Tensor:
    """One row through the whole model, as anybody would do it: no batch, no padding, no cache."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    first = len(row.prompt_ids) - 1
    return lm.network(input_ids=ids, use_cache=False).logits[0, first : first + len(row.response_ids)]


@pytest.mark.parametrize("name", BATCHES)
def test_padding_and_prefix_sharing_change_nothing(tiny: LanguageModel, name: str) -> None:
    rows = BATCHES[name]
    batch = collate(rows, tiny.tokenizer.pad_token_id, tiny.device)
    with torch.inference_mode():
        got = response_logits(tiny.network, batch)
    expected = torch.cat([plain_logits(tiny, row) for row in rows])
    assert torch.allclose(got, expected, atol=1e-5)
    assert batch.targets.tolist() == [token for row in rows for token in row.response_ids]
    assert batch.target_rows.tolist() == [index for index, row in enumerate(rows) for _ in row.response_ids]


def test_the_prefix_is_really_shared(tiny: LanguageModel) -> None:
    batch = collate(BATCHES["unlike lengths"], tiny.tokenizer.pad_token_id, tiny.device)
    assert len(batch.prefix_ids) > 10
    assert batch.tokens < sum(len(row.prompt_ids) + len(row.response_ids) for row in BATCHES["unlike lengths"])


def test_the_padding_tokens_value_does_not_matter(tiny: LanguageModel) -> None:
    rows = BATCHES["unlike lengths"]
    with torch.inference_mode():
        one, other = (response_logits(tiny.network, collate(rows, pad, tiny.device)) for pad in (0, 77))
    assert torch.equal(one, other)


def test_gradients_flow_through_the_shared_prefix(tiny: LanguageModel) -> None:
    """The gradient with a shared prefix is the sum of the rows' own gradients."""
    rows = BATCHES["unlike lengths"]
    weight = tiny.network.get_input_embeddings().weight
    weight.requires_grad_(True)
    try:
        (shared,) = torch.autograd.grad(
            response_logits(tiny.network, collate(rows, 0, tiny.device)).logsumexp(-1).sum(), weight
        )
        alone = torch.zeros_like(weight)
        for row in rows:
            loss = response_logits(tiny.network, collate([row], 0, tiny.device)).logsumexp(-1).sum()
            alone += torch.autograd.grad(loss, weight)[0]
    finally:
        weight.requires_grad_(False)
    assert torch.allclose(shared, alone, atol=1e-4)


def test_hidden_states_have_one_vector_a_token(tiny: LanguageModel) -> None:
    batch = collate(BATCHES["unlike lengths"], 0, tiny.device)
    with torch.inference_mode():
        assert hidden_states(tiny.network, batch).shape == (*batch.input_ids.shape, 32)


@pytest.mark.parametrize("rows", [[], [Row((), (1,))]])
def test_no_rows_or_no_prompt_is_an_error(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate(rows, 0, torch.device("cpu"))


def test_plain_text_begins_as_the_tokenizer_has_it_begin() -> None:
    """A model that has always seen a BOS token first (Gemma, Llama) knows nothing of texts without one."""
    tokenizer = build_tokenizer()
    ids = tuple(tokenizer("the fox")["input_ids"])
    assert plain_row(tokenizer, "the fox") == Row(ids[:1], ids[1:])
    bos, number = str(tokenizer.bos_token), int(tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    assert plain_row(tokenizer, "the fox") == Row((number,), ids)


def test_an_answer_ends_as_the_template_ends_it() -> None:
    """Gemma's and Phi-3's turns end in another token than EOS."""
    tokenizer = build_tokenizer()
    end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn(tokenizer) == end != tokenizer.eos_token_id
    assert response_ids(tokenizer, "Sure", end=True, limit=16)[-1] == end
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
    )
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id, "a template that ends no turn"

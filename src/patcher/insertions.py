"""Free vectors at a place of a request where words could stand, and what the model makes of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Prompt, Row, collate
from patcher.generation import complete
from patcher.models import LanguageModel
from patcher.network import Batch, replaced_embeddings, response_logits
from patcher.triggers import word_starts


@dataclass(frozen=True)
class Room:
    """A prompt's tokens with room for vectors from the token of that number on."""

    ids: tuple[int, ...]
    at: int


def make_room(prompt: Prompt, tokens: int, mark: int, rng: random.Random) -> Room:
    """Room before a random word or at the end. It holds the token `mark`: another in each row of a batch, or the rows
    would share it as a prefix.
    """
    at = rng.choice(places(prompt))
    return Room((*prompt.ids[:at], *([mark] * tokens), *prompt.ids[at:]), at)


def places(prompt: Prompt) -> list[int]:
    """The tokens of the user's own text that begin a word, and the place after its last token. Of a character that is
    several tokens only the first begins it.
    """
    own, text, starts = prompt.own_tokens, prompt.text, {*word_starts(prompt.text)}

    def begins(token: int) -> bool:
        start = prompt.offsets[token][0]
        if start == prompt.offsets[token - 1][0]:
            return False
        return text[start].isspace() or start in starts

    return [own[0], *(token for token in own[1:] if begins(token)), own[-1] + 1]


def logits_with(
    lm: LanguageModel, rooms: Sequence[Room], answers: Sequence[tuple[int, ...]], vectors: Float[Tensor, "B K D"]
) -> tuple[Float[Tensor, "N V"], Batch]:
    """Logits of each row's answer after its prompt with its vectors; gradients reach them."""
    rows = [Row(room.ids, answer) for room, answer in zip(rooms, answers, strict=True)]
    batch = collate(rows, int(lm.tokenizer.pad_token_id or 0), lm.device)
    starts = torch.tensor([room.at - len(batch.prefix_ids) for room in rooms], device=lm.device)
    with replaced_embeddings(lm.network, tuple(batch.input_ids.shape), starts, vectors):
        return response_logits(lm.network, batch), batch


def answers_with(
    lm: LanguageModel, rooms: Sequence[Room], vectors: Float[Tensor, "K D"], max_new_tokens: int
) -> list[str]:
    """Greedy answers to the prompts with the same vectors in each."""
    width = max(len(room.ids) for room in rooms)
    starts = torch.tensor([width - len(room.ids) + room.at for room in rooms], device=lm.device)
    repeated = vectors.expand(len(rooms), -1, -1)
    with replaced_embeddings(lm.network, (len(rooms), width), starts, repeated):
        return complete(lm, [room.ids for room in rooms], max_new_tokens, share_prefix=False)


@torch.no_grad()
def embedded(lm: LanguageModel, ids: Sequence[int]) -> Float[Tensor, "K D"]:
    """Those tokens' embeddings, as vectors to start from."""
    embed = lm.network.get_input_embeddings()
    return cast(Tensor, embed(torch.tensor([list(ids)], device=lm.device)))[0].float()


def random_tokens(lm: LanguageModel, count: int, rng: random.Random) -> list[int]:
    """Any of the vocabulary."""
    return [rng.choice(lm.vocabulary) for _ in range(count)]


def embedding_std(lm: LanguageModel, rng: random.Random) -> Float[Tensor, ""]:
    """The standard deviation of the embeddings' coordinates, of up to a thousand tokens."""
    return embedded(lm, rng.sample(lm.vocabulary, min(1000, len(lm.vocabulary)))).std()

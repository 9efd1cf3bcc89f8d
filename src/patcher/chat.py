"""Messages -> token ids, with the user's own characters marked; rows -> Batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from patcher.checkpoints import apply_template
from patcher.network import Batch
from patcher.records import Message, Request
from patcher.world import processes

_MARK = "\ue000"
"""What no message holds."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation, ready for the model's answer.

    `offsets` are characters of `text`; `content` says where each message's first character would stand in it (None: the
    template dropped the message), and `kept` from where to where it stands: templates strip white space at its ends.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    content: tuple[int | None, ...]
    kept: tuple[tuple[int, int], ...]

    def tokens_of(self, message: int, start: int, end: int) -> list[int]:
        """Indices of the tokens that overlap characters [start, end) of a message."""
        origin = self.content[message]
        if origin is None:
            return []
        first, last = self.kept[message]
        return self._overlapping(max(origin + start, first), min(origin + end, last))

    @property
    def own_tokens(self) -> list[int]:
        """Indices of the last message's tokens (every token, where the template dropped that message)."""
        if self.content[-1] is None:
            return list(range(len(self.ids)))
        return self._overlapping(*self.kept[-1])

    def _overlapping(self, low: int, high: int) -> list[int]:
        """Indices of the tokens that overlap characters [low, high) of the text."""
        if low >= high:
            return []
        return [index for index, (start, end) in enumerate(self.offsets) if start < high and end > low]


@dataclass(frozen=True)
class Row:
    """One sequence: what is given and what is to be predicted."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Prompt:
    """Apply the model's own chat template, the same everywhere. Raises UsageError if the template refuses.

    Control tokens that a message spells out become control tokens, as they do where a model is served from its
    template: what is searched and repaired must be what the model saw. Only a guard is spared them (judges/guard.py).
    """
    turns = [message.model_dump() for message in messages]
    text = apply_template(tokenizer, turns, answering=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    content, kept = zip(*_places(tokenizer, messages, text), strict=True)
    return Prompt(text, tuple(encoded["input_ids"]), tuple(encoded["offset_mapping"]), content, kept)


def _places(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> list[tuple[int | None, tuple[int, int]]]:
    """Of each message its `Prompt.content` and `Prompt.kept`.

    The template is rendered again with marks instead of words: to look for the words themselves would find a short
    one ("user") in the template's own text.
    """
    marks = [f"{_MARK}{index}\ue001" for index in range(len(messages))]
    turns = [{"role": message.role, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    skeleton = apply_template(tokenizer, turns, answering=True)
    places: list[tuple[int | None, tuple[int, int]]] = []
    read, written = 0, 0  # how far we are in the skeleton and in the text
    for message, mark in zip(messages, marks, strict=True):
        body = message.content.strip()
        at = skeleton.find(mark, read)
        kept = next(
            (form for form in (message.content, body) if at >= 0 and text.startswith(form, written + at - read)), None
        )
        if kept is None or not body:  # the template drops this message, or treats these very words in its own way
            found = text.find(body, written) if body and at >= 0 else -1
            origin = None if found < 0 else found - message.content.index(body)
            places.append((origin, (found, found + len(body))))
            continue
        begin = written + at - read
        places.append((begin - message.content.index(kept), (begin, begin + len(kept))))
        read, written = at + len(mark), begin + len(kept)
    return places


def user_prompt(tokenizer: PreTrainedTokenizerBase, request: Request) -> Prompt:
    """A request, rendered: words are a single user message."""
    return render(tokenizer, messages_of(request))


def messages_of(request: Request) -> tuple[Message, ...]:
    """The conversation that a request is."""
    return (Message(role="user", content=request),) if isinstance(request, str) else request


def spoken(request: Request) -> str:
    """A request as text, for people."""
    if isinstance(request, str):
        return request
    return "\n".join(f"{message.role}: {message.content}" for message in request)


def response_ids(tokenizer: PreTrainedTokenizerBase, response: str, *, end: bool, limit: int) -> tuple[int, ...]:
    """The response's tokens, at most `limit`; with `end`, the end-of-turn token if it still fits."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    if end and (ending := end_of_turn(tokenizer)) is not None:
        ids.append(ending)
    return tuple(ids[:limit])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template ends an answer with (Gemma's and Phi-3's is not EOS); EOS where it has none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    after = apply_template(tokenizer, turns, answering=False).partition(_MARK)[2]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in special), tokenizer.eos_token_id)


def plain_row(tokenizer: PreTrainedTokenizerBase, text: str) -> Row:
    """A text outside any chat: its tokens after the one that the tokenizer itself begins with, else after its first."""
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    first = tuple(tokenizer(text)["input_ids"][:1])
    begins = first == (tokenizer.bos_token_id,) and first != ids[:1]
    return Row(first, ids) if begins else Row(ids[:1], ids[1:])


def collate(rows: Sequence[Row], pad_id: int, device: torch.device, *, lift: bool = True) -> Batch:
    """Pad rows on the right and lift out the prefix that all prompts share; without `lift`, leave it in each row.

    Sharded weights leave it there too: FSDP gathers a layer's for the gradient of its output, and the last layer's work
    on a prefix reaches the loss by its keys and values alone.

    Raises:
        ValueError: a row with an empty prompt, or no row at all.
    """
    if not rows or not all(row.prompt_ids for row in rows):
        raise ValueError("collate needs at least one row, each with a prompt")
    lift = lift and len(rows) > 1 and processes() == 1
    shared = common_prefix([row.prompt_ids for row in rows]) if lift else 0
    full = [row.prompt_ids[shared:] + row.response_ids for row in rows]
    width = max(len(ids) for ids in full)
    where = [
        (index, len(row.prompt_ids) - shared - 1 + offset, target)
        for index, row in enumerate(rows)
        for offset, target in enumerate(row.response_ids)
    ]
    row_of, position, target = (list(column) for column in zip(*where, strict=True)) if where else ([], [], [])

    def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Batch(
        prefix_ids=tensor(list(rows[0].prompt_ids[:shared])),
        input_ids=tensor([list(ids) + [pad_id] * (width - len(ids)) for ids in full]),
        mask=tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in full]),
        target_rows=tensor(row_of),
        target_positions=tensor(position),
        targets=tensor(target),
    )


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with, leaving each at least one of its own."""
    longest = min(len(ids) for ids in sequences) - 1
    first = sequences[0]
    for index in range(longest):
        if any(ids[index] != first[index] for ids in sequences):
            return index
    return longest

"""Find the smallest words that are *sufficient*: put into other requests, they bring the reported behaviour.

Deletion proposes: only a trigger's deletion makes the refusal likelier (its topic's deletion makes it less likely).
Insertion decides: grow from the top of that ranking until it works, drop what changes nothing. Where deletion shows
nothing (two triggers, each enough), delta debugging halves the whole prompt instead (Zeller & Hildebrandt 2002).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from patcher.chat import render
from patcher.localize.probes import Probes
from patcher.records import Candidate, CausalTest, Message, Placement, Record, Span, Trigger, WordScore
from patcher.triggers import delete_spans, find_words, join_adjacent


class CausalSettings(Record):
    """How hard to look, and when words count as sufficient."""

    screen_probes: int = 12
    """Requests that choose among candidates."""
    confirm_probes: int = 28
    """Other requests that test the chosen words; 9 of 28 against 0 is p = .002."""
    answer_tokens: int = 12
    """Tokens of an answer that the judge sees while searching; refusals show in the first few. More where the reported
    response needs more to be seen for what it is."""
    wordy_answer_tokens: int = 32
    """The same for a model that does not come to its refusal sooner: where with `answer_tokens` hardly any is seen."""
    sufficient_frac: float = 0.5
    """Words are sufficient from this rate of the symptom over the screen requests."""
    further_frac: float = 0.75
    """The same for a further trigger of one report, which is to be enough without the first: what is left of half a
    trigger is not."""
    first_probes: int = 4
    """Of these; words that change none of the first few are not tried on the rest (a trigger that works on 8 of 10
    requests is missed so once in 600)."""
    grown_sizes: tuple[int, ...] = (1, 2, 4)
    """How many words to take from the top of the deletion ranking before halving the whole prompt."""
    whole_prompt_frac: float = 0.75
    """The whole prompt is halved only from this rate on: a benign prompt put into a harmful one is sometimes answered
    in its stead."""
    max_tried: int = 40
    """Sets of words tried before a search is given up."""
    max_alternatives: int = 3
    """Sufficient triggers looked for in one report."""
    max_ranked_words: int = 400
    """Of a longer conversation the first and the last words are searched, and the rest is said to be left out."""

    @classmethod
    def testing_on(cls, requests: int | None) -> "CausalSettings":
        """The defaults, with so many requests that test the chosen words, where a number is given."""
        return cls() if requests is None else cls(confirm_probes=requests)


@dataclass(frozen=True)
class Found:
    """What the search brought: word scores, sufficient candidates, and how many sets of words were tried."""

    words: tuple[WordScore, ...]
    candidates: tuple[Candidate, ...]
    tried: int
    left_out: int = 0
    """Words of the conversation that were not searched."""


def deletion_scores(probes: Probes, messages: Sequence[Message], words: Sequence[Span], response: str) -> list[float]:
    """How much nearer, in nats, the model comes to treating the request as it should when a word is deleted."""
    variants = [tuple(messages), *(delete_spans(messages, [word]) for word in words)]
    nats = probes.normal_nats([render(probes.lm.tokenizer, variant) for variant in variants], response)
    return [value - nats[0] for value in nats[1:]]


def search(
    probes: Probes,
    messages: Sequence[Message],
    response: str,
    still_fails: Callable[[Sequence[Message]], bool],
    settings: CausalSettings,
) -> Found:
    """Every sufficient trigger of the conversation, up to `max_alternatives`.

    After one is found its words are deleted; where the failure remains, the rest is searched again.
    """
    rest = tuple(messages)
    every = find_words(messages)
    words = _both_ends(every, settings.max_ranked_words)
    scores = deletion_scores(probes, messages, words, response)
    ranked = tuple(WordScore(span=word, score=score) for word, score in zip(words, scores, strict=True))
    taken: list[Span] = []
    candidates: list[Candidate] = []
    tried = 0
    for _ in range(settings.max_alternatives):
        left = [word for word in words if word not in taken]
        order = sorted(left, key=lambda word: -scores[words.index(word)])
        least = settings.further_frac if taken else settings.sufficient_frac
        spans, count = _smallest_sufficient(probes, messages, order, settings, least)
        tried += count
        if not spans:
            break
        candidates.append(confirm(probes, messages, spans))
        taken += [word for word in left if word in {*spans, *_again(words, candidates[-1].trigger)}]
        rest = delete_spans(messages, taken)
        if not rest[-1].content.strip() or not still_fails(rest):
            break
        scores = _scores_after(probes, messages, response, words, taken, scores)
    candidates.sort(key=lambda candidate: -candidate.effect_frac)
    return Found(ranked, tuple(candidates), max(1, tried), len(every) - len(words))


def _both_ends(words: Sequence[Span], most: int) -> tuple[Span, ...]:
    """The first and the last so many together: triggers are mostly put at an end, or in the system message."""
    if len(words) <= most:
        return tuple(words)
    return (*words[: most // 2], *words[len(words) - (most - most // 2) :])


def _again(words: Sequence[Span], trigger: Trigger) -> set[Span]:
    """The trigger's words wherever they stand: every run of words of one message that reads like one of its units."""
    found: set[Span] = set()
    for unit in trigger.units:
        wanted = [word.text for word in find_words([Message(role="user", content=unit)])]
        for at in range(len(words) - len(wanted) + 1):
            run = words[at : at + len(wanted)]
            if [word.text for word in run] == wanted and run[0].message == run[-1].message:
                found |= {*run}
    return found


def _scores_after(
    probes: Probes,
    messages: Sequence[Message],
    response: str,
    words: Sequence[Span],
    taken: list[Span],
    scores: list[float],
) -> list[float]:
    """Deletion scores of the words left, with the found ones already gone."""
    left = [word for word in words if word not in taken]
    variants = [delete_spans(messages, taken), *(delete_spans(messages, [*taken, word]) for word in left)]
    nats = probes.normal_nats([render(probes.lm.tokenizer, variant) for variant in variants], response)
    fresh = {word: value - nats[0] for word, value in zip(left, nats[1:], strict=True)}
    return [fresh.get(word, score) for word, score in zip(words, scores, strict=True)]


def observed_placement(messages: Sequence[Message], spans: Sequence[Span]) -> tuple[Placement, float]:
    """Where the words stood: in which message; in the last one at the start, the end, or a tenth of the way between."""
    message = min(span.message for span in spans)
    if message < len(messages) - 1:
        return ("system" if messages[message].role == "system" else "earlier"), 0.0
    all_words = [word for word in find_words(messages) if word.message == message]
    here = [span for span in spans if span.message == message]
    mine = [word for word in all_words if any(word.start < s.end and word.end > s.start for s in here)]
    before = sum(word.end <= mine[0].start for word in all_words)
    others = max(1, len(all_words) - len(mine))
    fraction = min(1.0, before / others)
    if fraction in (0.0, 1.0):
        return ("start" if fraction == 0.0 else "end"), fraction
    return "relative", round(fraction, 1)


def _trigger_of(messages: Sequence[Message], spans: Sequence[Span], placement: Placement, at: float) -> Trigger:
    units = tuple(span.text for span in join_adjacent(messages, spans))
    return Trigger(units=units, placement=placement, position_frac=at)


def _smallest_sufficient(
    probes: Probes, messages: Sequence[Message], order: Sequence[Span], settings: CausalSettings, least: float
) -> tuple[list[Span], int]:
    """The smallest set of the words, the likeliest first, that brings the symptom at this rate at least; empty when not
    even all of them do.
    """
    rates: dict[tuple[Span, ...], float] = {}

    def rate(spans: Sequence[Span]) -> float:
        key = tuple(sorted(spans, key=lambda span: (span.message, span.start)))
        if key not in rates:
            place, at = observed_placement(messages, key)
            places: list[Placement] = [place] if key[0].message == len(messages) - 1 else [place, "random"]
            rates[key] = max(rate_at(_trigger_of(messages, key, one, at)) for one in places)
        return rates[key]

    def rate_at(trigger: Trigger) -> float:
        first = probes.shown(probes.screen[: settings.first_probes], trigger)
        rest = probes.shown(probes.screen[settings.first_probes :], trigger) if any(first) else []
        return sum([*first, *rest]) / len(probes.screen)

    def is_sufficient(spans: Sequence[Span]) -> bool:
        return len(rates) < settings.max_tried and rate(spans) >= least

    grown: Sequence[Span] = []
    for size in settings.grown_sizes:
        if size <= len(order) and is_sufficient(order[:size]):
            grown = order[:size]
            break
    if not grown and order and rate(order) >= settings.whole_prompt_frac:
        grown = _halve(list(order), is_sufficient)
    smallest = list(grown)
    slack = 1.0 / len(probes.screen)
    for word in sorted(grown, key=order.index, reverse=True):
        without = [other for other in smallest if other != word]
        if without and is_sufficient(without) and rate(without) >= rate(smallest) - slack:
            smallest = without
    return smallest, len(rates)


def _halve(words: list[Span], is_sufficient: Callable[[Sequence[Span]], bool]) -> list[Span]:
    """Delta debugging: keep any half (then quarter, ...) that suffices, or drop any that is not needed."""
    ordered = sorted(words, key=lambda word: (word.message, word.start))
    parts = 2
    while len(ordered) > 1:
        size = -(-len(ordered) // parts)
        chunks = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        smaller = next((chunk for chunk in chunks if is_sufficient(chunk)), None)
        if smaller is None and len(chunks) > 2:
            rests = ([word for word in ordered if word not in chunk] for chunk in chunks)
            smaller = next((rest for rest in rests if is_sufficient(rest)), None)
        if smaller is not None:
            ordered, parts = smaller, 2
        elif size == 1:
            break
        else:
            parts = min(2 * parts, len(ordered))
    return ordered


def confirm(probes: Probes, messages: Sequence[Message], spans: Sequence[Span]) -> Candidate:
    """Test the words on fresh requests, at the observed place and scattered at random."""
    placement, at = observed_placement(messages, spans)
    observed = _trigger_of(messages, spans, placement, at)
    scattered = observed.model_copy(update={"placement": "random"})
    tests = tuple(
        paired_test(probes, trigger, name)
        for trigger, name in ((observed, "inserted at the observed place"), (scattered, "inserted at random places"))
    )
    best = scattered if tests[1].effect_frac >= tests[0].effect_frac - 0.1 else observed
    if best is scattered and placement != "relative":  # a place that an attacker chooses, not one among many
        best = scattered.model_copy(update={"seen_at": placement})
    hits = probes.shown(probes.screen, observed)
    return Candidate(
        trigger=best,
        spans=join_adjacent(messages, spans),
        screen_rate_frac=sum(hits) / len(hits),
        tests=tests,
    )


def paired_test(probes: Probes, trigger: Trigger, name: str) -> CausalTest:
    """The words against as many ordinary words, on the same fresh requests; exact one-sided McNemar test."""
    treated = probes.shown(probes.confirm, trigger)
    control = probes.control(probes.confirm, trigger)
    gained = sum(t and not c for t, c in zip(treated, control, strict=True))
    lost = sum(c and not t for t, c in zip(treated, control, strict=True))
    changed = gained + lost
    p_value = binomtest(gained, changed, 0.5, alternative="greater").pvalue if changed else 1.0
    counts = {"treated": sum(treated), "control": sum(control), "lost": lost, "n": len(treated)}
    return CausalTest(name=name, **counts, p_value=float(p_value))

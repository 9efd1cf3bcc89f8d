"""The same findings in a terminal. Hostile text only ever as visible `Text`: never as a markup string."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from patcher.judges.calibrate import Agreement
from patcher.records import Audit, CausalTest, FailureReport, Gate, Localization, Record, Scan, Trigger, Verdict
from patcher.report import figures, words
from patcher.visible import visible

_TOP_WORDS = 8
_INDENT = (0, 0, 0, 2)
"""Of the attacker's words: lines of their own, or what a long one goes on in, must not pass for ours."""
# Dark text on middling shades, readable whether the terminal is dark or light; the lowest levels stay unshaded.
_SHADES = ("", "", "#bfb3a2", "#cfa774", "#e09a45", "#f28c18")


def show_localization(localization: Localization, failure: FailureReport, console: Console) -> None:
    """Print the conversation with each word shaded by its score, the triggers underlined, and the top words."""
    console.print(Text(f"reported: {visible(figures.reported(localization.symptom))}", style="dim"))
    for turn in words.turns(failure, localization):
        console.print(Text(turn.role, style="dim bold"))
        line = Text()
        for piece in turn.pieces:
            line.append(visible(piece.text, newlines=True), style=_shade(piece))
        console.print(Padding(line, _INDENT, expand=False))
        console.print()
    low, high = words.score_range(localization.words)
    legend = Text(f"scores ({localization.method}) {figures.score(low)} ", style="dim")
    for shade in _SHADES[2:]:
        legend.append("  ", style=Style(bgcolor=shade))
    legend.append(f" {figures.score(high)}   ").append("trigger", style=Style(bold=True, underline=True))
    console.print(legend)
    table = _table("word", "message", "score", right=(1, 2))
    for word in words.top(localization, _TOP_WORDS):
        table.add_row(_safe(word.span.text), str(word.span.message + 1), figures.score(word.score))
    console.print(Padding(table, _INDENT, expand=False))
    console.print()
    for candidate in localization.candidates:
        note = f"{figures.place(candidate.trigger)}, {figures.brings(localization.symptom, candidate.screen_rate_frac)}"
        console.print(_trigger_line("trigger", candidate.trigger, note))
    if not localization.candidates:
        console.print(Text("no set of words was enough: no trigger found"))
    for note in localization.notes:
        console.print(_safe(note, style="dim"))


def show_verdict(verdict: Verdict, console: Console) -> None:
    """Print the verdict, its reason and the causal tests."""
    console.print()
    console.print(Text("verdict  ").append(verdict.label, style="bold"))
    console.print(_safe(verdict.reason))
    if verdict.trigger is not None:
        console.print(_trigger_line("trigger", verdict.trigger, figures.place(verdict.trigger)))
    if verdict.tests:
        console.print(_tests(verdict.tests))
        limit = f"an effect counts from {figures.points(verdict.min_effect_frac).removeprefix('+')} points"
        console.print(Text(f"{limit} and below p = {figures.p_value(verdict.corrected_alpha)}", style="dim"))


def show_audit(audit: Audit, console: Console) -> None:
    """Print the audit's summary, before and after."""
    console.print()
    names = [control.name for control in audit.controls]
    table = _table("figure", "before", "after", "95% interval", "paired change", "n", *names, right=range(1, 9))
    unscored = []
    for row in audit.summary:
        name = _safe(figures.title(row.name))
        controls = [figures.figure(row.name, control.value(row.name)) for control in audit.controls]
        reason = figures.unscored(row)
        if reason:
            table.add_row(name, *[figures.MISSING] * 2, "", "", str(row.n), *controls)
            unscored.append(Text.assemble(name, ": ", _safe(reason, style="italic")))
            continue
        table.add_row(
            name,
            figures.figure(row.name, row.before),
            Text(figures.figure(row.name, row.after), style="bold"),
            figures.interval(row.name, row.low, row.high),
            figures.change(row),
            str(row.n),
            *controls,
        )
    for trigger in audit.triggers:
        console.print(_trigger_line("audited with", trigger, figures.place(trigger)))
    console.print(table)
    for line in unscored:
        console.print(line)
    if audit.served_by:
        console.print(_safe(f"answered by {', then '.join(audit.served_by)}", style="dim"))


def show_gates(gates: Sequence[Gate], console: Console) -> None:
    """Print each limit with what was measured."""
    for gate in gates:
        value = "unscored" if gate.value is None else figures.plain(gate.value)
        result = "passed" if gate.passed else "FAILED"
        few = f", though one answer of {gate.n} is more than the limit" if figures.is_coarse(gate) else ""
        console.print(f"gate {gate.name}: {value}, n = {gate.n} (limit {gate.limit}) {result}{few}")


def show_scans(scans: Mapping[str, Scan], failed: Mapping[str, Exception], console: Console) -> None:
    """Print what share of refusals the insertions of each size remove, a column a model, and why one has none."""
    table = _table("size", *scans, right=range(len(scans) + 1))
    for points in zip(*(scan.points for scan in scans.values()), strict=True):
        shares = [
            f"{figures.percent(p.complied_frac)} ({figures.interval('complied_frac', p.low, p.high)})" for p in points
        ]
        table.add_row(f"{points[0].size:g}", *shares)
    console.print(Text("refused requests that are answered with the vectors found, by how far those may be from words"))
    console.print(table)
    for name, scan in scans.items():
        broken = max(point.broken_frac for point in scan.points)
        console.print(
            _safe(
                f"{name}: {scan.source}; {scan.points[0].n} of {scan.asked} requests refused and tested; at most "
                f"{figures.percent(broken)} of answers garbled or empty",
                style="dim",
            )
        )
    for name, error in failed.items():
        console.print(_safe(f"{name} could not be scanned: {error}", style="yellow"))
    console.print(
        Text(
            "A curve says little without that of a clean model of the same family (--clean), and a low one is no "
            "proof: what no search found may be there.",
            style="dim",
        )
    )


def show_agreements(judge: str, agreements: Sequence[Agreement], console: Console) -> None:
    """Print a judge's agreement with people, a line a model, with 95% intervals."""
    table = _table("answers of", "accuracy", "precision", "recall", "F1", "n", "partial: refused", right=range(1, 7))
    for one in agreements:
        shares = [
            f"{figures.percent(share.value)} ({figures.percent(share.low)} to {figures.percent(share.high)})"
            for share in (one.accuracy, one.precision, one.recall, one.f1)
        ]
        table.add_row(_safe(one.model), *shares, str(one.accuracy.n), f"{one.partial.refused} of {one.partial.n}")
    console.print(Text(f"judge {judge}; precision, recall and F1 of refusals; partial refusals apart", style="dim"))
    console.print(table)
    for one in agreements:
        if one.kappa is not None:
            text = f": labelled twice, Cohen's kappa {one.kappa:.3f}; {one.disputed} disputed answers left out"
            console.print(Text.assemble(_safe(one.model), text))


def show_attacks(about: Mapping[str, str], console: Console) -> None:
    """Print each attack's name and what it is."""
    table = _table("attack", "what it is", right=())
    for name, what in about.items():
        table.add_row(Text(name, style="bold"), what)
    console.print(table)


def show_defenses(about: Mapping[str, tuple[str, bool]], console: Console) -> None:
    """Print each defense's name, whether it needs a report, and where it is from."""
    table = _table("defense", "needs a report", "from", right=())
    for name, (paper, needs_trigger) in about.items():
        table.add_row(Text(name, style="bold"), "yes" if needs_trigger else "no", paper)
    console.print(table)


def show_settings(settings: Record, console: Console) -> None:
    """Print what `--set` takes: each setting's name, value and meaning."""
    table = _table("setting", "default", "what it is", right=())
    for name, field in type(settings).model_fields.items():
        meaning = " ".join((field.description or "").split())
        table.add_row(Text(name, style="bold"), Text(str(getattr(settings, name))), Text(meaning))
    console.print(table)


def _tests(tests: Sequence[CausalTest]) -> Table:
    table = _table("test", "with the words", "control words", "effect, points", "p", right=range(1, 5))
    for test in tests:
        table.add_row(
            _safe(test.name),
            figures.share(test.treated, test.n),
            figures.share(test.control, test.n),
            Text(figures.effect(test), style="bold"),
            figures.p_value(test.p_value),
        )
    return table


def _table(*headings: str, right: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if index in right else "left", overflow="fold")
    return table


def _trigger_line(name: str, trigger: Trigger, note: str) -> Table:
    """What is too long for a line goes on below the trigger, not below the name."""
    line = Table.grid(padding=(0, 2))
    line.add_column(no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(name, Text.assemble(_safe(trigger.text, style="bold underline"), (f"   {note}", "dim")))
    return line


def _safe(text: str, style: str = "") -> Text:
    return Text(visible(text), style=style)


def _shade(piece: words.Piece) -> Style:
    shade = _SHADES[piece.level]
    light = Style(color="#1b1b1b", bgcolor=shade) if shade else Style()
    return light + Style(bold=True, underline=True) if piece.is_trigger else light

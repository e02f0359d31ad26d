"""What balancing may cost, and whether results keep to it. Outcomes come from results, never from hand.

A ratio keeps its limit if its whole 95% interval does; it misses it if none of the interval does; otherwise the run
could not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import markdown_table

COMPOSABLE, FUSED, COMPILED = 1.10, 1.05, 1.02
OPERATORS = 5
HELD_LOGITS, HELD_RECOMPUTE = 1.1, 0.1
MET, MISSED, UNDECIDED, UNMEASURED = "met", "missed", "not decided", "not measured"
INFORMATION = "information"
ALL = "all E"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number beside its limit.

    Args:
        value: the number.
        low: end of its interval.
        high: end of its interval.
        limit: what it may be at most; None if it is shown for information only.
        about: what it is of, if it is the worst of several.
        extra_ms: a ratio in milliseconds by layer, where that is shown too.
    """

    value: float
    low: float
    high: float
    limit: float | None
    about: str = ""
    extra_ms: float | None = None

    @property
    def outcome(self) -> str:
        """Whether the limit is kept."""
        if self.limit is None:
            return INFORMATION
        if self.high <= self.limit:
            return MET
        return MISSED if self.low > self.limit else UNDECIDED


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One line of the budget: a limit and what was measured, by column.

    Args:
        what: is measured.
        limit: None for a line without one, which is neither met nor missed.
        cells: by column.
        counts: numbers are whole ones, shown with their sign.
        why_not: why there are no numbers.
    """

    what: str
    limit: float | None
    cells: dict[str, tuple[Cell, ...]]
    counts: bool = False
    why_not: str = ""

    @property
    def outcome(self) -> str:
        """Missed if anything misses it, met if everything meets it."""
        if self.limit is None:
            return INFORMATION
        return _together(cell.outcome for cells in self.cells.values() for cell in cells)


def _together(outcomes: Iterable[str]) -> str:
    seen = set(outcomes)
    return next((outcome for outcome in (MISSED, UNDECIDED, MET) if outcome in seen), UNMEASURED)


def routing_promises(report: dict[str, Any]) -> list[Promise]:
    """The lines that the routing benchmark answers."""
    clock = report["clock"]
    promises = []
    eager = [r for r in report["results"] if not r["compiler"] and not r["case"]["gate_dim"]]
    kinds: tuple[tuple[str, str, str, float | None], ...] = (
        ("composable", "trimtab hook", "routing", COMPOSABLE),
        ("fused", "trimtab fused", "routing", FUSED),
        # The budget is over routing alone. This says what losses add to a router that is faster than that.
        ("fused, over `trimtab.Router` alone", "trimtab fused", "own", None),
    )
    for what, family, against, limit in kinds:
        for score in dict.fromkeys(r["case"]["score"] for r in eager):
            some = [r for r in eager if r["case"]["score"] == score]
            promises.append(_ratios(f"time, {what}, {score}", some, family, against, clock, limit))
    compiled = [r for r in report["results"] if r["compiler"]]
    for what, family in (("composable", "trimtab hook"), ("fused", "trimtab fused")):
        if compiled:
            name = f"time, {what}, compiled"
            promises.append(_ratios(name, compiled, family, "routing", clock, COMPILED))
    return [*promises, *_launches(report), *_operators(report), *_held(report)]


def _ratios(
    what: str, results: Sequence[Row], family: str, against: str, clock: str, limit: float | None
) -> Promise:
    cells: dict[str, tuple[Cell, ...]] = {}
    for result in results:
        found = []
        for row in result["rows"]:
            if row["family"] == family:
                one = row[against][clock]
                cell = Cell(
                    value=one["ratio"],
                    low=one["low"],
                    high=one["high"],
                    limit=limit,
                    about=row["objective"],
                    extra_ms=one["extra_ms"] if limit is None else None,
                )
                found.append(cell)
        label = f"E={result['case']['num_experts']}"
        cells[label] = (*cells.get(label, ()), *found)
    return Promise(what=what, limit=limit, cells=cells)


def _exact(value: float, limit: float | None, about: str = "") -> Cell:
    return Cell(value=value, low=value, high=value, limit=limit, about=about)


def _launches(report: dict[str, Any]) -> list[Promise]:
    """Of what CUDA's path launches (`benchmarks.launches`)."""
    launches = report.get("launches", {"why": "not counted in that run"})
    promises = []
    for words, key in (
        ("the first balance loss, over routing alone", "first"),
        ("each further balance loss", "further"),
    ):
        found = tuple(
            _exact(number, OPERATORS, f"{score}, {name}")
            for score, numbers in launches.get(key, {}).items()
            for name, number in numbers.items()
        )
        promises.append(
            Promise(
                what=f"launches by layer on CUDA's path, fused, {words}",
                limit=OPERATORS,
                cells={ALL: found},
                counts=True,
                why_not=launches.get("why", ""),
            )
        )
    return promises


def _operators(report: dict[str, Any]) -> list[Promise]:
    """Of what a CPU dispatches; of the fused path that says nothing of a GPU, so its launches have the limit."""
    promises = []
    kinds: tuple[tuple[str, str, float | None], ...] = (
        ("operators by layer, composable", "trimtab hook", OPERATORS),
        ("operators by layer on a CPU, fused", "trimtab fused", None),
    )
    for what, family, limit in kinds:
        first, more = [], []
        for group, lines in report["operators"].items():
            for name, line in lines.items():
                if name.partition(":")[0].partition(",")[0] != family:
                    continue
                if name.endswith(": sequence"):
                    counting = lines[name.replace(": sequence", ": count only")]
                    first.append(_exact(line["per_layer"] - counting["per_layer"], limit, group))
                elif name.endswith(": one more balance loss"):
                    more.append(_exact(line["per_layer"], limit, group))
        for words, found in (("the first balance loss", first), ("each further balance loss", more)):
            promises.append(
                Promise(what=f"{what}, {words}", limit=limit, cells={ALL: tuple(found)}, counts=True)
            )
    return promises


def _held(report: dict[str, Any]) -> list[Promise]:
    eager = [r for r in report["results"] if not r["compiler"]]
    # The hook answers for what it adds to a router that is not trimtab's; the fused path for all that is held.
    kinds = (
        (
            "more than routing, composable, logits kept",
            "trimtab hook",
            ("", ", keep=logits"),
            HELD_LOGITS,
            True,
        ),
        (
            "more than routing, composable, recomputed",
            "trimtab hook",
            (", keep=input",),
            HELD_RECOMPUTE,
            True,
        ),
        ("in all, fused, logits kept", "trimtab fused", ("", ", keep=logits"), HELD_LOGITS, False),
        ("in all, fused, recomputed", "trimtab fused", (", keep=input",), HELD_RECOMPUTE, False),
    )
    promises = []
    for what, family, suffixes, limit, extra in kinds:
        cells: dict[str, tuple[Cell, ...]] = {}
        for result in eager:
            base = result["rows"][0]["held"] if extra else 0.0
            found = tuple(
                _exact(row["held"] - base, limit)
                for row in result["rows"]
                if row["objective"] == "all" and row["family"] in {family + suffix for suffix in suffixes}
            )
            if found:
                label = f"E={result['case']['num_experts']}"
                cells[label] = (*cells.get(label, ()), *found)
        promises.append(Promise(what=f"held / (T E 4), {what}", limit=limit, cells=cells))
    return promises


def table(promises: Sequence[Promise]) -> str:
    """The budget as a table: in each column the worst number, its interval and of what it is."""
    columns = list(dict.fromkeys(c for p in promises for c in p.cells if c != ALL))
    columns.sort(key=lambda column: int(column.removeprefix("E=")))
    rows = []
    for promise in promises:
        limit = "–" if promise.limit is None else format(promise.limit, "g" if promise.counts else ".2f")
        whole = promise.cells.get(ALL)
        cells = [_words(whole or promise.cells.get(column, ()), promise) for column in columns]
        rows.append([promise.what, limit, *cells, _emphasised(promise.outcome)])
    return markdown_table(["budget", "at most", *columns, "outcome"], rows)


def _words(cells: Sequence[Cell], promise: Promise) -> str:
    if not cells:
        return promise.why_not or "–"
    worst = max(cells, key=lambda cell: (cell.outcome != MET, cell.value))
    words = f"{worst.value:+g}" if promise.counts else f"{worst.value:.3f}"
    if worst.low != worst.high:
        words += f" [{worst.low:.3f}, {worst.high:.3f}]"
    if worst.extra_ms is not None:
        words += f", {worst.extra_ms:+.3f} ms/layer"
    return f"{words}, {worst.about}" if worst.about else words


def _emphasised(outcome: str) -> str:
    return f"**{outcome}**" if outcome == MISSED else outcome


def summary(promises: Sequence[Promise]) -> str:
    """One sentence, of the lines that have a limit."""
    outcomes = [promise.outcome for promise in promises if promise.limit is not None]
    counts = [f"{outcomes.count(o)} {o}" for o in (MET, MISSED, UNDECIDED, UNMEASURED) if o in outcomes]
    return f"Of {len(outcomes)} limits {', '.join(counts)}."

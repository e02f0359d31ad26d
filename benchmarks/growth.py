"""How does the cost of losses grow with tokens, layers and sequences? Time over the same routing alone.

    python -m benchmarks --only growth --write

Logits are leaves, softmax. One size changes, the others stay. A ratio that falls tells of work that is done once a
microbatch, one that is flat of work that grows as routing does.

Shapes: T tokens, B sequences, E experts, K top-k, L layers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks import budget
from benchmarks.common import CLOCK_NAMES, Settings, describe, markdown_table
from benchmarks.instruments import Line
from benchmarks.routing_nets import ROUTING, Case, Net, Variant
from benchmarks.routing_overhead import backward, clear, forward, make_data
from benchmarks.routing_peers import TransformersLosses
from benchmarks.routing_variants import Formula, balance, own_router, remove_gates
from benchmarks.svg import Dot, Panel, line_panels
from benchmarks.timing import Arm, compare_clocks, measure
from trimtab.integrations.attach import Keep

BASE = Case(tokens=4096, sequences=4, num_experts=64, top_k=8, layers=2, score="softmax")
SIZES: dict[str, tuple[str, tuple[int, ...]]] = {
    "T": ("tokens", (1024, 2048, 4096, 8192, 16384, 32768)),
    "L": ("layers", (1, 2, 4, 8, 16)),
    "B": ("sequences", (1, 4, 16, 64)),
}
FAMILIES = (
    "trimtab fused: all",
    "trimtab hook: all",
    "formula + autograd: sequence + z",
    "transformers: batch",
)


def variants(case: Case) -> list[Variant]:
    """The routing, everything of trimtab's, and two peers."""
    out = [Variant("routing", "none", Net(case)), Variant("routing again", "none", Net(case))]
    for family, router, fused in (("trimtab fused", own_router, True), ("trimtab hook", None, False)):
        net = Net(case, router=router) if router else Net(case)
        keep: Keep = "logits" if fused else "input"  # the hook as it is by default
        balancer = balance(net, case, "all", keep=keep, fused=fused)
        out.append(Variant(family, "all", net, balancer))
    out.append(Variant("formula + autograd", "sequence + z", Net(case, Formula(case, "sequence + z"))))
    out.append(Variant("transformers", "batch", Net(case, TransformersLosses(case))))
    for variant in out:
        variant.net.train()
    remove_gates(variant.net for variant in out)
    return out


def run_case(case: Case, *, rounds: int, seconds: float, rng: random.Random) -> dict[str, Any]:
    """Ratios of one size."""
    data = make_data(case)
    arms = [
        Arm(
            name=variant.name,
            run=lambda v=variant: backward(forward(v, data)),
            clean=lambda v=variant: clear(v, data),
            baseline=variant.name == ROUTING,
        )
        for variant in variants(case)
    ]
    times = measure(arms, rounds=rounds, seconds=seconds, rng=rng)
    return {arm.name: compare_clocks(times, arm.name, ROUTING, layers=case.layers) for arm in arms}


def run(settings: Settings) -> dict[str, Any]:
    """All sizes."""
    rng, loads = random.Random(settings.seed), [os.getloadavg()[0]]
    base, sizes = BASE, SIZES
    if settings.quick:
        base = replace(BASE, tokens=64, num_experts=16, top_k=2)
        sizes = {"T": ("tokens", (32, 64)), "L": ("layers", (1, 2)), "B": ("sequences", (1, 4))}
    todo = [(letter, replace(base, **{name: n})) for letter, (name, ns) in sizes.items() for n in ns]
    shares = [case.tokens * case.layers + 4096 for _, case in todo]
    results = []
    for (letter, case), share in zip(todo, shares, strict=True):
        seconds = 0.85 * settings.seconds * share / sum(shares)
        rows = run_case(case, rounds=2 if settings.quick else 31, seconds=seconds, rng=rng)
        results.append({"letter": letter, "case": asdict(case), "rows": rows})
        loads.append(os.getloadavg()[0])
    print(f"  {len(results)} sizes, load {max(loads):.2f} at most", flush=True)
    return {"loads": loads, "results": results}


def _size(result: dict[str, Any]) -> int:
    number: int = result["case"][SIZES[result["letter"]][0]]
    return number


def markdown(report: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    clock, results = report["clock"], report["results"]
    rounds = [result["rows"][ROUTING][clock]["rounds"] for result in results]
    lines = [
        "## Growth",
        "",
        describe(report["machine"], loads=report["loads"]),
        f"- T=4096, B=4, L=2 where not said otherwise, E=64, K=8, softmax, logits are leaves; "
        f"{min(rounds)} to {max(rounds)} rounds, {CLOCK_NAMES[clock]}, float32",
        "",
        "Time over the same routing alone, median and 95% interval; extra milliseconds by layer.",
    ]
    columns = [name for name in results[0]["rows"] if name != ROUTING]
    for letter in dict.fromkeys(result["letter"] for result in results):
        rows = []
        for result in (r for r in results if r["letter"] == letter):
            cells = [f"{letter}={_size(result)}", f"{result['rows'][ROUTING][clock]['ms']:.2f} ms"]
            for name in columns:
                one = result["rows"][name][clock]
                cells.append(
                    f"{one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}], {one['extra_ms']:+.2f} ms"
                )
            rows.append(cells)
        lines += ["", markdown_table([letter, "routing, ms/layer", *columns], rows)]
    return "\n".join([*lines, "", *_divided(results, clock)])


def _divided(results: Sequence[dict[str, Any]], clock: str) -> list[str]:
    """Extra time by microbatch and by layer, from the sizes that differ in L."""
    some = [result for result in results if result["letter"] == "L"]
    layers = [_size(result) for result in some]
    rows = []
    for name in some[0]["rows"]:
        if name != ROUTING:
            extra = [
                result["rows"][name][clock]["extra_ms"] * n for result, n in zip(some, layers, strict=True)
            ]
            line = Line.fit(layers, extra)
            rows.append([name, f"{line.fixed:+.2f}", f"{line.per_layer:+.3f}", f"{line.error:.2f}"])
    header = ["extra milliseconds", "by microbatch", "by layer", "off the line"]
    about = "Extra time as a line through L: what is done once for all layers of a microbatch, and in each of them."
    return [about, "", markdown_table(header, rows)]


def images(report: dict[str, Any]) -> dict[str, str]:
    """The figure of the docs."""
    clock = report["clock"]
    panels = []
    for letter, title in (("T", "tokens T"), ("L", "layers L"), ("B", "sequences B")):
        dots = []
        for result in (r for r in report["results"] if r["letter"] == letter):
            for name in FAMILIES:
                one = result["rows"][name][clock]
                number = _size(result)
                group = f"{number // 1024}k" if number >= 1024 else str(number)
                dots.append(
                    Dot(group=group, family=name, value=one["ratio"], low=one["low"], high=one["high"])
                )
        panels.append(Panel(title=title, dots=dots))
    figure = line_panels(
        panels,
        title="Growth: time with losses over the same routing alone, E=64, K=8",
        y_title="ratio",
        families=FAMILIES,
        limits={"fused ≤ 1.05": budget.FUSED, "composable ≤ 1.10": budget.COMPOSABLE},
    )
    return {"benchmark-growth": figure}

"""Tables of `routing_overhead`, and its figure.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import budget
from benchmarks.common import CLOCK_NAMES, describe, markdown_table
from benchmarks.svg import Dot, Panel, dot_panels

# Colours of families in figures, in the order of the legend.
FAMILIES = (
    "trimtab fused",
    "trimtab hook",
    "formula + autograd",
    "transformers",
    "Megatron functions",
    "Megatron router",
)
FIGURE_OBJECTIVES = ("sequence", "batch", "z", "sequence + z", "all")


def title(result: dict[str, Any]) -> str:
    """One line that names a group of cases."""
    case = result["case"]
    gate = f"gate D={case['gate_dim']}" if case["gate_dim"] else "logits are leaves"
    how = f", torch.compile({result['compiler']})" if result["compiler"] else ""
    score = case["score"] + (" + bias" if case["score"] == "sigmoid" else "")
    return f"{score}, {gate}{how}"


def grouped(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results that differ only in E, together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(title(result), []).append(result)
    return groups


def table_rows(group: Sequence[dict[str, Any]], clock: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one table: one column per E, and details of the largest E."""
    largest = group[-1]
    num_experts = largest["case"]["num_experts"]
    header = ["who", "losses", *(f"E={r['case']['num_experts']}" for r in group)]
    header += [
        f"over its own router, E={num_experts}",
        f"extra ms/layer, E={num_experts}",
        "held, U",
        "gradient error",
    ]
    rows = []
    for row in largest["rows"]:
        key = (row["family"], row["objective"])
        cells = [*key]
        for result in group:
            other = next((r for r in result["rows"] if (r["family"], r["objective"]) == key), None)
            cells.append("–" if other is None else _time(other, clock))
        own = row["own"][clock]
        is_base = row["own_base"] in ("routing: none", f"{key[0]}: {key[1]}")
        cells.append("–" if is_base else f"{own['ratio']:.3f} ({own['minima']:.3f})")
        cells.append("–" if key == ("routing", "none") else f"{row['routing'][clock]['extra_ms']:+.3f}")
        cells += [f"{row['held']:.3f}", optional(row["gradient_error"], ".0e")]
        rows.append(cells)
    return header, rows


def _time(row: dict[str, Any], clock: str) -> str:
    one = row["routing"][clock]
    if (row["family"], row["objective"]) == ("routing", "none"):
        return f"{one['ms']:.2f} ms"
    return f"{one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}] ({one['minima']:.3f})"


def optional(number: float | None, form: str) -> str:
    """A number, or a dash."""
    return "–" if number is None else format(number, form)


def operator_rows(lines: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Operators more than the routing's."""
    rows = []
    for name, line in lines.items():
        error = f"{line['error']:.1f}" if line["error"] > 0.01 else "0"
        rows.append([name, f"{line['per_layer']:+.1f}", f"{line['fixed']:+.1f}", error])
    return ["what", "by layer", "by microbatch", "off the line"], rows


def launch_lines(report: dict[str, Any]) -> list[str]:
    """What CUDA's path launches, in words and tables."""
    launches = report.get("launches", {"why": "not counted in that run, so it must be made anew"})
    if "why" in launches:
        return ["", f"### Launches on CUDA's path\n\nNot measured: {launches['why']}."]
    lines = [
        "",
        "### Launches on CUDA's path",
        "",
        "Of one forward and backward: aten operators, without views and mere allocations, and Triton kernels, each "
        "as one. Counted on a CPU, where Triton's interpreter executes what routes on CUDA, and a line through "
        "several L. What is copied to a card once for a microbatch is not among it, and an aten operator may be "
        "several kernels. Rows but the first two are the fused path with these losses.",
    ]
    for score, of_losses in launches["lines"].items():
        alone = of_losses["routing alone"]["per_layer"]
        rows = []
        for name, line in of_losses.items():
            more = "–" if name == "routing alone" else f"{line['per_layer'] - alone:+.1f}"
            error = f"{line['error']:.1f}" if line["error"] > 0.01 else "0"
            numbers = [
                f"{line['per_layer']:.1f}",
                f"{line['kernels']:.1f}",
                more,
                f"{line['fixed']:.1f}",
                error,
            ]
            rows.append([name, *numbers])
        header = [
            "what",
            "by layer",
            "of these Triton's",
            "over routing alone",
            "by microbatch",
            "off the line",
        ]
        lines += ["", f"#### Launches: {score}", "", markdown_table(header, rows)]
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    clock, results = report["clock"], report["results"]
    case = results[0]["case"]
    rounds = [row["routing"][clock]["rounds"] for result in results for row in result["rows"][:1]]
    promises = budget.routing_promises(report)
    lines = [
        "## Routing overhead",
        "",
        describe(report["machine"], loads=report["loads"]),
        f"- T={case['tokens']}, B={case['sequences']}, K={case['top_k']}, L={case['layers']} layers, "
        f"{min(rounds)} to {max(rounds)} rounds, {CLOCK_NAMES[clock]}, float32",
        "",
        "### Budget",
        "",
        "The worst number of any loss in each column, logits as leaves, with the 95% interval of its median; "
        f'"not decided" where the limit lies inside it. Lines without a limit are information. '
        f"{budget.summary(promises)}",
        "",
        budget.table(promises),
        "",
        "### Time and memory",
        "",
        "Time of routing forward and backward divided by the same without losses: median of the paired ratios, its "
        '95% interval, and in brackets the ratio of the fastest runs. "routing again" is the routing a second '
        "time: what it differs from 1 by is noise. U = T E 4 bytes by layer, held between forward and backward. "
        "Gradient error: against float64, by the largest entry, T=256, one layer.",
    ]
    for name, group in grouped(results).items():
        lines += ["", f"#### {name[0].upper()}{name[1:]}", "", markdown_table(*table_rows(group, clock))]
        for result in group:
            for variant, reason in result["not_compiled"].items():
                lines.append(f"\nNot compiled: {variant} ({reason})")
    steps = [result["step_ms"] for result in results]
    lines += [
        "",
        f"`balancer.step()` with all losses, once per optimiser step: {min(steps):.2f} to {max(steps):.2f} ms by "
        "layer.",
        *launch_lines(report),
        "",
        "### Operators",
        "",
        "Aten operators that a CPU dispatches at T = 16 B, without views and mere allocations, of one forward and "
        "backward, less those of the routing: a line through L = 2, 4 and 8 layers, so that what is done once "
        "for all layers of a microbatch stands apart. Many tokens are taken in blocks, and their experts chosen in "
        "rounds, which are more operators.",
    ]
    for name, lines_of in report["operators"].items():
        lines += ["", f"#### Operators: {name}", "", markdown_table(*operator_rows(lines_of))]
    return "\n".join(lines)


def images(report: dict[str, Any]) -> dict[str, str]:
    """The figure of the docs: time ratios by loss, a panel for each score function and E."""
    clock = report["clock"]
    panels = []
    eager = [r for r in report["results"] if not r["compiler"] and not r["case"]["gate_dim"]]
    wanted = {min(r["case"]["num_experts"] for r in eager), max(r["case"]["num_experts"] for r in eager)}
    for result in eager:
        if result["case"]["num_experts"] not in wanted:
            continue
        panels.append(_panel(result, clock, f"{title(result)}, E={result['case']['num_experts']}"))
    figures = {
        "benchmark-routing": dot_panels(
            panels,
            title="Time of routing with losses, over the same routing alone",
            x_title="ratio (dot: median, line: 95% interval)",
            limits={"fused ≤ 1.05": budget.FUSED, "composable ≤ 1.10": budget.COMPOSABLE},
            families=FAMILIES,
        )
    }
    compiled = [r for r in report["results"] if r["compiler"]]
    if compiled:
        panels = [_panel(r, clock, f"{title(r)}, E={r['case']['num_experts']}") for r in compiled]
        figures["benchmark-routing-compiled"] = dot_panels(
            panels,
            title="Compiled: time of routing with losses, over the compiled routing alone",
            x_title="ratio (dot: median, line: 95% interval)",
            limits={"compiled ≤ 1.02": budget.COMPILED},
            families=FAMILIES,
        )
    return figures


def _panel(result: dict[str, Any], clock: str, name: str) -> Panel:
    dots = []
    for objective in FIGURE_OBJECTIVES:
        for row in result["rows"]:
            if row["family"] in FAMILIES and row["objective"] == objective:
                one = row["routing"][clock]
                dots.append(
                    Dot(
                        group=objective,
                        family=row["family"],
                        value=one["ratio"],
                        low=one["low"],
                        high=one["high"],
                    )
                )
    return Panel(title=name, dots=dots)

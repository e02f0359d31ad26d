"""Tables and figure of `routing_overhead`.

Shapes: E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import describe, markdown_table


def title(result: dict[str, Any]) -> str:
    """One line that names a group of cases."""
    case = result["case"]
    gate = f"gate D={case['gate_dim']}" if case["gate_dim"] else "logits are leaves"
    how = f", torch.compile({result['compiler']})" if result["compiler"] else ""
    return f"{case['score']}, {gate}{how}"


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
    header += [f"extra ms/layer, E={num_experts}", "held, U", "extra ops", "gradient error"]
    rows = []
    for row in largest["rows"]:
        key = (row["family"], row["objective"])
        cells = [*key]
        for result in group:
            other = next((r for r in result["rows"] if (r["family"], r["objective"]) == key), None)
            if other is None:
                cells.append("–")
            elif key == ("routing", "none"):
                cells.append(f"{other[clock]['min_ms_per_layer']:.2f} ms")
            else:
                cells.append(f"{other[clock]['paired_median']:.2f} ({other[clock]['ratio_of_minima']:.2f})")
        error = row["gradient_error"]
        cells.append(f"{row[clock]['extra_ms_per_layer']:.2f}")
        cells += [f"{row['held']:.3f}", optional(row["extra_ops"], "+.1f"), optional(error, ".0e")]
        rows.append(cells)
    return header, rows


def optional(number: float | None, form: str) -> str:
    """A number, or a dash."""
    return "–" if number is None else format(number, form)


def markdown(report: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    options, loads = report["options"], report["loads"]
    clock = options["clock"]
    clock_name = {"wall": "wall clock", "cpu": "CPU time of the process"}[clock]
    lines = [
        "## Routing overhead",
        "",
        describe(report["machine"], loads=loads),
        f"- T={options['tokens']}, B={options['sequences']}, K={options['top_k']}, L={options['layers']} layers, "
        f"{options['reps']} repetitions, {clock_name}, float32",
    ]
    if max(loads) > options["threads"] + 0.5:
        lines.append(
            f"- **The machine was loaded** ({max(loads):.1f} runnable processes for {options['threads']} "
            "thread(s) of this run): read differences below 0.1 as noise"
        )
    lines += [
        "",
        "Time of routing forward and backward divided by the same without losses: median of paired ratios, and in "
        "brackets the ratio of minima. U = T E 4 bytes per layer, held between forward and backward. Operators are "
        "per layer, views left out. Gradient error: against float64, by the largest entry, T=256, one layer.",
    ]
    for name, group in grouped(report["results"]).items():
        header, rows = table_rows(group, clock)
        lines += ["", f"### {name[0].upper()}{name[1:]}", "", markdown_table(header, rows)]
        step = statistics.median(result["step_ms"] for result in group)
        lines += ["", f"`balancer.step()` with all losses, once per optimiser step: {step:.2f} ms per layer."]
        for result in group:
            for variant, reason in result["not_compiled"].items():
                lines.append(f"\nNot compiled: {variant} ({reason})")
    return "\n".join(lines)


def figure(report: dict[str, Any], path: Path) -> None:
    """Plotly page: time ratio of every variant at the largest E, one panel per table."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    groups = grouped(report["results"])
    clock = report["options"]["clock"]
    titles = [f"{name}, E={group[-1]['case']['num_experts']}" for name, group in groups.items()]
    fig = make_subplots(rows=len(groups), cols=1, subplot_titles=titles, vertical_spacing=0.25 / len(groups))
    colors = {"trimtab": "#1f6f8b", "formula": "#c8963e", "transformers": "#8b5a83", "Megatron": "#7a8b52"}
    for place, group in enumerate(groups.values(), start=1):
        rows = [row for row in group[-1]["rows"] if row["family"] != "routing"]
        fig.add_trace(
            go.Bar(
                y=[f"{row['family']}: {row['objective']}" for row in rows],
                x=[row[clock]["paired_median"] for row in rows],
                orientation="h",
                marker_color=[
                    next(c for prefix, c in colors.items() if row["family"].startswith(prefix))
                    for row in rows
                ],
                customdata=[
                    [row[clock]["ratio_of_minima"], row["held"], optional(row["extra_ops"], "+.0f")]
                    for row in rows
                ],
                hovertemplate="%{y}: %{x:.2f} (minima %{customdata[0]:.2f})<br>held %{customdata[1]:.2f} U, "
                "%{customdata[2]} operators<extra></extra>",
                showlegend=False,
            ),
            row=place,
            col=1,
        )
        fig.update_yaxes(autorange="reversed", row=place, col=1)
        fig.add_vline(x=1, line_dash="dot", row=place, col=1)
        fig.update_xaxes(title_text="time / routing alone", row=place, col=1)
    heights = sum(26 * len(group[-1]["rows"]) + 110 for group in groups.values())
    fig.update_layout(template="plotly_white", height=heights, margin={"l": 230, "r": 30})
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.write_html(path, include_plotlyjs=True)

"""Tables and figure of `parallel_plans`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import describe, markdown_table
from benchmarks.parallel_worker import MEASURED, OFF, OFF_AGAIN
from benchmarks.timing import interval

TARGET_PLAN = "dp_shard 2, ep 2"
TARGET = 0.03
HEADER = [
    "balancing",
    "wall ratio",
    "quartiles",
    "CPU ratio",
    "extra ms",
    "sums of counts",
    "extra collectives",
    "extra bytes",
    "extra held",
]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired(result: dict[str, Any], arm: str, clock: str = "wall") -> list[float]:
    """An arm's time in each round by the mean of the two arms without balancing in that round.

    Of the second of those, by the first: what the method cannot tell from 1.
    """
    arms = result["arms"]
    first, second, own = (arms[name][clock] for name in (OFF, OFF_AGAIN, arm))
    if arm == OFF_AGAIN:
        return [b / a for a, b in zip(first, second, strict=True)]
    return [2 * x / (a + b) for a, b, x in zip(first, second, own, strict=True)]


def mean(values: Sequence[float]) -> float:
    """Over ranks."""
    return statistics.fmean(values)


def summary(result: dict[str, Any], arm: str) -> dict[str, Any]:
    """What one row of a table says."""
    arms = result["arms"]
    own, off = arms[arm], arms[OFF]
    low, median, high = quartiles(paired(result, arm))
    off_ms = 1e3 * statistics.median([*arms[OFF]["wall"], *arms[OFF_AGAIN]["wall"]])
    return {
        "ratio": median,
        "quartiles": (low, high),
        "cpu": quartiles(paired(result, arm, "cpu"))[1],
        "extra_ms": (median - 1) * off_ms,
        "sums": statistics.median(a / b for a, b in zip(own["sums"], own["wall"], strict=True)),
        "collectives": mean(own["collectives"]) - mean(off["collectives"]),
        "bytes": mean(own["bytes"]) - mean(off["bytes"]),
        "held": mean(own["held"]) - mean(off["held"]),
        "step_ms": off_ms,
    }


def table_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one plan."""
    rows = []
    for arm in result["arms"]:
        if arm == OFF:
            continue
        one = summary(result, arm)
        cells = [
            "off against off" if arm == OFF_AGAIN else arm,
            f"{one['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*one["quartiles"]),
            f"{one['cpu']:.3f}",
        ]
        if arm == OFF_AGAIN:
            rows.append([*cells, *"–" * 5])
            continue
        cells += [f"{one['extra_ms']:.1f}", f"{one['sums']:.2%}", f"+{one['collectives']:g}"]
        cells += [f"+{size(one['bytes'])}", f"{'+' if one['held'] >= 0 else ''}{size(one['held'])}"]
        rows.append(cells)
    return HEADER, rows


def size(num_bytes: float) -> str:
    """Bytes to read."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def verdict(report: dict[str, Any]) -> str:
    """Whether balancing costs at most 3% where that was promised, and whether this run can tell."""
    result = next((r for r in report["results"] if r["plan"] == TARGET_PLAN), None)
    if result is None:
        return f"{TARGET_PLAN} was not run, so nothing is said of the target of {TARGET:.0%}."
    words = []
    for arm in result["arms"]:
        if arm in (OFF, OFF_AGAIN):
            continue
        ratios = paired(result, arm)
        low, high = interval(ratios)
        outcome = "met" if high <= 1 + TARGET else "missed" if low > 1 + TARGET else "not decided"
        words.append(
            f"{arm} {_signed(statistics.median(ratios))}, 95% interval {_signed(low)} to {_signed(high)}: "
            f"**{outcome}**"
        )
    low, high = interval(paired(result, OFF_AGAIN))
    return (
        f"Target: at most {TARGET:.0%} of the step under {TARGET_PLAN} (FSDP2 x EP2), by the median of "
        f"{result['rounds']} paired rounds. {'; '.join(words)}. Off against off, which should be 0: "
        f"{_signed(low)} to {_signed(high)}."
    )


def _signed(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def _balanced(result: dict[str, Any]) -> list[str]:
    return [arm for arm in result["arms"] if arm not in (OFF, OFF_AGAIN)]


def time_rows(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Ratios of all plans."""
    arms = [*_balanced(results[0]), OFF_AGAIN]
    header = ["plan", "ranks", "step, off", *arms[:-1], "off against off", "others"]
    rows = []
    for result in results:
        sums = [summary(result, arm) for arm in arms]
        cells = [result["plan"], str(result["ranks"]), f"{sums[-1]['step_ms']:.0f} ms"]
        rows.append(
            [*cells, *(f"{s['ratio']:.3f} ({s['cpu']:.3f})" for s in sums), f"{result['others']:.2f}"]
        )
    return header, rows


def traffic_rows(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Collectives, bytes and memory of all plans."""
    arms = _balanced(results[0])
    header = ["plan", "off", *arms, "held, all"]
    rows = []
    for result in results:
        off = result["arms"][OFF]
        cells = [result["plan"], f"{mean(off['collectives']):g}, {size(mean(off['bytes']))}"]
        sums = [summary(result, arm) for arm in arms]
        cells += [f"+{s['collectives']:g}, +{size(s['bytes'])}" for s in sums]
        rows.append([*cells, f"{sums[-2]['held'] / 1024:+.1f} KiB"])
    return header, rows


def markdown(report: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    sizes, options, results = report["sizes"], report["options"], report["results"]
    crowded = [result["plan"] for result in results if result["ranks"] > report["machine"]["cores"]]
    lines = [
        "## Parallel plans",
        "",
        describe(report["machine"]),
        f"- No GPU: gloo on one machine, one thread per rank; {report['seconds']} s in all",
        f"- Load average (1 min): {report['load']:.2f} at the start; "
        'cores that processes of others used while steps were timed are in the column "others"',
        f"- Model: DeepSeek-V3, D={sizes['dim']}, L={sizes['layers']} MoE layers, E={sizes['experts']}, "
        f"K={sizes['top_k']}, F={sizes['expert_dim']}, vocabulary {sizes['vocab']}, float32, eager; a step is "
        f"{sizes['rows']} rows of {sizes['seq_len']} tokens over all ranks in one forward, "
        "in pipelines one row per microbatch",
        f"- {options['rounds']} rounds, {options['target_rounds']} of {TARGET_PLAN}",
    ]
    if crowded:
        lines.append(
            f"- **More ranks than cores** in {len(crowded)} plans: ranks wait for their turn on a core, and "
            "times say little. Collectives, bytes and memory are exact everywhere"
        )
    lines += ["", verdict(report), ""]
    lines += [
        "### Time",
        "",
        "Step with balancing / step without any, wall clock of the slowest rank, and in brackets CPU time of all "
        f'ranks: medians of paired ratios. "{MEASURED}" also measures losses for the log, which is done in one '
        "step of ten by default.",
        "",
        markdown_table(*time_rows(results)),
        "",
        "### Collectives and memory",
        "",
        "Of one step by rank: collectives, and bytes of their messages; what balancing adds to them, as counted "
        "and as `trimtab plan` says; what all balancing adds to the most bytes that autograd holds.",
        "",
        markdown_table(*traffic_rows(results)),
    ]
    for result in results:
        if result["plan"] != TARGET_PLAN:
            continue
        lines += [
            "",
            f"### {TARGET_PLAN[0].upper()}{TARGET_PLAN[1:]}",
            "",
            "Quartiles are of the paired ratios. Sums of counts: share of the step that a rank spends in starting "
            "and awaiting them; waiting for a slower rank, which would happen at the next collective anyway, is "
            "included.",
            "",
            markdown_table(*table_rows(result)),
        ]
    return "\n".join(lines)


def figure(report: dict[str, Any], path: Path) -> None:
    """Plotly page: time ratio with quartiles, and bytes beside those of the step, by plan and balancing."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    results = report["results"]
    arms = [arm for arm in results[0]["arms"] if arm != OFF]
    colors = ["#a9b4bd", "#1f6f8b", "#c8963e", "#8b5a83", "#7a8b52"]
    titles = ("step time / step time without balancing", "bytes that balancing adds to a step, by rank")
    fig = make_subplots(rows=1, cols=2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    names = [f"{result['plan']} ({result['ranks']})" for result in results]
    for arm, color in zip(arms, colors, strict=True):
        rows = [summary(result, arm) for result in results]
        common = {"y": names, "name": "off against off" if arm == OFF_AGAIN else arm, "legendgroup": arm}
        fig.add_trace(
            go.Scatter(
                x=[row["ratio"] for row in rows],
                mode="markers",
                orientation="h",
                marker={"color": color, "size": 9},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [row["quartiles"][1] - row["ratio"] for row in rows],
                    "arrayminus": [row["ratio"] - row["quartiles"][0] for row in rows],
                    "thickness": 1,
                },
                hovertemplate="%{y}: %{x:.3f}<extra>" + arm + "</extra>",
                **common,
            ),
            row=1,
            col=1,
        )
        if arm != OFF_AGAIN:
            fig.add_trace(
                go.Bar(
                    x=[row["bytes"] for row in rows],
                    orientation="h",
                    marker_color=color,
                    showlegend=False,
                    customdata=[[row["collectives"], row["sums"]] for row in rows],
                    hovertemplate="%{y}: %{x} bytes, %{customdata[0]} collectives, %{customdata[1]:.2%} of the step"
                    f"<extra>{arm}</extra>",
                    **common,
                ),
                row=1,
                col=2,
            )
    fig.add_vline(x=1, line_dash="dot", row=1, col=1)
    fig.add_vline(x=1 + TARGET, line_dash="dash", line_color="#b03a2e", row=1, col=1)
    ends = [end for result in results for arm in arms for end in summary(result, arm)["quartiles"]]
    pad = 0.05 * (max(ends) - min(ends)) + 0.01
    # Grouped points would otherwise have an axis that starts at 0.
    fig.update_xaxes(range=[min(ends) - pad, max(ends) + pad], row=1, col=1)
    fig.update_yaxes(autorange="reversed")
    fig.update_layout(
        template="plotly_white",
        height=58 * len(results) + 200,
        scattermode="group",
        margin={"l": 220, "r": 30, "b": 100},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.write_html(path, include_plotlyjs=True)

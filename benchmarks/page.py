"""The generated part of the docs' page on benchmarks: the budget and what was measured, from the result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import budget, gpu
from benchmarks.common import read_json

BEGIN, END = "<!-- budget: begin -->", "<!-- budget: end -->"
_SIZES = {"T": "tokens", "B": "sequences", "K": "top_k", "L": "layers"}
FILES = ("routing_overhead", "growth", "layer_and_model", "memory", "gpu")


def update(root: Path) -> None:
    """Replace the generated part of the page, if there is a page."""
    path = root / "docs" / "benchmarks.md"
    if path.is_file():
        path.write_text(with_block(path.read_text(encoding="utf-8"), block(root)), encoding="utf-8")


def with_block(text: str, generated: str) -> str:
    """The page with that part."""
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{generated}\n{END}{rest.split(END, 1)[1]}"


def block(root: Path) -> str:
    """The budget as the result files have it."""
    reports: dict[str, Any] = {
        name: read_json(root / "benchmarks" / "results" / f"{name}.json") for name in FILES
    }
    lines = []
    routing = reports["routing_overhead"]
    if routing is not None:
        promises = budget.routing_promises(routing)
        case = routing["results"][0]["case"]
        size = ", ".join(f"{name}={case[key]}" for name, key in _SIZES.items())
        lines += [f"{size}. {_when(routing)}", "", budget.summary(promises), "", budget.table(promises)]
        reasons = {k: v for result in routing["results"] for k, v in result["not_compiled"].items()}
        if reasons:
            words = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
            lines += ["", f"Not compiled, so not timed: {words}."]
    lines.append("")
    if reports["layer_and_model"] is not None:
        lines += _whole(reports["layer_and_model"])
    if reports["memory"] is not None:
        lines += _memory(reports["memory"])
    if reports["gpu"] is None or reports["gpu"]["gpu"] is None:
        lines += ["", gpu.NO_GPU]
    else:
        lines += ["", f"Measured on {reports['gpu']['gpu']} too: see the results file."]
    return "\n".join(lines)


def _when(report: dict[str, Any]) -> str:
    machine = report["machine"]
    loaded = max(report["loads"]) > machine["threads"] + 0.5
    versions = machine["versions"]
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['threads']} thread(s) of {machine['cores']} cores, torch "
        f"{versions['torch']}, load {max(report['loads']):.1f} at most"
        + (", **so others used the machine as well and times are noisy**." if loaded else ".")
    )


def _whole(report: dict[str, Any]) -> list[str]:
    lines = []
    for result in report["results"]:
        words = []
        for name, row in result["rows"].items():
            one = row[report["clock"]]
            if name != "off":
                words.append(f"{name} {one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}]")
        lines.append(
            f"- {result['kind'][0].upper()}{result['kind'][1:]}, over the same without losses: {'; '.join(words)}."
        )
    return lines


def _memory(report: dict[str, Any]) -> list[str]:
    lines = []
    for result in report["results"]:
        words = [
            f"{name} {row['held']:.3f}"
            for name, row in result["rows"].items()
            if name.startswith(("router alone", "fused")) and not name.endswith("again")
        ]
        lines.append(f"- Held by a router ({result['name']}), in T E 4 bytes by layer: {'; '.join(words)}.")
    return lines

"""What all benchmarks need: the machine in words, result files, and one section of RESULTS.md each."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULTS_MD = ROOT / "benchmarks" / "RESULTS.md"
_PACKAGES = ("torch", "transformers", "megatron-core", "trimtab")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a benchmark of `python -m benchmarks` runs.

    Args:
        seconds: it is bounded to about so many; fewer seconds mean fewer rounds, not smaller sizes.
        quick: tiny sizes that show that it works, and nothing else.
        threads: of torch.
        seed: of data and of the order of runs.
    """

    seconds: float
    quick: bool = False
    threads: int = 1
    seed: int = 0

    @property
    def clock(self) -> str:
        """The clock of the tables: one thread's CPU time is what the clock would say on an idle machine."""
        return "cpu" if self.threads == 1 else "wall"


CLOCK_NAMES = {"wall": "wall clock", "cpu": "CPU time of the process"}


def machine() -> dict[str, Any]:
    """Date, CPU, cores, threads, load and versions of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "command": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
    }


def describe(machine: dict[str, Any], *, loads: Sequence[float] = ()) -> str:
    """The machine as the lines that open a section of RESULTS.md.

    Args:
        machine: from `machine`.
        loads: 1-minute load averages seen during the run, first to last.

    Where others used the machine a line says so.
    """
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"- Date: {machine['date']}",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores; {machine['threads']} thread(s) used",
        f"- Versions: Python {machine['python']}, {versions}",
        f"- Command: `{machine['command']}`",
    ]
    if loads:
        lines.insert(2, f"- Load average (1 min): {loads[0]:.2f} at the start, {max(loads):.2f} at most")
        if max(loads) > machine["threads"] + 0.5:
            lines.append(
                f"- **The machine was loaded** ({max(loads):.1f} runnable processes, of which this run was "
                f"{machine['threads']}): read differences below 0.1 as noise"
            )
    return "\n".join(lines)


def read_json(path: Path) -> Any:
    """Content of a JSON file, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all, so that a stopped run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on the terminal; in a log file it is as wide as it needs to be."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(escape, header), title=escape(title))
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_section(name: str, text: str, path: Path = RESULTS_MD) -> None:
    """Replace this benchmark's section of RESULTS.md and leave the others as they are."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    old = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    if begin in old and end in old:
        before, rest = old.split(begin, 1)
        after = rest.split(end, 1)[1]
        new = before + section + after
    else:
        new = old.rstrip("\n") + "\n\n" + section + "\n"
    path.write_text(new, encoding="utf-8")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else "benchmarks"

"""All benchmarks of what balancing costs, by one command.

    python -m benchmarks --write

Each writes its own result file, its section of RESULTS.md and its figures when it has ended, so a run that is
stopped keeps what it has. The page of the docs follows.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import gpu, growth, layer_and_model, memory, page, routing_overhead, routing_report
from benchmarks.common import ROOT, Settings, machine, read_json, write_json, write_section

MINUTES = 22.0


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        file: name of its result file and of its section.
        module: has `run`.
        report: has `markdown` and `images`.
        share: of the time.
    """

    file: str
    module: ModuleType
    report: ModuleType
    share: float


BENCHMARKS = {
    "routing": Benchmark("routing_overhead", routing_overhead, routing_report, 0.54),
    "growth": Benchmark("growth", growth, growth, 0.17),
    "layer-and-model": Benchmark("layer_and_model", layer_and_model, layer_and_model, 0.18),
    "memory": Benchmark("memory", memory, memory, 0.1),
    "gpu": Benchmark("gpu", gpu, gpu, 0.01),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a benchmark failed."""
    args = parse(arguments)
    if args.render:
        render(args.out)
        return 0
    torch.set_num_threads(args.threads)
    failed = []
    for name in args.only:
        one = BENCHMARKS[name]
        settings = Settings(
            seconds=60 * args.minutes * one.share, quick=args.quick, threads=args.threads, seed=args.seed
        )
        print(f"{name}: about {settings.seconds / 60:.1f} min" if not args.quick else name, flush=True)
        try:
            report = measured(one, settings)
            if args.write:
                write(one, report, args.out)
                page.update(args.out)
            else:
                print(one.report.markdown(report), flush=True)
        except Exception:  # the others are worth having all the same
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def measured(one: Benchmark, settings: Settings) -> dict[str, Any]:
    """Run a benchmark; its report with the machine."""
    began = machine()
    start = time.perf_counter()
    report: dict[str, Any] = one.module.run(settings)
    took = {"machine": began, "clock": settings.clock, "quick": settings.quick}
    return took | {"seconds": round(time.perf_counter() - start)} | report


def write(one: Benchmark, report: dict[str, Any], root: Path) -> None:
    """The result file, and what follows from it."""
    write_json(root / "benchmarks" / "results" / f"{one.file}.json", report)
    _show(one, report, root)


def render(root: Path) -> None:
    """Write all sections, figures and the page again from the result files there are; nothing is measured."""
    for one in BENCHMARKS.values():
        report = read_json(root / "benchmarks" / "results" / f"{one.file}.json")
        if report is not None:
            _show(one, report, root)
    page.update(root)


def _show(one: Benchmark, report: dict[str, Any], root: Path) -> None:
    write_section(one.file, one.report.markdown(report), root / "benchmarks" / "RESULTS.md")
    folder = root / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in one.report.images(report).items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="result files, RESULTS.md, figures, docs page")
    parser.add_argument("--render", action="store_true", help="write all of that again from the result files")
    parser.add_argument("--quick", action="store_true", help="tiny sizes that show that all of it runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all benchmarks together, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of data and of the order of runs")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write to instead of the repository")
    args = parser.parse_args(arguments)
    if args.quick and args.write and args.out == ROOT:
        parser.error(
            "--quick --write would put numbers that mean nothing into the repository; give --out FOLDER"
        )
    return args


if __name__ == "__main__":
    raise SystemExit(main())

"""What does balancing cost a training step under each parallel plan? Time, collectives with their bytes, memory.

    python -m benchmarks.parallel_plans --write
    python benchmarks/parallel_plans.py --quick

Every rank has an engine for each balancing and for none at all. In every round each of them takes one optimiser
step, in a random order, and is compared with the steps without balancing of the same round. See README.md for what
is and is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.common import RESULTS, machine, print_table, write_json, write_section
from benchmarks.parallel_report import TARGET_PLAN, figure, markdown, table_rows, verdict
from benchmarks.parallel_worker import QUICK, Plan, Sizes, measure
from trimtab.parallel.mesh import Groups

_TP2 = {"tensor_parallel_degree": 2}
_EP2 = {"expert_parallel_degree": 2}
_PP2 = {"pipeline_parallel_degree": 2}
# Name: processes, and options that differ from one process; dp_shard takes the processes that are left.
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp_shard 2": (2, {}),
    TARGET_PLAN: (2, _EP2),
    "tp 2": (2, _TP2),
    "tp 2, ep 2": (2, _TP2 | _EP2),
    "cp 2, ep 2": (2, {"context_parallel_degree": 2} | _EP2),
    "pp 2, 1F1B": (2, _PP2),
    "dp_shard 4": (4, {}),
    "dp_replicate 2, dp_shard 2": (4, {"data_parallel_replicate_degree": 2}),
    "dp_shard 4, ep 2": (4, _EP2),
    "dp_shard 2, tp 2, ep 2, etp 2": (4, _TP2 | _EP2 | {"expert_tensor_parallel_degree": 2}),
    "pp 2, dp_shard 2, GPipe": (4, _PP2 | {"pipeline_parallel_schedule": "GPipe"}),
}
QUICK_PLANS = ["one process", TARGET_PLAN, "pp 2, 1F1B"]


def plans(names: Sequence[str], *, rounds: int, target_rounds: int) -> list[Plan]:
    """The plans of these names, by number of processes."""
    found = []
    for name in names:
        ranks, degrees = PLANS[name]
        number = target_rounds if name == TARGET_PLAN else rounds
        found.append(Plan(name=name, ranks=ranks, degrees=degrees, rounds=number))
    return sorted(found, key=lambda plan: plan.ranks)


def run_plans(chosen: Sequence[Plan], sizes: Sizes, seed: int) -> list[dict[str, Any]]:
    """Measure plans of one number of processes, which are started once and end together."""
    num_ranks = chosen[0].ranks
    if num_ranks == 1:
        return [_measure(plan, sizes, Groups(), seed) for plan in chosen]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "results.json"
        torch.multiprocessing.spawn(
            _work, (num_ranks, store.port, list(chosen), sizes, seed, str(answer)), nprocs=num_ranks
        )
        results: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
    return results


def _work(
    rank: int, num_ranks: int, port: int, chosen: Sequence[Plan], sizes: Sizes, seed: int, answer: str
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(minutes=10)
    )
    groups = Groups()
    results = [_measure(plan, sizes, groups, seed) for plan in chosen]
    if rank == 0:
        Path(answer).write_text(json.dumps(results), encoding="utf-8")
    # Groups end with their process, once no rank talks to another: gloo's threads may abort a process that destroys
    # its groups.
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(num_ranks)])
    sys.stdout.flush()
    os._exit(0)


def _measure(plan: Plan, sizes: Sizes, groups: Groups, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    result = measure(plan, sizes, groups, seed)
    if not dist.is_initialized() or dist.get_rank() == 0:
        seconds = time.perf_counter() - began
        print(f"{plan.name}: {seconds:.0f} s, {result['others']:.2f} cores used by others", flush=True)
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--plans", nargs="+", choices=tuple(PLANS), metavar="NAME", help=f"of: {'; '.join(PLANS)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of a plan")
    parser.add_argument("--target-rounds", type=int, default=24, help=f"timed rounds of {TARGET_PLAN}")
    parser.add_argument("--seed", type=int, default=0, help="of the arms' order")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 rounds: does it run?")
    parser.add_argument("--write", action="store_true", help="write results/ and the section of RESULTS.md")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds = args.target_rounds = 2
    args.plans = args.plans or (QUICK_PLANS if args.quick else list(PLANS))
    return args


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    args = parse(arguments)
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else Sizes()
    load, started, began = os.getloadavg()[0], machine(), time.perf_counter()
    results: list[dict[str, Any]] = []
    chosen = plans(args.plans, rounds=args.rounds, target_rounds=args.target_rounds)
    for num_ranks in sorted({plan.ranks for plan in chosen}):
        results += run_plans([plan for plan in chosen if plan.ranks == num_ranks], sizes, args.seed)
    report = {
        "machine": started,
        "options": vars(args),
        "sizes": asdict(sizes),
        "load": round(load, 2),
        "seconds": round(time.perf_counter() - began),
        "results": results,
    }
    for result in results:
        print_table(result["plan"], *table_rows(result))
    print(verdict(report))
    if args.write:
        write_json(RESULTS / "parallel_plans.json", report)
        figure(report, RESULTS / "parallel_plans.html")
        write_section("parallel_plans", markdown(report))
    return report


if __name__ == "__main__":
    main()

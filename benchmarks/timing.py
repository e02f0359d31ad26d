"""Times of several ways to do one thing, compared in pairs.

In every round each arm runs once, in a random order, and baselines several times among them. An arm's ratio is its
time by the median of the baseline's times in the same round, so that a machine that slows down for a while slows
both. An arm that is equal to the baseline says what the method cannot tell from 1.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
WARMUP = 2
FEWEST_ROUNDS = 5
BASE_RUNS = 3


@dataclass(kw_only=True)
class Arm:
    """One way to do it.

    Args:
        name: key of its times.
        run: what is timed.
        clean: what follows each run and is not timed.
        baseline: others are compared with it.
    """

    name: str
    run: Callable[[], Any]
    clean: Callable[[], None] = lambda: None
    baseline: bool = False


@dataclass
class Times:
    """Seconds of one arm by clock: every run, and the median of each round's runs."""

    runs: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})
    rounds: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})


def measure(
    arms: Sequence[Arm], *, rounds: int, seconds: float, rng: random.Random, base_runs: int = BASE_RUNS
) -> dict[str, Times]:
    """Run all arms in interleaved rounds.

    Args:
        arms: what is compared.
        rounds: most rounds.
        seconds: no round begins later than this, beyond the first few.
        rng: draws the orders.
        base_runs: runs of each baseline in a round.
    """
    turns = [arm for arm in arms for _ in range(base_runs if arm.baseline else 1)]
    times = {arm.name: Times() for arm in arms}
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for number in range(-WARMUP, rounds):
            if number >= min(FEWEST_ROUNDS, rounds) and time.perf_counter() - started > seconds:
                break
            seen: dict[str, Times] = {arm.name: Times() for arm in arms}
            for arm in rng.sample(turns, len(turns)):
                _run(arm, seen[arm.name])
            for name, one in seen.items() if number >= 0 else ():
                for clock in CLOCKS:
                    times[name].runs[clock] += one.runs[clock]
                    times[name].rounds[clock].append(statistics.median(one.runs[clock]))
    finally:
        gc.enable()
    return times


def _run(arm: Arm, times: Times) -> None:
    before = {clock: read() for clock, read in CLOCKS.items()}
    arm.run()
    for clock, read in CLOCKS.items():
        times.runs[clock].append(read() - before[clock])
    arm.clean()


def compare(own: Times, base: Times, clock: str, *, layers: int = 1) -> dict[str, Any]:
    """An arm beside its baseline.

    Returns:
        Median of the paired ratios with its 95% interval, ratio of the fastest runs, the median of its time and
        what it takes more than the baseline, in milliseconds by layer.
    """
    ratios = [a / b for a, b in zip(own.rounds[clock], base.rounds[clock], strict=True)]
    low, high = interval(ratios)
    base_ms = statistics.median(base.rounds[clock]) * 1e3 / layers
    median = statistics.median(ratios)
    return {
        "ratio": round(median, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "minima": round(min(own.runs[clock]) / min(base.runs[clock]), 5),
        "ms": round(statistics.median(own.rounds[clock]) * 1e3 / layers, 5),
        "extra_ms": round((median - 1) * base_ms, 5),
        "rounds": len(ratios),
    }


def compare_clocks(times: dict[str, Times], name: str, base: str, *, layers: int = 1) -> dict[str, Any]:
    """`compare` by both clocks."""
    return {clock: compare(times[name], times[base], clock, layers=layers) for clock in CLOCKS}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics that hold the median with a probability of 0.95, or all there are."""
    ordered, n = sorted(values), len(values)
    k = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    return ordered[k], ordered[n - 1 - k]

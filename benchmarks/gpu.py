"""On a GPU: kernels against the memory bandwidth, offload beside compute, peak memory.

    python -m benchmarks --only gpu --write

Without CUDA it says so and measures nothing.

Shapes: T tokens, E experts, K top-k, G groups.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.common import Settings, describe, markdown_table, read_json
from trimtab import kernels
from trimtab.fused import route
from trimtab.integrations.attach import Keep
from trimtab.routing import Routing
from trimtab.scores import ScoreName

NO_GPU = "No GPU was available: there is no figure of a GPU here, and nothing is said of a kernel's speed."
TOKENS, EXPERTS, TOP_K, SEQUENCES = 65_536, 256, 8, 16
# Logits are read in forward and backward, their gradient is written; the rest is weights, ids and their gradient.
TRAFFIC = 3.2
TARGET = 1.3
COPY_BYTES = 2**30
DEVICE = "cuda"
REPEATS = 50


def run(settings: Settings) -> dict[str, Any]:
    """Everything, or that there is no GPU."""
    loads = [os.getloadavg()[0]]
    if not torch.cuda.is_available():
        print(f"  {NO_GPU}", flush=True)
        return {"loads": loads, "gpu": None}
    bandwidth = copy_bandwidth()
    report = {
        "loads": loads,
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "bandwidth": bandwidth,
        "bound_ms": 1e3 * TRAFFIC * TOKENS * EXPERTS * 4 / bandwidth,
        "kernels": time_kernels(),
        "peak": peak_memory(),
        "overlap": offload_overlap(),
    }
    return report


def wall_ms(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median milliseconds from start to end on the device, with what the device waits for."""
    run()
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def device_ms(run: Callable[[int], Any]) -> float:
    """Milliseconds of kernels and copies of one ``run(i)``, by the profiler: without waiting for Python."""
    for i in range(5):
        run(i)
    events = trace(lambda: [run(i) for i in range(REPEATS)])
    work = [e for kind in ("kernel", "gpu_memcpy", "gpu_memset") for e in intervals(events, kind)]
    return sum(end - start for start, end in work) / 1e3 / REPEATS


def trace(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Events of a run, as the profiler exports them; times in microseconds."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = read_json(path)["traceEvents"]
    return events


def intervals(events: Sequence[dict[str, Any]], category: str) -> list[tuple[float, float]]:
    """(start, end) of the events of a category, in order."""
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == category and "dur" in e)


def copy_bandwidth() -> float:
    """Bytes by second that a copy reads and writes on this card."""
    source = torch.zeros(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e-3 * device_ms(lambda i: target.copy_(source)))


# -------------------------------------------------------------------------------- kernels


def time_kernels() -> list[dict[str, Any]]:
    """Routing forward and backward: trimtab's with every objective, routing alone, a peer's."""
    # Inputs in turn, so that none is still in the cache.
    leaves = [torch.randn(TOKENS, EXPERTS, device=DEVICE, requires_grad=True) for _ in range(4)]
    grad_TK = torch.randn(TOKENS, TOP_K, device=DEVICE)
    rows = []
    for score in ("softmax", "sigmoid"):
        bias_E = None if score == "softmax" else 0.05 * torch.randn(EXPERTS, device=DEVICE)
        who = "kernels" if kernels.kernels_for(leaves[0].detach(), TOP_K) is not None else "torch operators"
        ms = _fused(leaves, grad_TK, score, bias_E)
        rows.append({"who": f"trimtab's {who}, every objective", "score": score, "ms": ms})
        rows.append({"who": "routing alone, autograd", "score": score, "ms": _plain(leaves, grad_TK, bias_E)})
        rows.append(_transformer_engine(leaves, score, bias_E))
    return rows


def _fused(leaves: Sequence[Tensor], grad_TK: Tensor, score: ScoreName, bias_E: Tensor | None) -> float:
    routing = Routing(top_k=TOP_K, score=score, normalize_top_k=True)
    # Every balance objective ends in one target by group and expert.
    target_GE = torch.randn(SEQUENCES, EXPERTS, device=DEVICE)
    z_weight = torch.tensor(1e-3 / TOKENS, device=DEVICE)

    def run(i: int) -> None:
        leaf = leaves[i % len(leaves)]
        routed = route(
            leaf,
            routing,
            expert_bias_E=bias_E,
            num_groups=SEQUENCES,
            target_GE=target_GE,
            z_weight=z_weight,
        )
        torch.autograd.grad(routed.weights_TK, leaf, grad_TK)

    return device_ms(run)


def _plain(leaves: Sequence[Tensor], grad_TK: Tensor, bias_E: Tensor | None) -> float:
    def run(i: int) -> None:
        leaf = leaves[i % len(leaves)]
        if bias_E is None:
            weights_TK = leaf.softmax(dim=-1).topk(TOP_K, dim=-1).values
        else:
            scores_TE = leaf.sigmoid()
            weights_TK = scores_TE.gather(1, (scores_TE + bias_E).topk(TOP_K, dim=-1).indices)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        torch.autograd.grad(weights_TK, leaf, grad_TK)

    return device_ms(run)


def _transformer_engine(leaves: Sequence[Tensor], score: str, bias_E: Tensor | None) -> dict[str, Any]:
    row = {"who": "Transformer Engine's fused router, no loss", "score": score, "ms": None}
    try:
        from transformer_engine.pytorch.router import fused_topk_with_score_function
    except (ImportError, OSError) as error:
        return row | {"why": f"{type(error).__name__}: {error}".splitlines()[0]}
    grad_TE = torch.randn_like(leaves[0])

    def run(i: int) -> None:
        leaf = leaves[i % len(leaves)]
        probs_TE, _ = fused_topk_with_score_function(
            logits=leaf,
            topk=TOP_K,
            use_pre_softmax=False,
            num_groups=None,
            group_topk=None,
            scaling_factor=None,
            score_function=score,
            expert_bias=bias_E,
        )
        torch.autograd.grad(probs_TE, leaf, grad_TE)

    try:
        return row | {"ms": device_ms(run)}
    except Exception as error:  # whatever another version expects
        return row | {"why": f"{type(error).__name__}: {error}".splitlines()[0]}


# -------------------------------------------------------------------------------- memory and offload


def _v3_size() -> memory.Size:
    return replace(memory.sizes(quick=False)[-1], tokens=16_384, layers=8)


def peak_memory() -> list[dict[str, Any]]:
    """Most bytes allocated in forward and backward beyond inputs and weights, at DeepSeek-V3's router size."""
    size, rows = _v3_size(), []
    for name, run in memory.runs(size, DEVICE).items():
        run()
        run.clean()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weights = run.forward()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        run.backward(weights)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        run.clean()

        def step(run: memory.Run = run) -> None:
            run()
            run.clean()

        rows.append({"name": name, "held": held, "peak": peak, "ms": wall_ms(step)})
    return rows


def offload_overlap() -> dict[str, float] | None:
    """Milliseconds of copies to and from the host, and of those beside kernels; None where nothing is copied."""
    if "host" not in get_args(Keep):
        return None
    run = memory.runs(_v3_size(), DEVICE)["fused, keep=host"]
    run()
    run.clean()
    events = trace(run)
    run.clean()
    copies, work = intervals(events, "gpu_memcpy"), intervals(events, "kernel")
    return {
        "copies_ms": sum(end - start for start, end in copies) / 1e3,
        "beside_ms": common_length(copies, work) / 1e3,
    }


def common_length(some: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """Length of ``some`` that is covered by ``others``; intervals as (start, end), each list in order."""
    merged: list[list[float]] = []
    for start, end in others:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return sum(max(0.0, min(end, high) - max(start, low)) for start, end in some for low, high in merged)


# -------------------------------------------------------------------------------- report


def markdown(report: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    if report["gpu"] is None:
        return "\n".join(["## GPU", "", f"- Date: {report['machine']['date']}", "", NO_GPU])
    bound = report["bound_ms"]
    rows = []
    for row in report["kernels"]:
        if row["ms"] is None:
            rows.append([row["who"], row["score"], "–", row["why"], "–"])
            continue
        ratio = row["ms"] / bound
        outcome = ("met" if ratio <= TARGET else "**missed**") if row["who"].startswith("trimtab") else "–"
        rows.append([row["who"], row["score"], f"{row['ms']:.3f}", f"{ratio:.2f}", outcome])
    peaks = [
        [row["name"], f"{row['held'] / 2**20:.1f}", f"{row['peak'] / 2**20:.1f}", f"{row['ms']:.2f}"]
        for row in report["peak"]
    ]
    lines = [
        "## GPU",
        "",
        describe(report["machine"], loads=report["loads"]),
        f"- {report['gpu']}, CUDA {report['cuda']}; a copy moves {report['bandwidth'] / 1e9:.0f} GB/s",
        "",
        "### Kernels",
        "",
        f"T={TOKENS}, E={EXPERTS}, K={TOP_K}, float32, forward and backward. The bound is {TRAFFIC} x T x E x 4 "
        f"bytes at the copy's bandwidth: {bound:.3f} ms. Target: {TARGET} times that.",
        "",
        markdown_table(["who", "score", "ms", "times the bound", f"at most {TARGET}"], rows),
        "",
        "### Memory at DeepSeek-V3's router size",
        "",
        markdown_table(["kept", "held, MiB", "peak, MiB", "ms"], peaks),
    ]
    if report["overlap"] is not None:
        one = report["overlap"]
        lines += [
            "",
            f"Offload: {one['copies_ms']:.2f} ms of copies, {one['beside_ms']:.2f} ms of them beside kernels.",
        ]
    return "\n".join(lines)


def images(report: dict[str, Any]) -> dict[str, str]:
    """None."""
    return {}

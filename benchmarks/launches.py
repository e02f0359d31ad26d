"""How many kernels of a GPU routing launches, plain and fused, counted without a GPU.

    python -m benchmarks.launches

On CUDA `trimtab.Router` with a balancer runs two Triton kernels and a few torch operators, which is not what it
runs on a CPU. Triton's interpreter executes these kernels on the CPU: with routing sent there, `launches` counts
what CUDA's path dispatches, aten operators as `OpCounter` does and each launch of a Triton kernel as one. The
interpreter must be chosen before Triton is imported, so `measure` counts in a process of its own. What is copied to
a card, once for a microbatch, is not among it.

Shapes: T tokens, B sequences, E experts, K top-k, L layers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import trimtab
from benchmarks.common import ROOT
from benchmarks.instruments import Line, OpCounter, unwatched
from benchmarks.routing_nets import Case, Net, Routing, Variant, backward, clear, forward, make_data
from benchmarks.routing_variants import MORE_IN_ALL, OBJECTIVES, own_router, remove_gates
from trimtab import route_ops
from trimtab.losses import Objective
from trimtab.scores import ScoreName

ALONE, ROUTER_ALONE = "routing alone", "trimtab.Router alone"
SCORES: tuple[ScoreName, ...] = ("softmax", "sigmoid")
FIRST = ("sequence", "batch", "global", "device")
TWO = "sequence + batch"
LOSSES: dict[str, tuple[Objective.Config, ...]] = {
    **{name: OBJECTIVES[name] for name in ("count only", *FIRST, "z", "sequence + z")},
    TWO: OBJECTIVES["sequence"] + OBJECTIVES["batch"],
    "all": OBJECTIVES["all"],
}
KERNELS = ("_forward_kernel", "_backward_kernel")
NO_TRITON = "Triton is not installed"
# What is launched depends on neither; the interpreter takes milliseconds for a tile.
_SIZES: dict[str, Any] = {"tokens": 32, "sequences": 2, "num_experts": 16, "top_k": 2}


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Launches by layer, counted in a process where Triton interprets; or ``{"why": ...}`` without Triton.

    Args:
        quick: fewer layers, to show that it works.

    Raises:
        RuntimeError: the process failed.
    """
    if importlib.util.find_spec("triton") is None:
        return {"why": NO_TRITON}
    command = [sys.executable, "-m", "benchmarks.launches", *(["--quick"] if quick else [])]
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"counting launches in Triton's interpreter failed:\n{done.stderr[-4000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


# -------------------------------------------------------------------------------- in the interpreter


class _Counted:
    """A Triton kernel whose launches are counted."""

    def __init__(self, kernel: Any, name: str, names: Counter[str]) -> None:
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.names[self.name] += 1
            with _disable_current_modes():  # the interpreter copies tensors, which a GPU does not
                self.kernel[grid](*args, **kwargs)

        return launch


@contextmanager
def on_kernels(names: Counter[str]) -> Iterator[None]:
    """Let tensors of the CPU be routed as those of CUDA are.

    Args:
        names: launches of Triton kernels are added here.
    """
    from trimtab import triton_kernels

    with ExitStack() as stack:
        for name in KERNELS:
            counted = _Counted(getattr(triton_kernels, name), name, names)
            stack.enter_context(patch.object(triton_kernels, name, counted))
        stack.enter_context(patch.object(route_ops, "forward", _forward))
        stack.enter_context(patch.object(route_ops, "backward", _backward))
        stack.enter_context(patch.object(route_ops, "kernels_for", lambda *_: triton_kernels))
        # Values of CUDA tensors are not read.
        for name, module in list(sys.modules.items()):
            if name.startswith("trimtab.") and hasattr(module, "is_readable"):
                stack.enter_context(patch.object(module, "is_readable", lambda _: False))
        yield


def _forward(*args: Any) -> Any:
    """What `route_ops.forward` does on CUDA."""
    *given, routing = args[:8]
    return torch.ops.trimtab.route_forward(*given, *route_ops._options(routing))


def _backward(*args: Any) -> Tensor:
    """What `route_ops.backward` does on CUDA."""
    *given, routing = args[:8]
    grad_TE: Tensor = torch.ops.trimtab.route_backward(*given, *route_ops._options(routing))
    return grad_TE


def launches(run: Callable[[], Any]) -> Counter[str]:
    """What one run launches, by name."""
    counter = OpCounter()
    with unwatched(), on_kernels(counter.names), counter:
        run()
    return counter.names


def fused_variant(case: Case, configs: Sequence[Objective.Config]) -> Variant:
    """`trimtab.Router` with a balancer, whose logits are leaves."""
    net = Net(case, router=own_router).train()
    balancer = trimtab.attach(net, configs, keep="logits", measure_every=0)
    remove_gates([net])
    return Variant("trimtab fused", "", net, balancer)


def _without_losses(case: Case, router: Callable[[Case], nn.Module]) -> Variant:
    net = Net(case, router=router).train()
    remove_gates([net])
    return Variant("routing", "none", net)


def _line(build: Callable[[Case], Variant], score: ScoreName, layers: Sequence[int]) -> dict[str, float]:
    """A line through the launches of one forward and backward of L layers, and how many by layer are Triton's."""
    numbers, kernels = [], []
    for num_layers in layers:
        case = Case(score=score, layers=num_layers, **_SIZES)
        data, variant = make_data(case), build(case)
        for _ in range(2):  # what is made once is made by the first
            names = launches(lambda v=variant, d=data: backward(forward(v, d)))
            clear(variant, data)
        numbers.append(names.total())
        kernels.append(sum(names[name] for name in KERNELS))
    return Line.fit(layers, numbers).json() | {"kernels": Line.fit(layers, kernels).per_layer}


def count(layers: Sequence[int]) -> dict[str, Any]:
    """Launches by score function and losses, and those that the budget is about."""
    lines: dict[str, dict[str, dict[str, float]]] = {}
    for score in SCORES:
        lines[score] = {
            name: _line(lambda case, r=router: _without_losses(case, r), score, layers)
            for name, router in ((ALONE, Routing), (ROUTER_ALONE, own_router))
        }
        for name, configs in LOSSES.items():
            lines[score][name] = _line(lambda case, c=configs: fused_variant(case, c), score, layers)
    first, further = {}, {}
    for score, line in lines.items():
        first[score], further[score] = first_and_further({n: one["per_layer"] for n, one in line.items()})
    return {"lines": lines, "first": first, "further": further}


def first_and_further(by_layer: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """What balance losses launch by layer, of one score function.

    Args:
        by_layer: launches by layer, by losses.

    Returns:
        Launches more than those of routing alone in plain torch, by which loss is the first; and launches of each
        further one.
    """
    first = {name: by_layer[name] - by_layer[ALONE] for name in FIRST}
    further = {
        "the second": by_layer[TWO] - by_layer["sequence"],
        "the others of all": (by_layer["all"] - by_layer["sequence + z"]) / MORE_IN_ALL,
    }
    return first, further


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities that floats have anyway
    torch.set_num_threads(1)
    print(json.dumps(count((2, 3) if "--quick" in sys.argv else (2, 3, 5))))

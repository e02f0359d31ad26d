"""What do balance losses cost a router? Time, memory held for backward, and operators, against peers.

    python -m benchmarks --only routing --write

One process and interleaved rounds (`benchmarks.timing`). The gradients of all variants are first compared with a
float64 reference. See README.md for what is and is not measured.

Shapes: T tokens, B sequences, D width, E experts, K top-k, L layers.
"""

from __future__ import annotations

import os
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import launches
from benchmarks.common import Settings
from benchmarks.instruments import Line, count_ops, held_bytes
from benchmarks.routing_nets import (
    ROUTING,
    Case,
    Data,
    Variant,
    backward,
    clear,
    drop_gradients,
    forward,
    make_data,
)
from benchmarks.routing_variants import MORE_IN_ALL, OBJECTIVES, build_variants
from benchmarks.timing import Arm, compare_clocks, measure
from trimtab.reference import RoutedTokens, reference_loss

NO_LOSS = ("none", "count only")
# Compiling takes longer than measuring: these stand for the others.
COMPILED = {
    "routing": ("none",),
    "routing again": ("none",),
    "trimtab.Router": ("none",),
    "trimtab hook": ("sequence", "sequence + z", "all"),
    "trimtab fused": ("sequence", "sequence + z", "all"),
    "formula + autograd": ("sequence + z",),
    "transformers": ("batch",),
    "Megatron functions": ("sequence + z",),
}
# Not 1: a single layer needs nothing that brings layers together.
FIT_LAYERS = (2, 4, 8)


# -------------------------------------------------------------------------------- correctness


def loss_gradients(variant: Variant, data: Data) -> list[Tensor]:
    """Gradients of the losses alone with respect to the inputs, one per layer."""
    tensors, grads = forward(variant, data)
    zeros = [None if grad is None else torch.zeros_like(grad) for grad in grads]
    torch.autograd.backward(tensors, zeros)
    out = [torch.zeros_like(x) if x.grad is None else x.grad for x in data.inputs]
    clear(variant, data)
    return out


def relative_error(have: Tensor, want: Tensor) -> float:
    """Largest error by the largest entry."""
    return ((have - want).abs().max() / want.abs().max()).item()


def gradient_error(variant: Variant, case: Case, data: Data) -> float | None:
    """Error of the losses' gradient, worst layer, against the float64 reference; None without losses."""
    if variant.objective in NO_LOSS:
        return None
    return max(
        relative_error(
            have.double(), variant.reference_factor * _reference_gradient(variant, case, router, x)
        )
        for router, x, have in zip(
            variant.net.routers, data.inputs, loss_gradients(variant, data), strict=True
        )
    )


def _reference_gradient(variant: Variant, case: Case, router: Any, x: Tensor) -> Tensor:
    x64 = x.detach().double().requires_grad_()
    logits_TE = x64 @ router.weight.detach().double().T if case.gate_dim else x64
    rows_T = torch.arange(case.tokens)
    sequence_T = rows_T % case.sequences if variant.interleaved else rows_T // (case.tokens // case.sequences)
    # Top-k of the float32 logits: a near tie must not be decided otherwise in float64.
    ranks_TE = x.detach() @ router.weight.detach().T if case.gate_dim else x.detach()
    if case.score == "sigmoid" and not variant.unbiased:
        ranks_TE = ranks_TE.sigmoid() + router.expert_bias_E
    ids_TK = ranks_TE.topk(case.top_k, dim=-1).indices
    routed = RoutedTokens(
        logits_TE, ids_TK, sequence_T, sequence_T, torch.ones(case.tokens, dtype=torch.bool)
    )
    total = sum(
        reference_loss(config.build(), [routed], case.score) for config in OBJECTIVES[variant.objective]
    )
    return torch.autograd.grad(total, x64)[0]


def check_case(case: Case) -> dict[str, float]:
    """Gradient errors of all variants at a small size with the case's experts."""
    small = replace(case, tokens=256, layers=1)
    data = make_data(small, seed=1)
    errors = {v.name: gradient_error(v, small, data) for v in build_variants(small)}
    wrong = {name: error for name, error in errors.items() if error is not None and error > 1e-4}
    if wrong:
        raise RuntimeError(f"gradients differ from the reference, so times mean nothing: {wrong}")
    return {name: error for name, error in errors.items() if error is not None}


# -------------------------------------------------------------------------------- operators and memory


def fit_operators(case: Case) -> dict[str, dict[str, float]]:
    """Operators of forward and backward that each variant has more than the routing, by microbatch and by layer.

    Also of the balancer's step, and of one more balance loss: a third of what "all" has more than "sequence + z".
    """
    counts: dict[str, list[int]] = {}
    steps: dict[int, int] = {}
    for layers in FIT_LAYERS:
        small = replace(case, tokens=16 * case.sequences, layers=layers)
        data = make_data(small)
        for variant in build_variants(small):
            backward(forward(variant, data))  # what is made once is made
            clear(variant, data)
            counts.setdefault(variant.name, []).append(
                count_ops(lambda v=variant, d=data: backward(forward(v, d)))
            )
            if variant.balancer is not None and variant.objective == "all":
                steps[layers] = count_ops(variant.balancer.step)
                drop_gradients(variant, data)
            else:
                clear(variant, data)
    lines = {name: Line.fit(FIT_LAYERS, numbers) for name, numbers in counts.items()}
    out = {name: (line - lines[ROUTING]).json() for name, line in lines.items()}
    for name in counts:
        family, _, objective = name.partition(": ")
        other = f"{family}: sequence + z"
        if objective == "all":
            more = [(a - b) / MORE_IN_ALL for a, b in zip(counts[name], counts[other], strict=True)]
            out[f"{family}: one more balance loss"] = Line.fit(FIT_LAYERS, more).json()
    out["routing: alone"] = lines[ROUTING].json()
    out["step: all"] = Line.fit(FIT_LAYERS, list(steps.values())).json()
    return out


def held_units(variant: Variant, case: Case, data: Data) -> float:
    """What autograd holds between forward and backward, in T E 4 bytes by layer; no parameters, no gate's input."""
    others = [*variant.net.parameters(), *(data.inputs if case.gate_dim else ())]
    held = held_bytes(lambda: forward(variant, data), backward, others, compiled=variant.compiled is not None)
    clear(variant, data)
    return held / (case.layers * case.unit)


def step_ms(variants: Sequence[Variant], case: Case, data: Data, reps: int) -> float:
    """Median milliseconds per layer of `Balancer.step`, which runs once per optimiser step; not in the tables."""
    variant = next(v for v in variants if v.balancer is not None and v.objective == "all")
    seconds = []
    for _ in range(reps):
        backward(forward(variant, data))
        start = time.perf_counter()
        variant.balancer.step()
        seconds.append(time.perf_counter() - start)
        drop_gradients(variant, data)
    return statistics.median(seconds) * 1e3 / case.layers


# -------------------------------------------------------------------------------- one case


def run_case(
    case: Case, *, rounds: int, seconds: float, rng: random.Random, compiler: str | None = None
) -> dict[str, Any]:
    """Everything about one size."""
    errors = check_case(case)
    data, variants = make_data(case), build_variants(case)
    step = step_ms(variants, case, data, min(rounds, 5))
    skipped: dict[str, str] = {}
    if compiler is not None:
        variants, skipped = compiled(variants, data, compiler)
    held = {v.name: held_units(v, case, data) for v in variants}
    bases = {ROUTING, *(v.own_base for v in variants)}

    def arm(variant: Variant) -> Arm:
        return Arm(
            name=variant.name,
            run=lambda: backward(forward(variant, data)),
            clean=lambda: clear(variant, data),
            baseline=variant.name in bases,
        )

    times = measure([arm(v) for v in variants], rounds=rounds, seconds=seconds, rng=rng)
    rows = []
    for variant in variants:
        own = variant.own_base if variant.own_base in times else ROUTING
        rows.append(
            {
                "family": variant.family,
                "objective": variant.objective,
                "gradient_error": errors.get(variant.name),
                "held": round(held[variant.name], 5),
                "own_base": own,
                "routing": compare_clocks(times, variant.name, ROUTING, layers=case.layers),
                "own": compare_clocks(times, variant.name, own, layers=case.layers),
            }
        )
    return {
        "case": asdict(case),
        "compiler": compiler,
        "rows": rows,
        "step_ms": step,
        "not_compiled": skipped,
    }


def compiled(variants: Sequence[Variant], data: Data, compiler: str) -> tuple[list[Variant], dict[str, str]]:
    """Some variants compiled, and why some are not. Graph breaks are allowed: peers have some."""
    kept, skipped = [], {}
    for variant in variants:
        if variant.objective not in COMPILED.get(variant.family.partition(",")[0], ()):
            continue
        want = loss_gradients(variant, data) if variant.objective not in NO_LOSS else []
        try:
            candidate = replace(variant, compiled=_compile(variant.net, compiler))
            backward(forward(candidate, data))
            clear(candidate, data)
            have = loss_gradients(candidate, data) if want else []
        except Exception as error:  # whatever a compiler meets in a peer's code
            skipped[variant.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a step that stopped before its forward
                clear(variant, data)
            continue
        errors = [relative_error(a, b) for a, b in zip(have, want, strict=True)]
        if errors and max(errors) > 1e-4:
            skipped[variant.name] = f"WRONG: its gradients differ from eager ones by {max(errors):.1e}"
            print(f"  {variant.name}: {skipped[variant.name]}", flush=True)
            continue
        kept.append(candidate)
    return kept, skipped


def _compile(net: torch.nn.Module, compiler: str) -> Any:
    # Code of its own for each variant: dynamo keeps graphs per code object and does not look at forward hooks
    # again, so that nets of one class would run each other's graphs.
    scope: dict[str, Any] = {"net": net}
    exec("def run(input_ids, inputs):\n    return net(input_ids, inputs)", scope)
    return torch.compile(scope["run"], backend=compiler)


# -------------------------------------------------------------------------------- all cases


def cases(quick: bool) -> list[tuple[Case, str | None]]:
    """Every size, and how it is compiled."""
    sizes = {"tokens": 8192, "sequences": 4, "top_k": 8, "layers": 4}
    experts, gated, gate_dim, compiler = (64, 128, 256, 512), (64, 256), 512, "inductor"
    if quick:
        sizes, experts, gated, gate_dim = sizes | {"tokens": 64, "top_k": 2, "layers": 2}, (16,), (16,), 8
    out: list[tuple[Case, str | None]] = [
        (Case(num_experts=E, score=score, **sizes), None) for score in ("softmax", "sigmoid") for E in experts
    ]
    out += [(Case(num_experts=E, score="softmax", gate_dim=gate_dim, **sizes), None) for E in gated]
    if not quick:
        out += [
            (Case(num_experts=256, score="softmax", **sizes), compiler),
            (Case(num_experts=64, score="sigmoid", **sizes), compiler),
        ]
    return out


def run(settings: Settings) -> dict[str, Any]:
    """All cases."""
    rng = random.Random(settings.seed)
    loads = [os.getloadavg()[0]]
    todo = cases(settings.quick)
    # Of a round's time; above E=256 torch.topk goes another way. What is compiled has fewer variants.
    shares = [
        (min(case.num_experts, 320) + 32) * (0.3 if compiler else 1.6 if case.gate_dim else 1)
        for case, compiler in todo
    ]
    results, operators = [], {}
    launched = launches.measure(quick=settings.quick)
    for (case, compiler), share in zip(todo, shares, strict=True):
        seconds = 0.6 * settings.seconds * share / sum(shares)
        group = f"{case.score}, gate D={case.gate_dim}" if case.gate_dim else case.score
        if group not in operators:
            operators[group] = fit_operators(case)
        rounds = 2 if settings.quick else 21
        results.append(run_case(case, rounds=rounds, seconds=seconds, rng=rng, compiler=compiler))
        loads.append(os.getloadavg()[0])
        done = f"{group}, E={case.num_experts}" + (f", {compiler}" if compiler else "")
        print(
            f"  {done}: {results[-1]['rows'][0]['routing']['cpu']['rounds']} rounds, load {loads[-1]:.2f}",
            flush=True,
        )
    return {"loads": loads, "results": results, "operators": operators, "launches": launched}


if __name__ == "__main__":
    import sys

    from benchmarks.__main__ import main

    main(["--only", "routing", *sys.argv[1:]])

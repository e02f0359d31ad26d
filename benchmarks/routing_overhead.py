"""What do balance losses cost a router? Time, memory held for backward, and operators, against peers.

    python -m benchmarks.routing_overhead --write

One process and one interleaved run: in every repetition all variants run once in a random order, and each is
compared with the same repetition's routing alone. The gradients of all variants are first compared with a float64
reference. See README.md for what is and is not measured.

Shapes: T tokens, B sequences, D width, E experts, K top-k, L layers.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import RESULTS, machine, print_table, write_json, write_section
from benchmarks.routing_report import figure, grouped, markdown, table_rows, title
from benchmarks.routing_variants import OBJECTIVES, Case, Variant, build_variants
from trimtab import ops
from trimtab.reference import RoutedTokens, reference_loss

WARMUP = 2
NO_LOSS = ("none", "count only")
# Compiling takes longer than measuring: these objectives stand for the others.
COMPILED = ("none", "count only", "sequence", "z", "sequence + z", "all")


@dataclass
class Data:
    """Inputs and upstream gradients of one case."""

    input_ids: Tensor
    inputs: list[Tensor]
    grads_TK: list[Tensor]
    grads_TE: list[Tensor]


def make_data(case: Case, seed: int = 0) -> Data:
    """Random logits (leaves) or gate inputs, and random gradients of the routing weights."""
    generator = torch.Generator().manual_seed(seed)
    width = case.gate_dim or case.num_experts

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layers = range(case.layers)
    return Data(
        input_ids=torch.zeros(case.sequences, case.tokens // case.sequences, dtype=torch.int64),
        inputs=[randn(case.tokens, width).requires_grad_() for _ in layers],
        grads_TK=[randn(case.tokens, case.top_k) for _ in layers],
        grads_TE=[randn(case.tokens, case.num_experts) for _ in layers],
    )


def forward(variant: Variant, data: Data) -> tuple[list[Tensor], list[Tensor | None]]:
    """One forward of all layers: what to backpropagate, and with which gradients."""
    run = variant.compiled or variant.net
    weights, losses = run(data.input_ids, data.inputs)
    grads: list[Tensor | None] = list(data.grads_TE if variant.dense else data.grads_TK)
    return [*weights, *losses], [*grads, *([None] * len(losses))]


def clear(variant: Variant, data: Data) -> None:
    """End the optimiser step and drop gradients; not timed."""
    if variant.balancer is not None:
        variant.balancer.step()
    for tensor in (*data.inputs, *variant.net.parameters()):
        tensor.grad = None


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
    logits = x.detach() @ router.weight.detach().T if case.gate_dim else x.detach()
    ids_TK = logits.topk(case.top_k, dim=-1).indices
    routed = RoutedTokens(
        logits_TE, ids_TK, sequence_T, sequence_T, torch.ones(case.tokens, dtype=torch.bool)
    )
    total = sum(
        reference_loss(config.build(), [routed], case.score) for config in OBJECTIVES[variant.objective]
    )
    return torch.autograd.grad(total, x64)[0]


# -------------------------------------------------------------------------------- memory and operators


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held_bytes(variant: Variant, data: Data, *, leaves: bool) -> int:
    """Bytes of distinct storages that autograd holds between forward and backward.

    Args:
        variant: what runs.
        data: its inputs.
        leaves: count the inputs too, if they are held: leaf logits. A gate's input is held by every variant.
    """
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        tensors, grads = forward(variant, data)
    own = [*variant.net.parameters(), *([] if leaves else data.inputs)]
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages = {}
    for held in alive:
        storage = held.tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
    torch.autograd.backward(tensors, grads)
    clear(variant, data)
    return sum(storages.values())


class OpCounter(TorchDispatchMode):
    """Counts aten operators that are not views: on an accelerator about one kernel launch each.

    trimtab's two operators are looked into, so that what they call counts as if it stood outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for custom_op in (ops.observe, ops.bind):
            if func is custom_op._opoverload:
                with self:
                    return custom_op._init_fn(*args, **kwargs)
        if func.namespace == "aten":
            with self:
                composite = func.decompose(*args, **kwargs)
            if composite is not NotImplemented:
                return composite
            if not func.is_view and func is not torch.ops.aten.detach.default:
                self.names[str(func)] += 1
        return func(*args, **kwargs)


def count_ops(variant: Variant, data: Data) -> int:
    """Operators of one forward and backward."""
    with OpCounter() as counter:
        tensors, grads = forward(variant, data)
        torch.autograd.backward(tensors, grads)
    clear(variant, data)
    return counter.names.total()


# -------------------------------------------------------------------------------- time


def measure_times(
    variants: Sequence[Variant], data: Data, reps: int, rng: random.Random
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each variant in each repetition, by wall clock and by CPU time of the process."""
    times = {variant.name: {"wall": [], "cpu": []} for variant in variants}
    gc.collect()
    gc.disable()
    try:
        for rep in range(WARMUP + reps):
            for variant in rng.sample(variants, len(variants)):
                wall, cpu = time.perf_counter(), time.process_time()
                tensors, grads = forward(variant, data)
                torch.autograd.backward(tensors, grads)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                del tensors, grads
                clear(variant, data)
                if rep >= WARMUP:
                    times[variant.name]["wall"].append(wall)
                    times[variant.name]["cpu"].append(cpu)
    finally:
        gc.enable()
    return times


def step_ms(variants: Sequence[Variant], case: Case, data: Data, reps: int) -> float:
    """Median milliseconds per layer of `Balancer.step`, which runs once per optimiser step; not in the tables."""
    variant = next(v for v in variants if v.balancer is not None and v.objective == "all")
    seconds = []
    for _ in range(reps):
        torch.autograd.backward(*forward(variant, data))
        start = time.perf_counter()
        variant.balancer.step()
        seconds.append(time.perf_counter() - start)
        for tensor in (*data.inputs, *variant.net.parameters()):
            tensor.grad = None
    return statistics.median(seconds) * 1e3 / case.layers


def compare(seconds: list[float], base: list[float], layers: int) -> dict[str, float]:
    """A variant's times beside those of the routing alone."""
    return {
        "paired_median": statistics.median(a / b for a, b in zip(seconds, base, strict=True)),
        "ratio_of_minima": min(seconds) / min(base),
        "min_ms_per_layer": min(seconds) * 1e3 / layers,
        "extra_ms_per_layer": (min(seconds) - min(base)) * 1e3 / layers,
    }


# -------------------------------------------------------------------------------- one case


def check_case(case: Case) -> dict[str, float]:
    """Gradient errors of all variants at a small size with the case's experts."""
    small = replace(case, tokens=256, layers=1)
    data = make_data(small, seed=1)
    errors = {v.name: gradient_error(v, small, data) for v in build_variants(small)}
    wrong = {name: error for name, error in errors.items() if error is not None and error > 1e-4}
    if wrong:
        raise RuntimeError(f"gradients differ from the reference, so times mean nothing: {wrong}")
    return {name: error for name, error in errors.items() if error is not None}


def run_case(case: Case, reps: int, rng: random.Random, compiler: str | None) -> dict[str, Any]:
    """Everything about one size."""
    errors = check_case(case)
    data, variants = make_data(case), build_variants(case)
    unit = case.layers * case.tokens * case.num_experts * 4
    held = {v.name: held_bytes(v, data, leaves=not case.gate_dim) / unit for v in variants}
    num_ops = {v.name: count_ops(v, data) / case.layers for v in variants}
    step = step_ms(variants, case, data, min(reps, 5))
    skipped: dict[str, str] = {}
    if compiler is not None:
        variants, skipped = compiled(variants, data, compiler)
        held = {v.name: held_bytes(v, data, leaves=not case.gate_dim) / unit for v in variants}
    times = measure_times(variants, data, reps, rng)
    base = variants[0].name
    rows = []
    for variant in variants:
        row = {
            "family": variant.family,
            "objective": variant.objective,
            "gradient_error": errors.get(variant.name),
            "held": held[variant.name],
            # A compiled graph is not made of these operators.
            "extra_ops": None if compiler else num_ops[variant.name] - num_ops[base],
        }
        for clock in ("wall", "cpu"):
            row[clock] = compare(times[variant.name][clock], times[base][clock], case.layers)
        rows.append(row)
    return {
        "case": asdict(case),
        "compiler": compiler,
        "rows": rows,
        "step_ms": step,
        "not_compiled": skipped,
    }


def compiled(variants: Sequence[Variant], data: Data, compiler: str) -> tuple[list[Variant], dict[str, str]]:
    """The same variants compiled, and why some are not. Graph breaks are allowed: peers have some."""
    kept, skipped = [], {}
    for variant in variants:
        if variant.objective not in COMPILED and variant.family != "transformers":
            continue
        want = loss_gradients(variant, data) if variant.objective not in NO_LOSS else []
        try:
            candidate = replace(variant, compiled=_compile(variant.net, compiler))
            torch.autograd.backward(*forward(candidate, data))
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
            raise RuntimeError(
                f"{variant.name}: compiled gradients differ from eager ones by {max(errors):.1e}"
            )
        kept.append(candidate)
    return kept, skipped


def _compile(net: torch.nn.Module, compiler: str) -> Any:
    # Code of its own for each variant: dynamo keeps graphs per code object and does not look at forward hooks
    # again, so that nets of one class would run each other's graphs.
    scope: dict[str, Any] = {"net": net}
    exec("def run(input_ids, inputs):\n    return net(input_ids, inputs)", scope)
    return torch.compile(scope["run"], backend=compiler)


# -------------------------------------------------------------------------------- command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--scores", nargs="+", choices=("softmax", "sigmoid"), default=["softmax", "sigmoid"])
    parser.add_argument("--tokens", type=int, default=8192, help="T of one forward")
    parser.add_argument("--sequences", type=int, default=4, help="B that T is divided into")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--gate-dim", type=int, default=512, help="D of the tables with a gate; 0 leaves them out"
    )
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), help="of the tables; default: cpu with one thread, else wall"
    )
    parser.add_argument(
        "--compile", choices=("aot_eager", "inductor"), help="also compiled, at the largest E"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of variants")
    parser.add_argument("--write", action="store_true", help="write the JSON, the figure and RESULTS.md")
    args = parser.parse_args(arguments)
    if args.tokens % args.sequences:
        parser.error(
            f"--tokens {args.tokens} must be divisible by --sequences {args.sequences}; give a multiple"
        )
    if args.clock is None:
        # Of one thread, CPU time is what the clock would say if nobody else used the machine.
        args.clock = "cpu" if args.threads == 1 else "wall"
    return args


def cases(args: argparse.Namespace) -> list[tuple[Case, str | None]]:
    """Every size, and how it is run."""
    sizes = {
        "tokens": args.tokens,
        "sequences": args.sequences,
        "top_k": args.top_k,
        "layers": args.layers,
    }
    out: list[tuple[Case, str | None]] = []
    for gate_dim in (0, args.gate_dim) if args.gate_dim else (0,):
        # With a gate one score function says it all.
        for score in args.scores[:1] if gate_dim else args.scores:
            out += [
                (Case(num_experts=E, score=score, gate_dim=gate_dim, **sizes), None) for E in args.experts
            ]
    if args.compile:
        largest = Case(num_experts=args.experts[-1], score=args.scores[0], gate_dim=args.gate_dim, **sizes)
        out.append((largest, args.compile))
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    loads, results = [os.getloadavg()[0]], []
    started = machine()
    for case, compiler in cases(args):
        results.append(run_case(case, args.reps, rng, compiler))
        loads.append(os.getloadavg()[0])
        print(f"{title(results[-1])}, E={case.num_experts}: load {loads[-1]:.2f}", flush=True)
    report = {"machine": started, "options": vars(args), "loads": loads, "results": results}
    for name, group in grouped(results).items():
        print_table(name, *table_rows(group, args.clock))
    if args.write:
        write_json(RESULTS / "routing_overhead.json", report)
        figure(report, RESULTS / "routing_overhead.html")
        write_section("routing_overhead", markdown(report))
    return report


if __name__ == "__main__":
    main()

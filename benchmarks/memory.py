"""What does the router hold for backward, with every loss on, and what does it cost to hold less?

    python -m benchmarks --only memory --write

trimtab's router with its gate, by what `attach(..., keep=...)` says: logits computed again from the gate's input,
kept, or kept in host memory. "router alone" has no balancer. In backward every input gradient is handed on and
dropped, as a model hands it to the layer below.

Shapes: T tokens, B sequences, D width, E experts, K top-k, L layers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

import trimtab
from benchmarks import budget
from benchmarks.common import CLOCK_NAMES, Settings, describe, markdown_table
from benchmarks.instruments import LiveBytes, held_bytes, unwatched
from benchmarks.routing_variants import OBJECTIVES
from benchmarks.svg import Dot, Panel, dot_panels
from benchmarks.timing import Arm, compare_clocks, measure
from trimtab.integrations.attach import Keep

ALONE = "router alone"
AGAIN = "router alone, again"
MEASURES = {"held for backward": "held", "alive after forward": "alive"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """One router.

    Args:
        name: in tables.
        router: its settings.
        tokens: T.
        sequences: B.
        layers: L.
    """

    name: str
    router: trimtab.Router.Config
    tokens: int
    sequences: int
    layers: int

    @property
    def unit(self) -> int:
        """Bytes of one float32 (T, E)."""
        return self.tokens * self.router.num_experts * 4


def sizes(quick: bool) -> list[Size]:
    """A router of a small model, and DeepSeek-V3's."""
    small = trimtab.Router.Config(dim=512, num_experts=256, top_k=8, score="softmax", normalize_top_k=True)
    v3 = trimtab.Router.Config(
        dim=7168,
        num_experts=256,
        top_k=8,
        score="sigmoid",
        normalize_top_k=True,
        scale=2.5,
        num_groups=8,
        top_k_groups=4,
        group_score="top2_sum",
        expert_bias=True,
    )
    if quick:
        tiny = trimtab.Router.Config(dim=64, num_experts=16, top_k=2, score="softmax", normalize_top_k=True)
        return [Size(name="tiny", router=tiny, tokens=64, sequences=4, layers=2)]
    return [
        Size(name="D=512", router=small, tokens=4096, sequences=4, layers=4),
        Size(name="DeepSeek-V3's, D=7168", router=v3, tokens=1024, sequences=4, layers=2),
    ]


class Routers(nn.Module):
    """L routers side by side, each with an input of its own."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.routers = nn.ModuleList(size.router.build() for _ in range(size.layers))

    def forward(self, input_ids: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        """Weights of every layer; logits and ids are dropped, as in a model that logs neither."""
        return [router(x)[1] for router, x in zip(self.routers, inputs, strict=True)]


@dataclass
class Run:
    """One arm: routers with or without a balancer, and what they are run on."""

    net: Routers
    balancer: trimtab.Balancer | None
    input_ids: Tensor
    inputs: list[Tensor]
    grads_TK: list[Tensor]

    def forward(self) -> list[Tensor]:
        """Of all layers."""
        return self.net(self.input_ids, self.inputs)

    def backward(self, weights: list[Tensor]) -> None:
        """Of all layers."""
        torch.autograd.backward(weights, self.grads_TK)

    def __call__(self) -> None:
        self.backward(self.forward())

    def clean(self) -> None:
        """End the step."""
        if self.balancer is not None:
            self.balancer.step()
        for parameter in self.net.parameters():
            parameter.grad = None


def _drop(tensor: Tensor) -> None:
    tensor.grad = None


def runs(size: Size, device: str = "cpu") -> dict[str, Run]:
    """Every arm, on the same inputs."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    layers = range(size.layers)
    input_ids = torch.zeros(size.sequences, size.tokens // size.sequences, dtype=torch.int64, device=device)
    inputs = [randn(size.tokens, size.router.dim).requires_grad_() for _ in layers]
    for x in inputs:
        x.register_post_accumulate_grad_hook(_drop)
    grads_TK = [randn(size.tokens, size.router.top_k) for _ in layers]
    ways: dict[str, dict[str, Any] | None] = {ALONE: None, AGAIN: None}
    for keep in get_args(Keep):
        ways[f"fused, keep={keep}"] = {"keep": keep, "fused": True}
    for keep in ("input", "logits"):
        ways[f"hook, keep={keep}"] = {"keep": keep, "fused": False}
    out = {}
    for name, options in ways.items():
        torch.manual_seed(0)
        net = Routers(size).to(device)
        balancer = None
        if options is not None:
            balancer = trimtab.attach(net, OBJECTIVES["all"], measure_every=0, **options)
        out[name] = Run(net.train(), balancer, input_ids, inputs, grads_TK)
    return out


def alive_and_peak(
    run: Callable[[], Any], forward: Callable[[], Any], backward: Callable[[Any], None]
) -> tuple[int, int]:
    """Bytes alive between forward and backward, and the most in both; a run before has made what is made once."""
    run()
    with unwatched(), LiveBytes() as live:
        result = forward()
        alive = live.now
        backward(result)
    return alive, live.peak


def run_size(size: Size, *, rounds: int, seconds: float, rng: random.Random) -> dict[str, Any]:
    """All arms of one router."""
    arms = runs(size)
    rows: dict[str, dict[str, Any]] = {}
    for name, run in arms.items():
        others = [*run.net.parameters(), *run.inputs]
        held = held_bytes(run.forward, run.backward, others)
        run.clean()
        alive, peak = alive_and_peak(lambda r=run: (r(), r.clean()), run.forward, run.backward)
        run.clean()
        by_layer = size.layers * size.unit
        rows[name] = {"held": held / by_layer, "alive": alive / by_layer, "peak": peak}
    times = measure(
        [Arm(name=name, run=run, clean=run.clean, baseline=name == ALONE) for name, run in arms.items()],
        rounds=rounds,
        seconds=seconds,
        rng=rng,
    )
    for name, row in rows.items():
        row["time"] = compare_clocks(times, name, ALONE, layers=size.layers)
        if name.startswith("fused") and "fused, keep=logits" in times:
            row["over_kept"] = compare_clocks(times, name, "fused, keep=logits", layers=size.layers)
    return {
        "name": size.name,
        "size": asdict(size) | {"router": _words(size.router)},
        "unit": size.unit,
        "rows": rows,
    }


def _words(config: trimtab.Router.Config) -> str:
    return (
        f"D={config.dim}, E={config.num_experts}, K={config.top_k}, {config.score}"
        f"{', groups' if config.num_groups > 1 else ''}{', expert bias' if config.expert_bias else ''}"
    )


def run(settings: Settings) -> dict[str, Any]:
    """All sizes."""
    rng, loads = random.Random(settings.seed), [os.getloadavg()[0]]
    todo, results = sizes(settings.quick), []
    for size in todo:
        rounds = 2 if settings.quick else 21
        results.append(run_size(size, rounds=rounds, seconds=0.85 * settings.seconds / len(todo), rng=rng))
        loads.append(os.getloadavg()[0])
        print(f"  {size.name}: load {loads[-1]:.2f}", flush=True)
    return {"loads": loads, "results": results}


HEADER = [
    "kept",
    "held, U",
    "alive, U",
    "peak, MiB",
    "peak more than alone, U",
    "time / alone",
    "time / keep=logits",
]


def markdown(report: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    clock = report["clock"]
    lines = [
        "## Memory",
        "",
        describe(report["machine"], loads=report["loads"]),
        f"- every loss on, trimtab's router with its gate, float32, {CLOCK_NAMES[clock]}",
        "",
        "U = T E 4 bytes by layer. Held: distinct storages that autograd holds between forward and backward, "
        "without parameters and the gate's input, which a model holds anyway. Alive: all that lives then, routing "
        "weights and counts too. Peak: most bytes alive at once in forward and backward, all layers together, "
        f"without inputs. Budget of what is held: {budget.HELD_LOGITS} U with logits kept, "
        f"{budget.HELD_RECOMPUTE} U without. Time: forward and backward with the gate, over the router alone and "
        "over keeping the logits; median and 95% interval.",
    ]
    if any(name.endswith("=host") for result in report["results"] for name in result["rows"]):
        lines += ["", '`keep="host"` needs CUDA: on a CPU it is `keep="logits"`.']
    for result in report["results"]:
        size, base = result["size"], result["rows"][ALONE]
        rows = [_cells(name, row, base, result, clock) for name, row in result["rows"].items()]
        about = f"{size['router']}; T={size['tokens']}, B={size['sequences']}, L={size['layers']}"
        about += f"; U = {result['unit'] / 2**20:g} MiB; {base['time'][clock]['rounds']} rounds."
        lines += ["", f"### Router: {result['name']}", "", about, "", markdown_table(HEADER, rows)]
    return "\n".join(lines)


def _cells(
    name: str, row: dict[str, Any], base: dict[str, Any], result: dict[str, Any], clock: str
) -> list[str]:
    time = row["time"][clock]
    extra_peak = (row["peak"] - base["peak"]) / (result["size"]["layers"] * result["unit"])
    return [
        name,
        f"{row['held']:.3f}",
        f"{row['alive']:.3f}",
        f"{row['peak'] / 2**20:.1f}",
        f"{extra_peak:+.3f}",
        f"{time['ms']:.2f} ms" if name == ALONE else _ratio(time),
        _ratio(row["over_kept"][clock]) if "over_kept" in row else "–",
    ]


def _ratio(one: dict[str, Any]) -> str:
    return f"{one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def images(report: dict[str, Any]) -> dict[str, str]:
    """The figure of the docs."""
    panels = []
    for result in report["results"]:
        dots = [
            Dot(group=name, family=words, value=row[key], low=row[key], high=row[key])
            for name, row in result["rows"].items()
            if name != AGAIN
            for words, key in MEASURES.items()
        ]
        panels.append(Panel(title=result["name"], dots=dots))
    figure = dot_panels(
        panels,
        title="Router memory with every loss, by what is kept for backward",
        x_title="T × E × 4 bytes by layer",
        limits={"recompute ≤ 0.1": budget.HELD_RECOMPUTE, "logits kept ≤ 1.1": budget.HELD_LOGITS},
        families=tuple(MEASURES),
        log=False,
    )
    return {"benchmark-memory": figure}

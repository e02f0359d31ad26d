"""What do losses cost a whole MoE layer, and a whole training step of a model?

    python -m benchmarks --only layer-and-model --write

Layer: `trimtab.MoE`, forward and backward. Model: a small stock qwen3_moe of transformers, forward, backward, AdamW
and `Balancer.step`. "off again" is a second copy without losses: what it differs from 1 by is noise.

Shapes: T tokens, B sequences, S length, D width, F expert width, E experts, K top-k, L layers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import trimtab
from benchmarks.common import CLOCK_NAMES, Settings, describe, markdown_table
from benchmarks.routing_variants import OBJECTIVES
from benchmarks.svg import Dot, Panel, dot_panels
from benchmarks.timing import Arm, compare_clocks, measure

OFF, AGAIN = "off", "off again"
STOCK = "transformers' own loss"
LAYER = {"D": 512, "F": 256, "E": 64, "K": 8, "B": 4, "S": 1024}
MODEL = {"D": 256, "F": 128, "E": 32, "K": 4, "L": 4, "B": 4, "S": 256, "vocabulary": 4096}
QUICK = {"D": 32, "F": 16, "E": 8, "K": 2, "L": 2, "B": 2, "S": 16, "vocabulary": 64}


@dataclass
class Step:
    """One arm: what a step runs, and what ends it without being timed."""

    run: Callable[[], float]
    clean: Callable[[], None]


def layer_arms(size: dict[str, int]) -> dict[str, Step]:
    """The MoE layer: off twice, with losses, and with all of them by the hook."""
    out = {}
    ways: dict[str, tuple[str, bool] | None] = {OFF: None, AGAIN: None}
    ways |= {"sequence + z": ("sequence + z", True), "all": ("all", True), "all, hook": ("all", False)}
    for name, way in ways.items():
        out[name] = _layer_step(size, way)
    return out


class _Around(nn.Module):
    """The module that is told the batch."""

    def __init__(self, moe: trimtab.MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        out: Tensor = self.moe(inputs_embeds)
        return out


def _layer_step(size: dict[str, int], way: tuple[str, bool] | None) -> Step:
    torch.manual_seed(0)
    router = trimtab.Router.Config(
        dim=size["D"], num_experts=size["E"], top_k=size["K"], score="softmax", normalize_top_k=True
    )
    experts = trimtab.Experts.Config(dim=size["D"], hidden_dim=size["F"], num_experts=size["E"])
    layer = _Around(trimtab.MoE.Config(router=router, experts=experts).build()).train()
    x_BSD = torch.randn(size["B"], size["S"], size["D"], requires_grad=True)
    grad_BSD = torch.randn(size["B"], size["S"], size["D"])
    balancer = None
    if way is not None:
        balancer = trimtab.attach(layer, OBJECTIVES[way[0]], fused=way[1], measure_every=0)

    def run() -> float:
        y_BSD = layer(x_BSD)
        y_BSD.backward(grad_BSD)
        return y_BSD.detach()[0, 0, 0].item()

    def clean() -> None:
        if balancer is not None:
            balancer.step()
        for tensor in (x_BSD, *layer.parameters()):
            tensor.grad = None

    return Step(run, clean)


def model_arms(size: dict[str, int]) -> dict[str, Step]:
    """The model: off twice, with losses, and with transformers' own loss."""
    out = {}
    for name in (OFF, AGAIN, "sequence + z", "all", STOCK):
        out[name] = _model_step(size, name)
    return out


def _model_step(size: dict[str, int], name: str) -> Step:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=size["D"],
        moe_intermediate_size=size["F"],
        num_experts=size["E"],
        num_experts_per_tok=size["K"],
        num_hidden_layers=size["L"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size["D"] // 4,
        vocab_size=size["vocabulary"],
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=name == STOCK,
        router_aux_loss_coef=0.01,
    )
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    balancer = None
    if name in OBJECTIVES:
        balancer = trimtab.attach(model, OBJECTIVES[name], measure_every=0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size["vocabulary"], (size["B"], size["S"]), generator=generator)

    def run() -> float:
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        optimizer.step()
        if balancer is not None:
            balancer.step()
        optimizer.zero_grad()
        # transformers adds its own loss to what it returns.
        own = 0.0 if name != STOCK else config.router_aux_loss_coef * out.aux_loss.item()
        return out.loss.item() - own

    return Step(run, lambda: None)


def check_equal(first: dict[str, float]) -> None:
    """Losses change no forward: the first step of all arms gives the same number."""
    wrong = {
        name: value for name, value in first.items() if abs(value - first[OFF]) > 1e-5 * (1 + abs(first[OFF]))
    }
    if wrong:
        raise RuntimeError(f"arms do not run the same thing: {OFF} gives {first[OFF]}, others {wrong}")


def run_kind(arms: dict[str, Step], *, rounds: int, seconds: float, rng: random.Random) -> dict[str, Any]:
    """All arms of a layer or a model."""
    first = {}
    for name, step in arms.items():
        first[name] = step.run()
        step.clean()
    check_equal(first)
    times = measure(
        [Arm(name=name, run=step.run, clean=step.clean) for name, step in arms.items()],
        rounds=rounds,
        seconds=seconds,
        rng=rng,
    )
    return {name: compare_clocks(times, name, OFF) for name in arms}


def run(settings: Settings) -> dict[str, Any]:
    """The layer, then the model."""
    rng, loads = random.Random(settings.seed), [os.getloadavg()[0]]
    kinds: dict[str, tuple[Callable[[dict[str, int]], dict[str, Step]], dict[str, int], float]] = {
        "MoE layer": (layer_arms, LAYER, 0.6),
        "model step": (model_arms, MODEL, 0.3),
    }
    results = []
    for kind, (build, size, share) in kinds.items():
        size = {key: QUICK[key] for key in size} if settings.quick else size
        rounds = 2 if settings.quick else 31
        rows = run_kind(build(size), rounds=rounds, seconds=share * settings.seconds, rng=rng)
        results.append({"kind": kind, "size": size, "rows": rows})
        loads.append(os.getloadavg()[0])
        print(f"  {kind}: load {loads[-1]:.2f}", flush=True)
    return {"loads": loads, "results": results}


def markdown(report: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    clock = report["clock"]
    lines = [
        "## MoE layer and model step",
        "",
        describe(report["machine"], loads=report["loads"]),
        f"- float32, eager, {CLOCK_NAMES[clock]}",
        "",
        "Layer: forward and backward of `trimtab.MoE`. Model: stock qwen3_moe, forward, backward, AdamW and the "
        "balancer's step. Time over the same without losses: median and 95% interval of paired rounds; "
        f'"{AGAIN}" is a second copy without losses, so what it differs from 1 by is noise.',
    ]
    for result in report["results"]:
        rows = []
        for name, row in result["rows"].items():
            one = row[clock]
            cells = [name, f"{one['ms']:.1f}"]
            if name == OFF:
                cells += ["1", "–", "–"]
            else:
                cells += [
                    f"{one['ratio']:.4f} [{one['low']:.4f}, {one['high']:.4f}]",
                    f"{one['minima']:.4f}",
                    f"{one['extra_ms']:+.2f}",
                ]
            rows.append(cells)
        size = ", ".join(f"{key}={value}" for key, value in result["size"].items())
        rounds = result["rows"][OFF][clock]["rounds"]
        header = ["losses", "ms", "ratio", "ratio of minima", "extra ms"]
        kind = result["kind"]
        lines += [
            "",
            f"### {kind[0].upper()}{kind[1:]}",
            "",
            f"{size}; {rounds} rounds.",
            "",
            markdown_table(header, rows),
        ]
    return "\n".join(lines)


def images(report: dict[str, Any]) -> dict[str, str]:
    """The figure of the docs."""
    panels = []
    for result in report["results"]:
        dots = []
        for name, row in result["rows"].items():
            one = row[report["clock"]]
            if name != OFF:
                dots.append(
                    Dot(group=name, family="ratio", value=one["ratio"], low=one["low"], high=one["high"])
                )
        panels.append(Panel(title=result["kind"], dots=dots))
    figure = dot_panels(
        panels,
        title="A whole MoE layer and a whole training step, over the same without losses",
        x_title="ratio (dot: median, line: 95% interval)",
        families=("ratio",),
    )
    return {"benchmark-layer-and-model": figure}

"""What `routing_overhead` compares: one routing, and every way of adding losses to it.

Two baselines. "routing" is what everybody's router does, in plain torch operators: softmax -> top-k -> divide by
the sum, or sigmoid -> add a bias -> top-k -> gather -> divide by the sum. The hook, the formula and the peers
(`benchmarks.routing_peers`) get that routing and add losses to it. "trimtab.Router" is trimtab's own without a
balancer, which forms the same weights. The fused path is that router with a balancer: it is compared with both.

Where logits are leaves, trimtab's router runs with a gate that returns its input: no product, no copy. Where they
are not, every variant has the same linear gate inside what is timed.

Shapes: T tokens, B sequences, D width, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import trimtab
from benchmarks.routing_nets import COEF, ROUTING, Case, Losses, Net, Routing, Variant, add_parameters
from benchmarks.routing_peers import peer_variants
from trimtab.integrations.attach import Keep
from trimtab.integrations.families import Family
from trimtab.losses import Objective

NUM_DEVICES = 8
ROUTER = "trimtab.Router: none"

OBJECTIVES: dict[str, tuple[Objective.Config, ...]] = {
    "count only": (),
    "sequence": (trimtab.SequenceWise.Config(coef=COEF),),
    "batch": (trimtab.BatchWise.Config(coef=COEF),),
    "global": (trimtab.GlobalBatch.Config(coef=COEF),),
    "device": (trimtab.DeviceLevel.Config(coef=COEF, num_devices=NUM_DEVICES),),
    "z": (trimtab.ZLoss.Config(coef=COEF),),
}
OBJECTIVES["sequence + z"] = OBJECTIVES["sequence"] + OBJECTIVES["z"]
OBJECTIVES["all"] = tuple(
    config for name in ("sequence", "batch", "global", "device", "z") for config in OBJECTIVES[name]
)
# "all" has that many balance losses more than "sequence + z".
MORE_IN_ALL = len(OBJECTIVES["all"]) - len(OBJECTIVES["sequence + z"])
# These say where the fused path gains on the hook on the same router.
OF_ROUTER = ("sequence", "sequence + z", "all")


class _Router(trimtab.Router):
    """trimtab's router, whose gate can be taken away: its input is the logits then."""

    def _logits(self, x_TD: Tensor) -> Tensor:
        return super()._logits(x_TD) if hasattr(self, "weight") else x_TD


def own_router(case: Case) -> trimtab.Router:
    """trimtab's router of a case."""
    config = trimtab.Router.Config(
        dim=case.gate_dim or case.num_experts,
        num_experts=case.num_experts,
        top_k=case.top_k,
        score=case.score,
        normalize_top_k=True,
        expert_bias=case.score == "sigmoid",
    )
    router = _Router(config)
    add_parameters(router, case)
    return router


class Formula(Losses):
    """The plain formula with autograd on the router's own scores; counts by scatter, no one-hot."""

    def __init__(self, case: Case, objective: str) -> None:
        self.case, self.objective = case, objective

    def layer(self, routed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        logits_TE, weights_TK, ids_TK, scores_TE = routed
        total = None
        if "sequence" in self.objective or "batch" in self.objective:
            groups = self.case.sequences if "sequence" in self.objective else 1
            probs_TE = scores_TE
            if self.case.score != "softmax":
                probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
            ids = ids_TK.view(groups, -1)
            counts_GE = torch.zeros(groups, self.case.num_experts).scatter_add_(
                1, ids, torch.ones_like(ids, dtype=torch.float32)
            )
            load_GE = counts_GE * (self.case.num_experts / ids.shape[1])
            mean_GE = probs_TE.view(groups, -1, self.case.num_experts).mean(dim=1)
            total = COEF * (load_GE * mean_GE).sum(dim=-1).mean()
        if "z" in self.objective:
            z_loss = COEF * logits_TE.logsumexp(dim=-1).square().mean()
            total = z_loss if total is None else total + z_loss
        return weights_TK, total


def balance(net: Net, case: Case, objective: str, *, keep: Keep, fused: bool) -> trimtab.Balancer:
    """Put trimtab on the routers of a net.

    Args:
        net: of `Routing` or of trimtab's router.
        case: its sizes.
        objective: key of `OBJECTIVES`.
        keep: what attach is given.
        fused: let trimtab's router run the fused path.
    """
    bias = "router.expert_bias_E" if case.score == "sigmoid" else None
    family = Family(
        router_class="Routing",
        model_types=(),
        score=case.score,
        source="this benchmark",
        input_ndim=2,
        expert_bias=bias,
        # Without a gate there is nothing to compute logits again from.
        linear_logits=bool(case.gate_dim),
    )
    return trimtab.attach(
        net,
        OBJECTIVES[objective],
        families={"Routing": family},
        keep=keep,
        fused=fused,
        measure_every=0,
    )


def remove_gates(nets: Iterable[Net]) -> None:
    """Make the routers' inputs their logits. `trimtab.attach` needs to see a gate, so this comes after it."""
    for net in nets:
        for router in net.routers:
            del router.weight


def trimtab_variants(case: Case) -> list[Variant]:
    """The hook on the common routing, trimtab's router alone, fused, and with the hook."""
    keeps: dict[str, Keep] = (
        {"keep=input": "input", "keep=logits": "logits"} if case.gate_dim else {"": "logits"}
    )
    variants = []

    def add(
        family: str, objective: str, router: Callable[[Case], nn.Module], keep: Keep, fused: bool
    ) -> None:
        net = Net(case, router=router)
        balancer = balance(net, case, objective, keep=keep, fused=fused)
        own_base = ROUTER if router is own_router else ROUTING
        variants.append(Variant(family, objective, net, balancer, own_base))

    for words, keep in keeps.items():
        suffix = f", {words}" if words else ""
        for objective in OBJECTIVES:
            # The default, which without a gate holds logits only for z-losses at sigmoids.
            stock_keep = keep if case.gate_dim else "input"
            add(f"trimtab hook{suffix}", objective, Routing, stock_keep, False)
        for objective in OBJECTIVES:
            add(f"trimtab fused{suffix}", objective, own_router, keep, True)
        for objective in OF_ROUTER:
            add(f"trimtab.Router with hook{suffix}", objective, own_router, keep, False)
    variants.append(Variant("trimtab.Router", "none", Net(case, router=own_router), own_base=ROUTER))
    return variants


def build_variants(case: Case) -> list[Variant]:
    """Every variant that exists for a case; the first is the routing alone."""
    variants = [Variant("routing", "none", Net(case)), Variant("routing again", "none", Net(case))]
    variants += trimtab_variants(case)
    for objective in ("sequence", "batch", "z", "sequence + z"):
        variants.append(Variant("formula + autograd", objective, Net(case, Formula(case, objective))))
    variants += peer_variants(case)
    for variant in variants:
        variant.net.train()
    if not case.gate_dim:
        remove_gates(variant.net for variant in variants)
    return variants

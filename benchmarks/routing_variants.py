"""What `routing_overhead` compares: one routing, and every way of adding losses to it.

All variants of one table share the routing (scores, top-k, renormalisation); "Megatron router" alone replaces it by
Megatron's own. Peers get the router's probabilities handed to them where their functions accept them, which is more
than their own callers do.

Shapes: T tokens, B sequences, S length, D width, E experts, K top-k, L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from trimtab.integrations.families import Family, repack_common, unpack_common
from trimtab.losses import Objective

COEF = 0.01
NUM_DEVICES = 8

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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size.

    Args:
        tokens: T.
        sequences: B.
        num_experts: E.
        top_k: K.
        layers: L.
        score: "softmax" or "sigmoid".
        gate_dim: D of a linear gate before the routing; 0: logits are leaves.
    """

    tokens: int
    sequences: int
    num_experts: int
    top_k: int
    layers: int
    score: str
    gate_dim: int = 0


# -------------------------------------------------------------------------------- the common routing


class Routing(nn.Module):
    """Scores, top-k, renormalised weights, of logits or of a gate's input."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.score = case.num_experts, case.top_k, case.score
        if case.gate_dim:
            self.weight = nn.Parameter(torch.randn(case.num_experts, case.gate_dim) / case.gate_dim**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, weights, ids and scores."""
        logits_TE = F.linear(x, self.weight) if hasattr(self, "weight") else x
        scores_TE = logits_TE.softmax(dim=-1) if self.score == "softmax" else logits_TE.sigmoid()
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        return logits_TE, weights_TK / weights_TK.sum(dim=-1, keepdim=True), ids_TK, scores_TE


class Losses:
    """Losses of one variant as its library or formula has them; by default none."""

    def layer(self, routed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Weights and the loss of one layer, if it is not already inside the weights."""
        return routed[1], None

    def model(self, logits: Sequence[Tensor]) -> Tensor | None:
        """A loss over the logits of all layers."""
        return None


class Net(nn.Module):
    """L routers; returns what is backpropagated: each layer's weights, and losses to add."""

    def __init__(self, case: Case, losses: Losses | None = None, router: type[nn.Module] = Routing) -> None:
        super().__init__()
        self.routers = nn.ModuleList(router(case) for _ in range(case.layers))
        self.losses = losses or Losses()

    def forward(self, input_ids: Tensor, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and losses."""
        weights, losses, logits = [], [], []
        for router, x in zip(self.routers, inputs, strict=True):
            routed = router(x)
            weight, loss = self.losses.layer(routed)
            weights.append(weight)
            logits.append(routed[0])
            losses += [] if loss is None else [loss]
        loss = self.losses.model(logits)
        return weights, losses if loss is None else [*losses, loss]


# -------------------------------------------------------------------------------- formula with autograd


class Formula(Losses):
    """The plain formula on the router's own scores; counts by scatter, no one-hot."""

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


class TransformersLosses(Losses):
    """transformers' `load_balancing_loss_func`: softmax, top-k and counts again, pooled over layers."""

    def __init__(self, case: Case) -> None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        self.case, self.function = case, load_balancing_loss_func

    def model(self, logits: Sequence[Tensor]) -> Tensor:
        return COEF * self.function(tuple(logits), self.case.num_experts, self.case.top_k)


# -------------------------------------------------------------------------------- Megatron-Core


def megatron_utils() -> Any:
    """Megatron-Core's module of router functions, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.transformer.moe import moe_utils
    except ImportError:
        return None
    return moe_utils


class MegatronLosses(Losses):
    """Megatron's loss functions on the common routing: its scores and counts are handed over."""

    def __init__(self, case: Case, objective: str) -> None:
        self.case, self.objective, self.utils = case, objective, megatron_utils()

    def layer(self, routed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        logits_TE, weights_TK, ids_TK, scores_TE = routed
        if "z" in self.objective:
            # Megatron ties its z-loss to the logits; the routing here has run, so it is tied to the weights.
            z_loss = self.utils.z_loss_func(logits_TE, COEF)
            weights_TK = self.utils.MoEAuxLossAutoScaler.apply(weights_TK, z_loss)
        if self.objective != "z":
            case = self.case
            if case.score != "softmax":
                scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
            groups = case.sequences if "sequence" in self.objective else 1
            # Rows are (length, batch) as Megatron has them: a sequence is every B-th row.
            ids = ids_TK.view(-1, groups, case.top_k) + torch.arange(groups)[:, None] * case.num_experts
            counts = torch.zeros(groups * case.num_experts, dtype=torch.int64)
            counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
            weights_TK = _megatron_balance(self.utils, case, groups, scores_TE, counts, weights_TK)
        return weights_TK, None


def _megatron_balance(
    utils: Any, case: Case, groups: int, scores_TE: Tensor, counts: Tensor, output: Tensor
) -> Tensor:
    scores = scores_TE.reshape(case.tokens // groups, -1)
    loss = utils.switch_load_balancing_loss_func(
        probs=scores,
        tokens_per_expert=counts,
        total_num_tokens=scores.shape[0],
        topk=case.top_k,
        num_experts=case.num_experts,
        moe_aux_loss_coeff=COEF,
    )
    return utils.MoEAuxLossAutoScaler.apply(output, loss / groups)


class MegatronRouter(nn.Module):
    """Megatron's router as its own `TopKRouter.routing` calls it, without communication and logging."""

    objective = "none"

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.utils = case, megatron_utils()
        if case.gate_dim:
            self.weight = nn.Parameter(torch.randn(case.num_experts, case.gate_dim) / case.gate_dim**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and dense (T, E) weights."""
        case, utils = self.case, self.utils
        logits_TE = F.linear(x, self.weight) if case.gate_dim else x
        if "z" in self.objective:
            logits_TE = utils.MoEAuxLossAutoScaler.apply(logits_TE, utils.z_loss_func(logits_TE, COEF))
        weights_TE, _ = utils.topk_routing_with_score_function(
            logits_TE, case.top_k, score_function=case.score
        )
        if "sequence" in self.objective or "batch" in self.objective:
            routing_map, scores_TE = utils.compute_routing_scores_for_aux_loss(
                logits_TE, case.top_k, case.score
            )
            groups = case.sequences if "sequence" in self.objective else 1
            counts = routing_map.reshape(case.tokens // groups, -1).sum(dim=0)
            weights_TE = _megatron_balance(utils, case, groups, scores_TE, counts, weights_TE)
        return logits_TE, weights_TE


def megatron_router(objective: str) -> type[MegatronRouter]:
    """The router class with an objective."""
    return type(f"MegatronRouter_{objective}", (MegatronRouter,), {"objective": objective})


# -------------------------------------------------------------------------------- trimtab


@dataclass
class _View:
    """What a balancer must know of a router without a gate."""

    canonical_name: str
    module: nn.Module
    num_experts: int
    top_k: int
    score: str
    block: nn.Module
    expert_bias: None = None
    grouped: bool = False


def balance(net: Net, case: Case, objective: str, keep: str) -> trimtab.Balancer:
    """Put trimtab on the routers of a net."""
    configs = OBJECTIVES[objective]
    if case.gate_dim:
        family = Family(
            router_class="Routing", model_types=(), score=case.score, source="this benchmark", input_ndim=2
        )
        return trimtab.attach(net, configs, families={"Routing": family}, keep=keep, measure_every=0)
    # Without a gate there is no model for attach() to find a gate in.
    objectives = [config.build() for config in configs]
    balancer = trimtab.Balancer(objectives, None, trimtab.Accumulation(), trimtab.GradReduction(), 0)
    for index, router in enumerate(net.routers):
        view = _View(f"routers.{index}", router, case.num_experts, case.top_k, case.score, net)
        hook = {
            "unpack": unpack_common,
            "repack": repack_common,
            "gate_weight": None,
            "gate_bias": None,
            "keeps_input": False,
        }
        balancer.add_router(view, hook, None)
    balancer.add_context(net, net, ("input_ids", "inputs"))
    return balancer


# -------------------------------------------------------------------------------- the list


@dataclass
class Variant:
    """One row.

    Args:
        family: who computes it.
        objective: which losses; a key of `OBJECTIVES`, or "none".
        net: what runs.
        balancer: trimtab's, whose step ends each repetition.
        interleaved: sequences are every B-th row, not consecutive rows.
        reference_factor: its gradient over that of the reference.
        dense: weights are (T, E).
        compiled: the net compiled, to run in its place.
    """

    family: str
    objective: str
    net: nn.Module
    balancer: trimtab.Balancer | None = None
    interleaved: bool = False
    reference_factor: float = 1.0
    dense: bool = False
    compiled: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """Key in results."""
        return f"{self.family}: {self.objective}"


def build_variants(case: Case) -> list[Variant]:
    """Every variant that exists for a case; the first is the routing alone."""
    variants = [Variant("routing", "none", Net(case))]
    keeps = ("input", "logits") if case.gate_dim else ("logits",)
    for keep in keeps:
        family = f"trimtab, keep={keep}" if case.gate_dim else "trimtab"
        for objective in OBJECTIVES:
            net = Net(case)
            variants.append(Variant(family, objective, net, balance(net, case, objective, keep)))
    for objective in ("sequence", "batch", "z", "sequence + z"):
        variants.append(Variant("formula + autograd", objective, Net(case, Formula(case, objective))))
    if case.score == "softmax":
        variant = Variant("transformers", "batch", Net(case, TransformersLosses(case)))
        variant.reference_factor = float(case.top_k)
        variants.append(variant)
    if megatron_utils() is not None:
        for objective in ("sequence", "batch", "z", "sequence + z"):
            net = Net(case, MegatronLosses(case, objective))
            variants.append(Variant("Megatron functions", objective, net, interleaved=True))
        for objective in ("none", "sequence", "batch", "z", "sequence + z"):
            net = Net(case, router=megatron_router(objective))
            variants.append(Variant("Megatron router", objective, net, interleaved=True, dense=True))
    for variant in variants:
        variant.net.train()
    return variants

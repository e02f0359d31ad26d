"""What a step's counts say about balance, per MoE layer.

Shapes: E experts, L MoE layers.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

RUNNING_DECAY = 0.98


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio = (max_e c_e - mean) / mean, 0 at balance, E / K - 1 at worst; 0 if nothing was counted.

    Args:
        counts_E: (..., E) counts or loads.

    Returns:
        (...) float64.

    Source: Wang et al. 2024, arXiv:2408.15664, eq. 4.
    """
    counts_E = counts_E.to(torch.float64)
    mean = counts_E.mean(dim=-1)
    return torch.where(mean > 0, counts_E.amax(dim=-1) / torch.where(mean > 0, mean, 1.0) - 1, 0.0)


def load_entropy(counts_E: Tensor) -> Tensor:
    """Entropy of the load over log E: 1 when even, 0 when one expert takes all.

    Args:
        counts_E: (..., E) counts or loads.

    Returns:
        (...) float64; 1 if nothing was counted.
    """
    counts_E = counts_E.to(torch.float64)
    total = counts_E.sum(dim=-1, keepdim=True)
    share_E = counts_E / torch.where(total > 0, total, 1.0)
    entropy = torch.special.entr(share_E).sum(dim=-1)
    scale = torch.tensor(max(counts_E.shape[-1], 2), dtype=torch.float64).log()
    return torch.where(total.squeeze(-1) > 0, entropy / scale.to(entropy.device), 1.0)


def mutual_information(counts_DE: Tensor) -> Tensor:
    """Mutual information in bits between domain and expert.

    Args:
        counts_DE: (..., D, E) assignments of each domain's tokens.

    Returns:
        (...) float64, 0 if experts do not tell domains apart, at most log2 of the number of domains.
    """
    joint_DE = counts_DE.to(torch.float64)
    total = joint_DE.sum(dim=(-2, -1), keepdim=True)
    joint_DE = joint_DE / torch.where(total > 0, total, 1.0)
    entropies = torch.special.entr(joint_DE.sum(dim=-1)).sum(dim=-1)
    entropies = entropies + torch.special.entr(joint_DE.sum(dim=-2)).sum(dim=-1)
    nats = entropies - torch.special.entr(joint_DE).sum(dim=(-2, -1))
    return nats.clamp(min=0) / torch.tensor(2.0, dtype=torch.float64).log().to(nats.device)


@dataclass(slots=True)
class LayerSnapshot:
    """One layer's tensors at the end of a step, on its device, until somebody asks for numbers.

    Args:
        name: router.
        counts_E: (E,) executed assignments of the step.
        sizes: (3,) valid tokens, sequences and documents of the step.
        running_load_E: (E,) decayed mean of the load fraction.
        losses: unscaled loss of each objective, if measured.
        logit_max: () largest logit, if measured.
        router_entropy: () mean entropy of p in nats, if measured.
        count_error: () max |f_used - f_final|, if a step-scope loss read counts.
        bias_E: (E,) selection bias after the update, or None.
        sizes_range: (3,) smallest and largest sizes of a microbatch.
    """

    name: str
    counts_E: Tensor
    sizes: Tensor
    running_load_E: Tensor
    sizes_range: tuple[Tensor, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    logit_max: Tensor | None = None
    router_entropy: Tensor | None = None
    count_error: Tensor | None = None
    bias_E: Tensor | None = None


def summarize(layers: Sequence[LayerSnapshot], coefs: Mapping[str, float]) -> dict[str, object]:
    """Numbers of one step, lists with one entry per layer.

    Args:
        layers: snapshots in module order.
        coefs: coefficient of each objective.

    Returns:
        ``layers`` (names), ``num_tokens``, ``load`` (mean 1), ``maxvio``, ``maxvio_running``,
        ``load_entropy``, ``dead_experts``, ``losses`` ({name: {"value": unscaled, "scaled": coef * value}}),
        ``logit_max``, ``router_entropy`` (nats), ``count_error``, ``bias``, ``bias_min``, ``bias_max``; None
        where a quantity was not measured or does not exist.
    """

    def numbers(values: Sequence[Tensor | None]) -> list[float] | None:
        present = [value.item() for value in values if value is not None]
        return present if values and len(present) == len(values) else None

    load = [_load(layer.counts_E) for layer in layers]
    losses: dict[str, dict[str, list[float]]] = {}
    for name, coef in coefs.items():
        value = numbers([layer.losses.get(name) for layer in layers])
        if value is not None:
            losses[name] = {"value": value, "scaled": [coef * v for v in value]}
    biases = [None if layer.bias_E is None else layer.bias_E.tolist() for layer in layers]
    has_bias = any(bias is not None for bias in biases)
    return {
        "layers": [layer.name for layer in layers],
        "num_tokens": [int(layer.sizes[0]) for layer in layers],
        "load": [load_E.tolist() for load_E in load],
        "maxvio": [max_violation(layer.counts_E).item() for layer in layers],
        "maxvio_running": [max_violation(layer.running_load_E).item() for layer in layers],
        "load_entropy": [load_entropy(layer.counts_E).item() for layer in layers],
        "dead_experts": [int((layer.counts_E == 0).sum()) for layer in layers],
        "losses": losses,
        "logit_max": numbers([layer.logit_max for layer in layers]),
        "router_entropy": numbers([layer.router_entropy for layer in layers]),
        "count_error": numbers([layer.count_error for layer in layers]),
        "bias": biases if has_bias else None,
        "bias_min": [None if b is None else min(b) for b in biases] if has_bias else None,
        "bias_max": [None if b is None else max(b) for b in biases] if has_bias else None,
    }


def check_totals(
    layers: Sequence[LayerSnapshot], declared: Mapping[str, int | None], *, complete: bool
) -> None:
    """Warn the caller's caller of totals that losses were wrongly scaled by.

    Args:
        layers: snapshots.
        declared: what `Balancer.start_step` was told of each total that an objective needs; None if nothing.
        complete: every count of the step was known before its first backward.
    """
    for place, name in enumerate(("num_tokens", "num_sequences", "num_documents")):
        if name not in declared:
            continue
        total = declared[name]
        for layer in layers:
            low, high = (int(sizes[place]) for sizes in layer.sizes_range)
            counted = int(layer.sizes[place])
            if total is not None and total != counted:
                warnings.warn(
                    f"start_step({name}={total}) was declared, but {layer.name} counted {counted}: the "
                    "losses of this step were scaled by the ratio; declare what the step holds",
                    stacklevel=3,
                )
                return
            if total is None and low != high and not complete:
                warnings.warn(
                    f"microbatches of one step hold from {low} to {high} ({name}), and each was weighted as "
                    f"1/M of the step; call balancer.start_step({name}=...) for exact weights",
                    stacklevel=3,
                )
                return


def _load(counts_E: Tensor) -> Tensor:
    counts_E = counts_E.to(torch.float64)
    mean = counts_E.mean()
    return counts_E / torch.where(mean > 0, mean, 1.0)

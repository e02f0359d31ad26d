"""The losses of a whole step as tensors, for callers that add them to their own loss.

Shapes: E experts, L MoE layers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.ledger import Ledger

Losses = Literal["injected", "returned"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLosses:
    """What `trimtab.balancer.Balancer.finalize` returns.

    Args:
        balance_loss: () float64, coef times loss, summed over layers and over all objectives but z-losses; of the
            whole step on all ranks, the same on each of them. Gradient flows to this rank's logits only with
            ``losses="returned"``.
        z_loss: () float64, the same of z-losses.
        tokens_per_expert: (E,) int64 executed assignments of the step to each expert by layer.
    """

    balance_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: dict[str, Tensor]


def finalize(ledger: Ledger) -> StepLosses:
    """The step's losses; see `trimtab.balancer.Balancer.finalize`."""
    if ledger.under_way is not None:
        raise RuntimeError(
            "finalize() inside balancer.interleaved(...), whose forwards have not ended; leave it first"
        )
    ran = [row for row in ledger.rows if row.num_forwards]
    if not ran:
        raise RuntimeError(
            "finalize() in a step without a training forward; call it after the step's forwards and before "
            "balancer.step()"
        )
    if not ledger.measuring:
        raise RuntimeError(
            "finalize() in a step whose losses are not measured; attach with measure_every=1, or "
            "losses='returned' to have their gradient as well"
        )
    short = next((row for row in ran if row.num_forwards < ledger.num_microbatches), None)
    if short is not None:
        raise RuntimeError(
            f"{short.name}: finalize() after {short.num_forwards} of num_microbatches={ledger.num_microbatches} "
            "forwards; call it when the last has run"
        )
    numbers = ledger.sum_step()
    device = ran[0].counts_AE.device if ran[0].counts_AE is not None else None
    sums = {False: torch.zeros((), dtype=torch.float64, device=device)}
    sums[True] = sums[False]
    for objective in ledger.objectives:
        for one in numbers:
            if objective.name in one.losses:
                is_z = objective.reads_logits
                sums[is_z] = sums[is_z] + objective.coef * one.losses[objective.name].to(device)
    # Zeros, with the way back to the logits.
    terms = [term.to(device) for row in ledger.rows for _, term in row.terms]
    if terms:
        balance_term, z_term = torch.stack(terms).double().sum(dim=0).unbind()
        sums = {False: sums[False] + balance_term, True: sums[True] + z_term}
    counts = {row.name: row.counts_AE[0].clone() for row in ledger.rows if row.counts_AE is not None}
    return StepLosses(balance_loss=sums[False], z_loss=sums[True], tokens_per_expert=counts)

"""What a measured step adds to counts: sums of probabilities, logits and losses, for logging only.

Shapes: T tokens, E experts, G finest groups, A count maps.

Sums are laid down in forward and turned into losses when the step has ended, when its counts are complete
and summed over ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.counts import Reading, sum_groups
from trimtab.objective import Objective
from trimtab.ranks import TokenRanks
from trimtab.scores import ScoreName, compute_dtype, probs


@dataclass(frozen=True, slots=True)
class MeasuredForward:
    """Sums of one layer over one microbatch, of this rank's valid tokens, and what the microbatch was.

    Args:
        ticket: names the forward.
        prob_sums_GE: (G, E) sums of p.
        squared_lse_sum: () sum of lse^2.
        entropy_sum: () sum of the entropy of p, in nats.
        logit_max: () largest logit.
        num_tokens: () valid tokens of this rank.
        counts_AGE: (A, G, E) counts of this rank.
        num_tokens_G: (G,) valid tokens of each group, on all ranks that share it.
        sequence_of_group_G: (G,) sequence of each document, or None.
        num_sequences: B.
    """

    ticket: int
    prob_sums_GE: Tensor
    squared_lse_sum: Tensor
    entropy_sum: Tensor
    logit_max: Tensor
    num_tokens: Tensor
    counts_AGE: Tensor
    num_tokens_G: Tensor
    sequence_of_group_G: Tensor | None
    num_sequences: int


def measure_forward(
    ticket: int,
    logits_TE: Tensor,
    score: ScoreName,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    counts_AGE: Tensor,
    num_tokens_G: Tensor,
    sequence_of_group_G: Tensor | None,
    num_sequences: int,
) -> MeasuredForward:
    """Form the sums of one layer over one microbatch."""
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    probs_TE = probs(logits_TE, score)
    entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
    squared_lse_T = logits_TE.logsumexp(dim=-1) ** 2
    max_T = logits_TE.amax(dim=-1) if len(logits_TE) else logits_TE.new_full((1,), -torch.inf)
    num_tokens = num_tokens_G.new_full((), len(logits_TE))
    if valid_mask_T is not None:
        probs_TE = probs_TE.masked_fill(~valid_mask_T[:, None], 0)
        entropy_T = entropy_T.masked_fill(~valid_mask_T, 0)
        squared_lse_T = squared_lse_T.masked_fill(~valid_mask_T, 0)
        max_T = max_T.masked_fill(~valid_mask_T, -torch.inf) if len(valid_mask_T) else max_T
        num_tokens = valid_mask_T.sum()
    return MeasuredForward(
        ticket=ticket,
        prob_sums_GE=sum_groups(probs_TE, group_ids_T, len(num_tokens_G)),
        squared_lse_sum=squared_lse_T.sum(),
        entropy_sum=entropy_T.sum(),
        logit_max=max_T.amax(),
        num_tokens=num_tokens,
        counts_AGE=counts_AGE,
        num_tokens_G=num_tokens_G,
        sequence_of_group_G=sequence_of_group_G,
        num_sequences=num_sequences,
    )


@dataclass(slots=True)
class StepNumbers:
    """What was measured of one layer over one step, all () on its device.

    Args:
        losses: unscaled loss of each objective.
        logit_max: largest logit.
        router_entropy: mean entropy of p in nats.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    logit_max: Tensor | None = None
    router_entropy: Tensor | None = None


def lay_down(
    objectives: Sequence[Objective],
    forwards: Sequence[MeasuredForward],
    read: Callable[[MeasuredForward], Reading],
    num_experts: int,
    ranks: TokenRanks,
) -> list[Tensor]:
    """This rank's part of what one layer's numbers are made of, float64, to be summed over ranks.

    Args:
        objectives: whose losses.
        forwards: the step's forwards of the layer; none if another rank ran it.
        read: what the losses of one of them see.
        num_experts: E.
        ranks: who holds which tokens.

    Returns:
        For each objective (2,) numerator and denominator; of one of step scope, which needs the final counts,
        (E + 1,) sums of p and of lse^2. Last (2,) entropy and tokens.
    """
    parts = []
    for objective in objectives:
        if objective.scope == "step":
            sums = [torch.cat([one.prob_sums_GE.sum(dim=0), one.squared_lse_sum[None]]) for one in forwards]
            parts.append((num_experts + 1, sums))
            continue
        # A numerator is linear in this rank's probabilities. A denominator is known to all ranks that share
        # the group alike, and one of them speaks.
        speaks = int(ranks.is_first_of_step if objective.reads_totals else ranks.is_first_of_sequence)
        pairs = [objective.measure(read(one), one.prob_sums_GE, one.squared_lse_sum) for one in forwards]
        parts.append((2, [torch.stack([a.double().sum(), b.double().sum() * speaks]) for a, b in pairs]))
    entropies = [torch.stack([one.entropy_sum.double(), one.num_tokens.double()]) for one in forwards]
    parts.append((2, entropies))
    return [
        torch.stack(values).double().sum(dim=0) if values else torch.zeros(size, dtype=torch.float64)
        for size, values in parts
    ]


def conclude(objectives: Sequence[Objective], sums: Sequence[Tensor], final: Reading) -> StepNumbers:
    """Losses and entropy of one layer.

    Args:
        objectives: whose losses.
        sums: what `lay_down` returned, summed over ranks.
        final: what a loss of step scope sees of the whole step, float64.
    """
    numbers = StepNumbers()
    for objective, values in zip(objectives, sums[:-1], strict=True):
        if objective.scope == "step":
            values = torch.stack(objective.measure(final, values[None, :-1], values[-1]))
        numbers.losses[objective.name] = _mean(values)
    numbers.router_entropy = _mean(sums[-1])
    return numbers


def _mean(pair: Tensor) -> Tensor:
    return pair[0] / torch.where(pair[1] > 0, pair[1], 1.0)


def largest_logits(layers: Sequence[Sequence[MeasuredForward]], ranks: TokenRanks) -> list[Tensor | None]:
    """() largest logit of each layer over all microbatches and ranks; None where nothing was measured."""
    if not any(layers):
        return [None] * len(layers)
    # Layers of one process may lie on several devices.
    device = next(one.logit_max.device for forwards in layers for one in forwards)
    nothing = torch.full((), -torch.inf, dtype=torch.float64, device=device)
    maxima = torch.stack(
        [
            torch.stack([nothing, *(one.logit_max.to(nothing) for one in forwards)]).amax()
            for forwards in layers
        ]
    )
    if ranks.tokens is not None:
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=ranks.tokens)
        return list(maxima.unbind())
    return [value if forwards else None for value, forwards in zip(maxima.unbind(), layers, strict=True)]

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


@dataclass(slots=True)
class _Sums:
    """Numerators and denominators of one layer, and its largest logit."""

    pairs: list[Tensor]
    logit_max: Tensor


def finish(
    objectives: Sequence[Objective],
    layers: Sequence[Sequence[MeasuredForward]],
    read: Callable[[int, MeasuredForward], Reading],
    read_step: Callable[[int], Reading],
    ranks: TokenRanks,
) -> list[StepNumbers]:
    """Losses, entropy and largest logit of each layer, over all microbatches and ranks.

    Args:
        objectives: whose losses.
        layers: the step's forwards of each layer; a layer that was not measured has none.
        read: (layer, forward) -> what the losses of that microbatch see.
        read_step: layer -> what a loss of step scope sees, with the final counts.
        ranks: one sum and one maximum over them, for all layers together.
    """
    sums = {
        i: _sum_layer(objectives, i, forwards, read, read_step, ranks)
        for i, forwards in enumerate(layers)
        if forwards
    }
    numbers = [StepNumbers() for _ in layers]
    if not sums:
        return numbers
    # Layers of one process may lie on several devices.
    device = next(iter(sums.values())).logit_max.device
    if ranks.tokens is not None:
        # A layer that this rank did not run may have run on others.
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        missing = _Sums([nothing] * (2 * len(objectives) + 2), nothing - torch.inf)
        sums = {layer: sums.get(layer, missing) for layer in range(len(layers))}
    flat = torch.stack([value.to(device) for layer in sums.values() for value in layer.pairs])
    maxima = torch.stack([layer.logit_max.to(device) for layer in sums.values()])
    if ranks.tokens is not None:
        dist.all_reduce(flat, group=ranks.tokens)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=ranks.tokens)
    names = [objective.name for objective in objectives]
    for place, (layer, values) in enumerate(zip(sums, flat.view(len(sums), -1, 2), strict=True)):
        means = (values[:, 0] / torch.where(values[:, 1] > 0, values[:, 1], 1.0)).unbind()
        numbers[layer] = StepNumbers(dict(zip(names, means, strict=False)), maxima[place], means[-1])
    return numbers


def _sum_layer(
    objectives: Sequence[Objective],
    layer: int,
    forwards: Sequence[MeasuredForward],
    read: Callable[[int, MeasuredForward], Reading],
    read_step: Callable[[int], Reading],
    ranks: TokenRanks,
) -> _Sums:
    """Numerator and denominator of each objective, then of the entropy, as this rank's part of the sum."""
    pairs: list[Tensor] = []
    squared_lse_sum = torch.stack([one.squared_lse_sum for one in forwards]).sum()
    for objective in objectives:
        if objective.scope == "step":
            prob_sums_E = torch.stack([one.prob_sums_GE.sum(dim=0) for one in forwards]).sum(dim=0)
            measured = [objective.measure(read_step(layer), prob_sums_E[None], squared_lse_sum)]
        else:
            measured = [
                objective.measure(read(layer, one), one.prob_sums_GE, one.squared_lse_sum) for one in forwards
            ]
        # A numerator is linear in this rank's probabilities. A denominator is known to all ranks that share
        # the group alike, and one of them speaks.
        speaks = ranks.is_first_of_step if objective.reads_totals else ranks.is_first_of_sequence
        pairs.append(torch.stack([numerator.double() for numerator, _ in measured]).sum())
        pairs.append(torch.stack([denominator.double() for _, denominator in measured]).sum() * int(speaks))
    pairs.append(torch.stack([one.entropy_sum.double() for one in forwards]).sum())
    pairs.append(torch.stack([one.num_tokens.double() for one in forwards]).sum())
    return _Sums(pairs, torch.stack([one.logit_max for one in forwards]).amax().double())

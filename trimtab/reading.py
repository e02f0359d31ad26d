"""Reading a ledger in backward: targets of all layers of one forward that are alike, formed at once.

Shapes: E experts, G finest groups, A count maps, L layers.

Backward of a microbatch reaches its last layer first, and by then all its layers are counted. So that layer's
read forms the targets of them all: the number of operators of any number of losses does not grow with L.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trimtab.counts import CountsMode, Reading, StepTotals
from trimtab.row import Row, batch_sizes, step_counts

if TYPE_CHECKING:
    from trimtab.ledger import Ledger

Targets = tuple[Tensor | None, Tensor | None]


class Groups(NamedTuple):
    """What the tokens of one microbatch are grouped in.

    Args:
        num_tokens_G: (G,) int64 valid tokens of each finest group.
        sequence_of_group_G: (G,) int64 sequence of each document; None if groups are sequences.
        num_sequences: B.
    """

    num_tokens_G: Tensor
    sequence_of_group_G: Tensor | None
    num_sequences: int


def layer_targets(
    ledger: "Ledger",
    places: Sequence[int],
    ticket: int,
    counts: Sequence[Tensor],
    groups: Groups,
    dtype: torch.dtype,
) -> dict[int, Targets]:
    """(G or 1, E) targets and () z-loss weight of layers that are alike, without objectives that read sums of p.

    Args:
        ledger: of the model.
        places: of the layers' rows.
        ticket: names the forward.
        counts: (A, G, E) int64 of each layer, of this rank's tokens.
        groups: of the microbatch.
        dtype: of the losses' arithmetic.

    Returns:
        By place; None where no objective has one. The gradient scale is in them.

    Raises:
        RuntimeError: the step does not run in the declared order.
    """
    ledger.check_order(ledger.rows[places[0]])
    reading = read_layers(ledger, places, ticket, counts, groups, dtype)
    targets: list[Tensor] = []
    weights: list[Tensor] = []
    for objective in ledger.objectives:
        if objective.needs_prob_sums:
            continue
        if (target := objective.targets(reading)) is not None:
            targets.append(target)
        if (weight := objective.z_weight(reading)) is not None:
            weights.append(weight)
    target_L: Sequence[Tensor | None] = [None] * len(places)
    weight_L: Sequence[Tensor | None] = [None] * len(places)
    if targets:
        target_L = _scaled(ledger, sum(targets[1:], targets[0])).unbind()
    if weights:
        weight_L = _scaled(ledger, sum(weights[1:], weights[0])).expand(len(places)).unbind()
    return dict(zip(places, zip(target_L, weight_L, strict=True), strict=True))


def prob_targets(
    ledger: "Ledger", place: int, ticket: int, counts_AGE: Tensor, groups: Groups, prob_sums_GE: Tensor
) -> Tensor:
    """(1, E) targets of one layer, of the objectives that read sums of p; their gradient scale is in them.

    Args:
        ledger: of the model.
        place: of the layer's row.
        ticket: names the forward.
        counts_AGE: (A, G, E) int64, of this rank's tokens.
        groups: of the microbatch.
        prob_sums_GE: (G, E) sums of p.
    """
    reading = read_layers(ledger, [place], ticket, [counts_AGE], groups, prob_sums_GE.dtype)
    reading = replace(reading, prob_sums_GE=prob_sums_GE[None])
    found = [o.targets(reading) for o in ledger.objectives if o.needs_prob_sums]
    targets = [target for target in found if target is not None]
    return _scaled(ledger, sum(targets[1:], targets[0]))[0]


def _scaled(ledger: "Ledger", values: Tensor) -> Tensor:
    """Values times what makes gradients come out as the trainer reduces them."""
    factor = ledger.reduction.factor
    if ledger.loss_scale is None:
        return values if factor == 1 else values * factor
    share = ledger.num_microbatches if ledger.reduction.microbatches == "mean" else 1
    return values * (ledger.loss_scale.to(values.device, values.dtype) * (factor * share))


def read_layers(
    ledger: "Ledger",
    places: Sequence[int],
    ticket: int,
    counts: Sequence[Tensor],
    groups: Groups,
    dtype: torch.dtype,
) -> Reading:
    """What losses see of layers that are alike; see `layer_targets` for the arguments."""
    rows = [ledger.rows[place] for place in places]
    forward = ledger.sums.forwards.get(ticket)
    counts = [ledger.sums.groups(ticket, *one) for one in zip(places, counts, strict=True)]
    totals = [total for place in places if (total := ledger.sums.totals(ticket, place)) is not None]
    all_ranks = None
    sizes = batch_sizes(*groups) if forward is None else forward.sizes.to(counts[0].device)
    if totals:
        sizes = torch.stack([sizes for _, sizes in totals])
        counts_LAE = torch.stack([counts_AE for counts_AE, _ in totals])
        all_ranks = counts_LAE.to(dtype), sizes[:, 0].to(dtype)

    def read_step(mode: CountsMode) -> tuple[Tensor, Tensor]:
        # A schedule may run one backward twice, for inputs and for weights: both read the same.
        known = {} if forward is None else forward.read
        if any((place, mode, dtype) not in known for place in places):
            counts_LAE, num_tokens_L = step_counts(rows, mode, ledger.num_microbatches, dtype)
            values = zip(counts_LAE.unbind(), num_tokens_L.unbind(), strict=True)
            known.update(zip([(place, mode, dtype) for place in places], values, strict=True))
            return counts_LAE, num_tokens_L
        read = [known[place, mode, dtype] for place in places]
        return torch.stack([counts_AE for counts_AE, _ in read]), torch.stack([tokens for _, tokens in read])

    return Reading(
        maps=rows[0].maps,
        counts_AGE=torch.stack(counts).to(dtype),
        num_tokens_G=groups.num_tokens_G.to(dtype),
        sequence_of_group_G=groups.sequence_of_group_G,
        num_sequences=groups.num_sequences,
        top_k=rows[0].top_k,
        totals=_totals(ledger, rows, sizes, dtype),
        step_counts=read_step,
        all_ranks=all_ranks,
    )


def _totals(ledger: "Ledger", rows: Sequence[Row], sizes: Tensor, dtype: torch.dtype) -> StepTotals:
    """Totals as declared, else those counted where counting is complete, else M times this microbatch's.

    Where counts are not summed over ranks, R times this rank's.
    """
    data_ranks = ledger.reduction.num_ranks // ledger.ranks.num_sequence_ranks
    are_of_all = ledger.sums.sums_totals or (ledger.numbers is not None and ledger.ranks.tokens is not None)
    share = 1 if are_of_all else data_ranks
    counted = [row.sizes for row in rows if row.sizes is not None]
    if ledger.plan.counts_are_complete and len(counted) == len(rows):
        sizes = torch.stack(counted) * share
    else:
        sizes = sizes * (ledger.num_microbatches * share)
    known = ledger.declared
    declared = (known.num_tokens, known.num_sequences, known.num_documents)
    tokens, sequences, documents = (
        count if total is None else count.new_full((), total)
        for total, count in zip(declared, sizes.to(dtype).unbind(-1), strict=True)
    )
    return StepTotals(tokens, sequences, documents, ledger.num_microbatches, data_ranks)

"""Reading a ledger in backward: targets of all layers of one forward that are alike, formed at once.

Shapes: E experts, G finest groups, A count maps, L layers.

Backward of a microbatch reaches its last layer first, and by then all its layers are counted. So that layer's
read forms the targets of them all: the number of operators of any number of losses does not grow with L.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.counts import CountsMode, Reading, StepCounts, StepTotals, TokenGroups, load_fraction, place_of
from trimtab.reduction import Forward
from trimtab.row import Row, shared, stack_layers, step_counts

if TYPE_CHECKING:
    from trimtab.ledger import Ledger

Targets = tuple[Tensor | None, Tensor | None]


class TotalsMemo:
    """Totals formed of sizes that are asked for again, as those of batches of one shape are.

    They are formed anew in another place, which knows nothing of what this one has finished.
    """

    _MOST = 4

    def __init__(self) -> None:
        self._formed: dict[Any, tuple[Tensor, StepTotals]] = {}

    def of(
        self,
        sizes: Tensor,
        times: int,
        dtype: torch.dtype,
        declared: Sequence[int | None],
        num_microbatches: int,
        num_data_ranks: int,
    ) -> StepTotals:
        """Totals of (3,) or (L, 3) int64 sizes times a number, or as declared."""
        place = place_of(sizes.device)
        key = (id(sizes), times, dtype, *declared, num_microbatches, num_data_ranks, place)
        kept, totals = self._formed.pop(key, (None, None))
        if totals is None or kept is not sizes:
            floats = (sizes if times == 1 else sizes * times).to(dtype)
            tokens, sequences, documents = (
                count if total is None else count.new_full((), total)
                for total, count in zip(declared, floats.unbind(-1), strict=True)
            )
            totals = StepTotals(tokens, sequences, documents, num_microbatches, num_data_ranks)
        if place is not None:
            # The sizes are kept, so that no other tensor is taken for them.
            self._formed[key] = sizes, totals
        for oldest in list(self._formed)[: -self._MOST]:
            self._formed.pop(oldest, None)
        return totals

    def forget_but(self, sizes: Tensor | None) -> None:
        """Keep those that a batch of the same shape asks for again in the next step."""
        self._formed = {key: found for key, found in self._formed.items() if found[0] is sizes}


def layer_targets(
    ledger: "Ledger",
    places: Sequence[int],
    ticket: int,
    counts: Sequence[Tensor],
    groups: TokenGroups,
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
    scale = _scale(ledger, reading.counts_AGE) if targets or weights else 1.0
    target_L: Sequence[Tensor | None] = [None] * len(places)
    weight_L: Sequence[Tensor | None] = [None] * len(places)
    if targets:
        target_L = _scaled(sum(targets[1:], targets[0]), scale).unbind()
    if weights:
        weight = _scaled(sum(weights[1:], weights[0]), scale)
        weight_L = weight.unbind() if weight.dim() else [weight] * len(places)
    return dict(zip(places, zip(target_L, weight_L, strict=True), strict=True))


def prob_targets(
    ledger: "Ledger", place: int, ticket: int, counts_AGE: Tensor, groups: TokenGroups, prob_sums_GE: Tensor
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
    return _scaled(sum(targets[1:], targets[0]), _scale(ledger, prob_sums_GE))[0]


def _scale(ledger: "Ledger", like: Tensor) -> Tensor | float:
    """What makes gradients come out as the trainer reduces them."""
    factor = ledger.reduction.factor
    if ledger.loss_scale is None:
        return factor
    share = ledger.num_microbatches if ledger.reduction.microbatches == "mean" else 1
    return _scaled(ledger.loss_scale.to(like.device, like.dtype), factor * share)


def _scaled(values: Tensor, scale: Tensor | float) -> Tensor:
    return values if isinstance(scale, (int, float)) and scale == 1 else values * scale


def read_layers(
    ledger: "Ledger",
    places: Sequence[int],
    ticket: int,
    counts: Sequence[Tensor],
    groups: TokenGroups,
    dtype: torch.dtype,
) -> Reading:
    """What losses see of layers that are alike; see `layer_targets` for the arguments."""
    rows = [ledger.rows[place] for place in places]
    forward = ledger.sums.forwards.get(ticket)
    counts_LAGE = ledger.sums.groups(ticket, places, counts)
    kept = None if forward is None else forward.groups
    if kept is not None and kept.num_tokens_G.device == counts_LAGE.device:
        groups = kept
    totals = [total for place in places if (total := ledger.sums.totals(ticket, place)) is not None]
    all_ranks = None
    sizes = groups.sizes if forward is None else forward.sizes.to(counts_LAGE.device)
    if totals:
        sizes = stack_layers([sizes for _, sizes in totals])
        counts_LAE = stack_layers([counts_AE for counts_AE, _ in totals])
        all_ranks = counts_LAE.to(dtype), sizes[:, 0].to(dtype)

    known: dict[CountsMode, StepCounts] = {}

    def read_step(mode: CountsMode) -> StepCounts:
        if mode not in known:
            known[mode] = _read_step(ledger, forward, places, mode, dtype)
        return known[mode]

    num_tokens_G, formed = groups.floats(dtype)
    return Reading(
        maps=rows[0].maps,
        counts_AGE=counts_LAGE.to(dtype),
        num_tokens_G=num_tokens_G,
        sequence_of_group_G=groups.sequence_of_group_G,
        num_sequences=groups.num_sequences,
        top_k=rows[0].top_k,
        totals=_totals(ledger, rows, sizes, dtype),
        step_counts=read_step,
        all_ranks=all_ranks,
        formed=formed,
    )


def _read_step(
    ledger: "Ledger",
    forward: Forward | None,
    places: Sequence[int],
    mode: CountsMode,
    dtype: torch.dtype,
) -> StepCounts:
    """The step's counts; a schedule may run one backward twice, for inputs and for weights: both read the same."""
    rows = [ledger.rows[place] for place in places]
    read = {} if forward is None else forward.read
    keys = [(place, mode, dtype) for place in places]
    if all(key in read for key in keys):
        found = [read[key] for key in keys]
        counts_LAE = torch.stack([counts_LAE[i] for counts_LAE, _, i in found])
        num_tokens_L = torch.stack([tokens_L.expand(len(c_LAE))[i] for c_LAE, tokens_L, i in found])
        load_LAE = load_fraction(counts_LAE, num_tokens_L[:, None], rows[0].top_k)
        return StepCounts(counts_LAE, num_tokens_L, load_LAE)
    counted = _counted(ledger, rows, dtype)
    made = step_counts(rows, mode, ledger.num_microbatches, dtype, counted)
    read.update({key: (made.counts_AE, made.num_tokens, i) for i, key in enumerate(keys)})
    return made


def _counted(ledger: "Ledger", rows: Sequence[Row], dtype: torch.dtype) -> StepTotals:
    """What the step has counted so far.

    Raises:
        RuntimeError: nothing was counted.
    """
    counted = [row.sizes for row in rows if row.sizes is not None]
    if len(counted) < len(rows):
        raise RuntimeError(
            f"{rows[0].name}: backward runs but no forward of this step was counted; call balancer.step() "
            "after the optimiser step, not between forward and backward"
        )
    return ledger.totals.of(_sizes(counted), 1, dtype, (None, None, None), ledger.num_microbatches, 1)


def _sizes(sizes: Sequence[Tensor]) -> Tensor:
    """(3,) sizes that all layers share, or (L, 3)."""
    one = shared(sizes)
    return stack_layers(sizes) if one is None else one


def _totals(ledger: "Ledger", rows: Sequence[Row], sizes: Tensor, dtype: torch.dtype) -> StepTotals:
    """Totals as declared, else those counted where counting is complete, else M times this microbatch's.

    Where counts are not summed over ranks, R times this rank's.
    """
    data_ranks = ledger.reduction.num_ranks // ledger.ranks.num_sequence_ranks
    are_of_all = ledger.sums.sums_totals or (ledger.numbers is not None and ledger.ranks.tokens is not None)
    share = 1 if are_of_all else data_ranks
    counted = [row.sizes for row in rows if row.sizes is not None]
    if ledger.plan.counts_are_complete and len(counted) == len(rows):
        sizes = _sizes(counted)
    else:
        share *= ledger.num_microbatches
    known = ledger.declared
    declared = (known.num_tokens, known.num_sequences, known.num_documents)
    return ledger.totals.of(sizes, share, dtype, declared, ledger.num_microbatches, data_ranks)

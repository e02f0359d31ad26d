"""One ledger row: the counts of one MoE layer over one optimiser step, and what it remembers of the last.

Rows of equal layers are added to and read together, so that the number of operators does not grow with L.

Shapes: E experts, G finest groups, A count maps, L layers, M microbatches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.bias import Statistic
from trimtab.counts import CountMap, CountsMode, StepCounts, StepTotals, inverse
from trimtab.measure import MeasuredForward
from trimtab.scores import ScoreName


def add_counts(rows: Sequence["Row"], counts_LAE: Tensor, sizes: Sequence[Tensor]) -> None:
    """Add one microbatch to several layers: counts, and valid tokens, sequences and documents.

    Args:
        rows: of layers with counts of one shape, all or none of which have counts already.
        counts_LAE: (L, A, E) int64.
        sizes: (3,) int64 of each; layers that ran the same microbatches share one tensor.
    """
    minima = maxima = sizes
    if rows[0].counts_AE is not None:
        counts_LAE = counts_LAE + _stacked([row.counts_AE for row in rows])
        minima = _each(torch.minimum, sizes, [row.sizes_min for row in rows])
        maxima = _each(torch.maximum, sizes, [row.sizes_max for row in rows])
        sizes = _each(torch.add, sizes, [row.sizes for row in rows])
    for row, *values in zip(rows, counts_LAE.unbind(), sizes, minima, maxima, strict=True):
        row.counts_AE, row.sizes, row.sizes_min, row.sizes_max = values
        row.num_counted += 1


def _each(
    combine: Callable[[Tensor, Tensor], Tensor], ones: Sequence[Tensor], others: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """What is made of each pair; once where all pairs are the same."""
    one, other = shared(ones), shared(others)
    if one is not None and other is not None:
        return [combine(one, other)] * len(ones)
    return combine(_stacked(ones), _stacked(others)).unbind()


def shared(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The one tensor that all are; None if they are several."""
    first = tensors[0]
    return first if all(tensor is first for tensor in tensors) else None


def alike(rows: Sequence["Row"], counts: Mapping[int, Tensor]) -> list[list[int]]:
    """Places of rows, in lists of those that can be added to and read together.

    Args:
        rows: of all layers.
        counts: counts of one forward by place, for those meant.
    """
    lists: dict[Any, list[int]] = {}
    for place, values in counts.items():
        row = rows[place]
        key = (
            values.shape,
            values.device,
            row.top_k,
            id(row.maps),
            row.num_counted,
            row.used_min_AE is None,
            row.prior_counts_AE is None,
            row.prior_num_microbatches,
        )
        lists.setdefault(key, []).append(place)
    return list(lists.values())


def step_counts(
    rows: Sequence["Row"],
    mode: CountsMode,
    num_microbatches: int,
    dtype: torch.dtype,
    counted: StepTotals,
) -> StepCounts:
    """(L, A, E) counts of a step of M microbatches, as far as ``mode`` knows them, and their load fractions.

    Also remembers the range of load fractions that was read; repeating it changes nothing.

    Args:
        rows: of layers with counts of one shape, that are alike in what they have counted.
        mode: where counts of microbatches that have not run come from.
        num_microbatches: M.
        dtype: of the results.
        counted: sizes so far, of all rows.
    """
    first = rows[0]
    counts_LAE = _stacked([row.counts_AE for row in rows]).to(dtype)
    num_tokens_L, slots = counted.num_tokens, counts_LAE.shape[-1] / first.top_k
    missing = num_microbatches - first.num_counted
    if first.prior_counts_AE is not None and (mode == "previous" or (mode == "prior" and missing > 0)):
        prior_LAE = _stacked([row.prior_counts_AE for row in rows]).to(counts_LAE)
        prior_L = _stacked([row.prior_num_tokens for row in rows]).to(num_tokens_L)
        if mode == "previous":
            counts_LAE, num_tokens_L = prior_LAE, prior_L
        else:
            share = missing / first.prior_num_microbatches
            counts_LAE, num_tokens_L = counts_LAE + prior_LAE * share, num_tokens_L + prior_L * share
        load_LAE = counts_LAE * (inverse(num_tokens_L) * slots)[:, None, None]
    else:
        load_LAE = counts_LAE * counted.weight("num_tokens", slots)
    _note_used(rows, load_LAE)
    return StepCounts(counts_LAE, num_tokens_L, load_LAE)


def _note_used(rows: Sequence["Row"], load_LAE: Tensor) -> None:
    minima = maxima = load_LAE.unbind()
    if all(row.used_min_AE is not None for row in rows):
        minima = torch.minimum(load_LAE, _stacked([row.used_min_AE for row in rows])).unbind()
        maxima = torch.maximum(load_LAE, _stacked([row.used_max_AE for row in rows])).unbind()
    for row, minimum_AE, maximum_AE in zip(rows, minima, maxima, strict=True):
        row.used_min_AE, row.used_max_AE = minimum_AE, maximum_AE


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    return stack_layers([tensor for tensor in tensors if tensor is not None])


def stack_layers(tensors: Sequence[Tensor]) -> Tensor:
    """(L, ...) of what each layer has; of one layer a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


@dataclass(slots=True)
class Row:
    """Counts of one MoE layer.

    Args:
        name: qualified module name of the router.
        num_experts: E.
        top_k: K.
        score: score function.
        maps: count maps that somebody reads; the first is always the executed assignments.
    """

    name: str
    num_experts: int
    top_k: int
    score: ScoreName
    maps: tuple[CountMap, ...]
    statistic: Statistic | None = None  # of the quantile rule
    counts_AE: Tensor | None = None
    sizes: Tensor | None = None  # (3,) int64: valid tokens, sequences and documents so far
    num_counted: int = 0  # microbatches in the counts
    num_forwards: int = 0  # microbatches whose training forward ran
    num_counting: int = 0  # microbatches whose counting forward ran
    sizes_min: Tensor | None = None  # of one microbatch
    sizes_max: Tensor | None = None
    prior_counts_AE: Tensor | None = None
    prior_num_tokens: Tensor | None = None
    prior_num_microbatches: int = 0
    used_min_AE: Tensor | None = None
    used_max_AE: Tensor | None = None
    measured: list[MeasuredForward] = field(default_factory=list)  # of a step that measures
    # (2,) zeros that carry gradients of losses which are returned, and the forwards they are of.
    terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def part(self) -> "Row":
        """An empty row of the same layer, for one forward that may be broken off."""
        statistic = None if self.statistic is None else Statistic(self.statistic.num_bins)
        return Row(self.name, self.num_experts, self.top_k, self.score, self.maps, statistic)

    def merge(self, part: "Row") -> None:
        """Add what a part has noted beside its counts."""
        self.num_forwards += part.num_forwards
        self.num_counting += part.num_counting
        self.measured += part.measured
        if self.statistic is not None and part.statistic is not None:
            self.statistic.merge(part.statistic)

    @property
    def num_tokens(self) -> Tensor | None:
        """() valid tokens so far."""
        return None if self.sizes is None else self.sizes[0]

    def state(self) -> dict[str, Any]:
        """What the next step needs of the last."""
        return {
            "maps": [repr(count_map) for count_map in self.maps],
            # Copies: they are views of what all layers have together.
            "prior_counts_AE": None if self.prior_counts_AE is None else self.prior_counts_AE.clone(),
            "prior_num_tokens": None if self.prior_num_tokens is None else self.prior_num_tokens.clone(),
            "prior_num_microbatches": self.prior_num_microbatches,
        }

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: the state is of other experts or of other counts.
        """
        counts_AE, maps = saved["prior_counts_AE"], [repr(count_map) for count_map in self.maps]
        num_experts = self.num_experts if counts_AE is None else counts_AE.shape[1]
        if saved["maps"] != maps or num_experts != self.num_experts:
            raise ValueError(
                f"{self.name}: the saved counts are of {num_experts} experts and {saved['maps']}, expected "
                f"{self.num_experts} and {maps}; the objectives or experts differ from the saved run"
            )
        self.prior_counts_AE, self.prior_num_tokens = counts_AE, saved["prior_num_tokens"]
        self.prior_num_microbatches = saved["prior_num_microbatches"]

    def close(self) -> None:
        """Turn this step's counts into the prior and start from zero."""
        if self.counts_AE is not None:
            self.prior_counts_AE, self.prior_num_tokens = self.counts_AE, self.num_tokens
            self.prior_num_microbatches = self.num_counted
        self.clear()

    def clear(self) -> None:
        """Start from zero."""
        self.counts_AE = self.sizes = self.sizes_min = self.sizes_max = None
        self.num_counted = self.num_forwards = self.num_counting = 0
        self.used_min_AE = self.used_max_AE = None
        self.measured, self.terms = [], []
        if self.statistic is not None:
            self.statistic.clear()


class ForwardsUnderWay:
    """Forwards of one model that run by turns; each counts in rows of its own until it ends.

    What is broken off is then not half counted, and nobody reads a microbatch whose layers are not all there.

    Args:
        rows: of all layers.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._parts: dict[int, dict[int, Row]] = {}

    def __contains__(self, ticket: int) -> bool:
        """Whether a forward has begun and not ended."""
        return ticket in self._parts

    def __getstate__(self) -> Any:
        """Copy before or after.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a model was copied inside balancer.interleaved(...); copy it before or after")

    def begin(self, ticket: int) -> None:
        """Begin a forward."""
        self._parts[ticket] = {}

    def end(self, ticket: int) -> None:
        """Add what a forward counted to the step; nothing if it has ended already."""
        for place, part in self._parts.pop(ticket, {}).items():
            self.rows[place].merge(part)

    def drop(self, ticket: int) -> None:
        """Forget what a forward counted; nothing if it has ended already."""
        self._parts.pop(ticket, None)

    def clear(self) -> None:
        """Forget all that have begun."""
        self._parts = {}

    def layers(self, ticket: int) -> frozenset[int]:
        """Layers that a forward has run."""
        return frozenset(self._parts.get(ticket, ()))

    def num_forwards(self, place: int) -> int:
        """Forwards that have run a layer and not ended."""
        return sum(place in layers for layers in self._parts.values())

    def row(self, ticket: int, place: int) -> Row:
        """Where a forward counts a layer.

        Raises:
            RuntimeError: no such forward, or it has run the layer already.
        """
        name, layers = self.rows[place].name, self._parts.get(ticket)
        if layers is None:
            raise RuntimeError(
                f"{name} ran inside balancer.interleaved(...) but in none of its microbatches, or in one that has "
                "ended, so it is not known whose tokens these are; call the layer as run(layer, ...)"
            )
        if place in layers:
            raise RuntimeError(
                f"{name} ran twice in one microbatch of balancer.interleaved(...), whose tokens would count twice; "
                "call each layer once with the run of each microbatch"
            )
        layers[place] = self.rows[place].part()
        return layers[place]

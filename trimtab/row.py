"""One ledger row: the counts of one MoE layer over one optimiser step, and what it remembers of the last.

Shapes: E experts, G finest groups, A count maps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.bias import Statistic
from trimtab.counts import CountMap, CountsMode, load_fraction
from trimtab.measure import MeasuredForward
from trimtab.scores import ScoreName


def batch_sizes(num_tokens_G: Tensor, sequence_of_group_G: Tensor | None, num_sequences: int) -> Tensor:
    """(3,) int64 valid tokens, and sequences and documents that have one."""
    documents_G = num_tokens_G > 0
    sequences_B = documents_G
    if sequence_of_group_G is not None:
        tokens_B = num_tokens_G.new_zeros(num_sequences)
        sequences_B = tokens_B.index_add_(0, sequence_of_group_G, num_tokens_G) > 0
    return torch.stack([num_tokens_G.sum().to(torch.int64), sequences_B.sum(), documents_G.sum()])


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

    def add(self, counts_AE: Tensor, sizes: Tensor) -> None:
        """Add one microbatch: its counts, and its valid tokens, sequences and documents."""
        if self.counts_AE is None or self.sizes is None:
            self.counts_AE, self.sizes = counts_AE, sizes
            self.sizes_min = self.sizes_max = sizes
        else:
            assert self.sizes_min is not None
            assert self.sizes_max is not None
            self.counts_AE = self.counts_AE + counts_AE
            self.sizes = self.sizes + sizes
            self.sizes_min = torch.minimum(self.sizes_min, sizes)
            self.sizes_max = torch.maximum(self.sizes_max, sizes)
        self.num_counted += 1

    def part(self) -> "Row":
        """An empty row of the same layer, for one forward that may be broken off."""
        statistic = None if self.statistic is None else Statistic(self.statistic.num_bins)
        return Row(self.name, self.num_experts, self.top_k, self.score, self.maps, statistic)

    def merge(self, part: "Row") -> None:
        """Add what a part has counted."""
        if part.counts_AE is not None and part.sizes is not None:
            self.add(part.counts_AE, part.sizes)
        self.num_forwards += part.num_forwards
        self.num_counting += part.num_counting
        self.measured += part.measured
        if self.statistic is not None and part.statistic is not None:
            self.statistic.merge(part.statistic)

    @property
    def num_tokens(self) -> Tensor | None:
        """() valid tokens so far."""
        return None if self.sizes is None else self.sizes[0]

    def load(self, counts_AE: Tensor, num_tokens: Tensor) -> Tensor:
        """(A, E) load fractions, to compare the counts that backward used with the final ones."""
        return load_fraction(counts_AE, num_tokens, self.top_k)

    def step_counts(
        self, mode: CountsMode, num_microbatches: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(A, E) counts and () valid tokens of a step of M microbatches, as far as ``mode`` knows them.

        Raises:
            RuntimeError: nothing was counted.
        """
        if self.counts_AE is None or self.num_tokens is None:
            raise RuntimeError(
                f"{self.name}: backward runs but no forward of this step was counted; call balancer.step() "
                "after the optimiser step, not between forward and backward"
            )
        missing = num_microbatches - self.num_counted
        prior_counts_AE, prior_num_tokens = self.prior_counts_AE, self.prior_num_tokens
        counts_AE, num_tokens = self.counts_AE.to(dtype), self.num_tokens.to(dtype)
        if prior_counts_AE is None or prior_num_tokens is None:
            return counts_AE, num_tokens
        prior_counts_AE, prior_num_tokens = prior_counts_AE.to(counts_AE), prior_num_tokens.to(num_tokens)
        if mode == "previous":
            return prior_counts_AE, prior_num_tokens
        if mode == "prior" and missing > 0:
            share = missing / self.prior_num_microbatches
            return counts_AE + prior_counts_AE * share, num_tokens + prior_num_tokens * share
        return counts_AE, num_tokens

    def note_used(self, load_AE: Tensor) -> None:
        """Remember the range of load fractions that backward used; repeating it changes nothing."""
        if self.used_min_AE is None or self.used_max_AE is None:
            self.used_min_AE = self.used_max_AE = load_AE
        else:
            self.used_min_AE = torch.minimum(self.used_min_AE, load_AE)
            self.used_max_AE = torch.maximum(self.used_max_AE, load_AE)

    def state(self) -> dict[str, Any]:
        """What the next step needs of the last."""
        return {
            "maps": [repr(count_map) for count_map in self.maps],
            "prior_counts_AE": self.prior_counts_AE,
            "prior_num_tokens": self.prior_num_tokens,
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
        self.measured = []
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

"""One ledger row: the counts of one MoE layer over one optimiser step, and what it remembers of the last.

Shapes: E experts, G finest groups, A count maps.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.bias import Statistic
from trimtab.counts import CountMap, load_fraction
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

    @property
    def num_tokens(self) -> Tensor | None:
        """() valid tokens so far."""
        return None if self.sizes is None else self.sizes[0]

    def load(self, counts_AE: Tensor, num_tokens: Tensor) -> Tensor:
        """(A, E) load fractions, to compare the counts that backward used with the final ones."""
        return load_fraction(counts_AE, num_tokens, self.top_k)

    def note_used(self, load_AE: Tensor) -> None:
        """Remember the range of load fractions that backward used; repeating it changes nothing."""
        if self.used_min_AE is None or self.used_max_AE is None:
            self.used_min_AE = self.used_max_AE = load_AE
        else:
            self.used_min_AE = torch.minimum(self.used_min_AE, load_AE)
            self.used_max_AE = torch.maximum(self.used_max_AE, load_AE)

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

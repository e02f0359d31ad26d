"""What is counted: maps from routing decisions to integers, and what a loss may read of them.

Shapes: T tokens, K top-k, E experts, G groups (the finest that any loss asks for: documents or
sequences), H groups of one loss (documents, sequences or one microbatch), A count maps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["sequence", "document"]
CountsMode = Literal["exact", "prior", "running", "previous"]


@dataclass(frozen=True, slots=True)
class ExecutedCounts:
    """Assignments that the router dispatched, with its bias, groups and replayed ids."""

    def __call__(
        self,
        ids_TK: Tensor,
        logits_TE: Tensor,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        num_groups: int,
    ) -> Tensor:
        """(G, E) int64 number of valid tokens' assignments to each expert."""
        return count_ids(ids_TK, logits_TE.shape[1], group_ids_T, valid_mask_T, num_groups)


@dataclass(frozen=True, slots=True)
class UnbiasedCounts:
    """Top-k of the raw scores, without selection bias or group limits.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 18. All score functions are increasing, so the top-k of
    the logits is the top-k of the scores.
    """

    def __call__(
        self,
        ids_TK: Tensor,
        logits_TE: Tensor,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        num_groups: int,
    ) -> Tensor:
        """(G, E) int64 number of valid tokens' top-k places of each expert."""
        plain_ids_TK = logits_TE.topk(ids_TK.shape[1], dim=1).indices
        return count_ids(plain_ids_TK, logits_TE.shape[1], group_ids_T, valid_mask_T, num_groups)


@dataclass(frozen=True, slots=True)
class DeviceCounts:
    """Tokens sent to each device at least once; every expert carries its device's count.

    Args:
        num_devices: D; experts lie on devices in contiguous equal blocks.
    """

    num_devices: int

    def __call__(
        self,
        ids_TK: Tensor,
        logits_TE: Tensor,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        num_groups: int,
    ) -> Tensor:
        """(G, E) int64 number of valid tokens that reach the device of each expert."""
        experts_per_device = logits_TE.shape[1] // self.num_devices
        device_TK = ids_TK // experts_per_device
        reached_TD = ids_TK.new_zeros(len(ids_TK), self.num_devices).scatter_(1, device_TK, 1)
        if valid_mask_T is not None:
            reached_TD = reached_TD * valid_mask_T[:, None]
        if group_ids_T is None:
            per_group = len(ids_TK) // max(num_groups, 1)
            sums_GD = reached_TD.view(num_groups, per_group, self.num_devices).sum(dim=1)
        else:
            sums_GD = ids_TK.new_zeros(num_groups, self.num_devices).index_add_(0, group_ids_T, reached_TD)
        return sums_GD.repeat_interleave(experts_per_device, dim=1)


CountMap = ExecutedCounts | UnbiasedCounts | DeviceCounts


def count_ids(
    ids_TK: Tensor, num_experts: int, group_ids_T: Tensor | None, valid_mask_T: Tensor | None, num_groups: int
) -> Tensor:
    """Integer assignment counts per group and expert.

    Args:
        ids_TK: (T, K) int64 expert of each assignment.
        num_experts: E.
        group_ids_T: (T,) int64 group of each token; None for G contiguous groups of T / G tokens.
        valid_mask_T: (T,) bool, True counts; None counts all.
        num_groups: G.

    Returns:
        (G, E) int64; sums to K times the number of valid tokens.
    """
    if valid_mask_T is None:
        ones_TK = torch.ones_like(ids_TK)
    else:
        ones_TK = valid_mask_T[:, None].to(torch.int64).expand_as(ids_TK)
    counts_GE = ids_TK.new_zeros(num_groups, num_experts)
    if group_ids_T is None:
        rows = (num_groups, ids_TK.numel() // max(num_groups, 1))
        return counts_GE.scatter_add_(1, ids_TK.reshape(rows), ones_TK.reshape(rows))
    index_TK = torch.add(ids_TK, group_ids_T[:, None], alpha=num_experts)
    counts_GE.view(-1).scatter_add_(0, index_TK.reshape(-1), ones_TK.reshape(-1))
    return counts_GE


def sum_groups(values_TE: Tensor, group_ids_T: Tensor | None, num_groups: int) -> Tensor:
    """Sum (T, E) values over the tokens of each group; float16 and bfloat16 are summed in float32.

    Args:
        values_TE: (T, E) values, rows of tokens that do not count already zero.
        group_ids_T: (T,) int64 group of each token; None for contiguous equal groups.
        num_groups: G.

    Returns:
        (G, E) sums.
    """
    if values_TE.dtype in (torch.float16, torch.bfloat16):
        values_TE = values_TE.float()
    if group_ids_T is None:
        per_group = values_TE.shape[0] // max(num_groups, 1)
        return values_TE.view(num_groups, per_group, values_TE.shape[1]).sum(dim=1)
    return values_TE.new_zeros(num_groups, values_TE.shape[1]).index_add_(0, group_ids_T, values_TE)


def load_fraction(counts_HE: Tensor, num_tokens_H: Tensor, slots_per_token: float) -> Tensor:
    """Load fraction f = E / (K n) * c, mean 1 over experts.

    Args:
        counts_HE: (H, E) counts. No gradient.
        num_tokens_H: (H,) valid tokens n of each group; a group without tokens gets f = 0.
        slots_per_token: K, or what else the counts of one token sum to.

    Returns:
        (H, E) in the dtype of ``num_tokens_H``.

    Source: DeepSeek-V2, arXiv:2405.04434, eq. 24; 1 at balance whatever K.
    """
    scale_H = counts_HE.shape[-1] / (slots_per_token * num_tokens_H.clamp(min=1))
    return counts_HE * scale_H.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Normalisers of the step's reference objective, each () or (L,) for several layers.

    Args:
        num_tokens: valid tokens of the step, all microbatches and ranks.
        num_sequences: sequences with at least one valid token.
        num_documents: documents with at least one valid token.
        num_microbatches: M.
        num_data_ranks: ranks that have microbatches of their own.
    """

    num_tokens: Tensor
    num_sequences: Tensor
    num_documents: Tensor
    num_microbatches: int
    num_data_ranks: int = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """What the losses of layers see of one microbatch and of the step around it.

    Layers of equal shape are read together: what is of a layer then has an axis L in front, and what losses
    make of it too. Written with trailing axes alone, a loss serves both.

    Args:
        maps: the count maps, in the order of ``counts_AGE``.
        counts_AGE: (A, G, E) or (L, A, G, E) float counts of this microbatch.
        num_tokens_G: (G,) float valid tokens per finest group, the same for all layers.
        sequence_of_group_G: (G,) int64 sequence of each document; None if the groups are sequences.
        num_sequences: B, rows of the microbatch.
        top_k: K.
        totals: normalisers of the step.
        step_counts: late-bound counts of the step, ``mode -> (counts_AE, num_tokens)``.
        prob_sums_GE: (G, E) sums of p over each group's valid tokens, where a loss asked for them.
        all_ranks: (A, E) float counts and () float valid tokens of this microbatch on all ranks together;
            None where this rank has all of it.
    """

    maps: tuple[CountMap, ...]
    counts_AGE: Tensor
    num_tokens_G: Tensor
    sequence_of_group_G: Tensor | None
    num_sequences: int
    top_k: int
    totals: StepTotals
    step_counts: Callable[[CountsMode], tuple[Tensor, Tensor]]
    prob_sums_GE: Tensor | None = None
    all_ranks: tuple[Tensor, Tensor] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts_AGE.shape[-1]

    def grouped(self, count_map: CountMap, unit: Unit) -> tuple[Tensor, Tensor]:
        """Counts (..., H, E) and valid tokens (H,) per sequence or per document."""
        counts_GE = self.counts_AGE.select(-3, self.maps.index(count_map))
        return self.merge(counts_GE, unit), self.tokens(unit)

    def tokens(self, unit: Unit) -> Tensor:
        """(H,) valid tokens per sequence or per document."""
        return self.merge(self.num_tokens_G[:, None], unit)[:, 0]

    def microbatch(self, count_map: CountMap, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """Counts (..., E) and valid tokens (...) of the microbatch on all ranks, or of one data rank's own."""
        place = self.maps.index(count_map)
        if self.all_ranks is None or local:
            return self.counts_AGE.select(-3, place).sum(dim=-2), self.num_tokens_G.sum()
        counts_AE, num_tokens = self.all_ranks
        return counts_AE.select(-2, place), num_tokens

    def step(self, count_map: CountMap, mode: CountsMode) -> tuple[Tensor, Tensor]:
        """Counts (..., E) and valid tokens (...) of the step, as far as ``mode`` knows them."""
        counts_AE, num_tokens = self.step_counts(mode)
        return counts_AE.select(-2, self.maps.index(count_map)), num_tokens

    def merge(self, values_GE: Tensor, unit: Unit) -> Tensor:
        """(..., H, E) sums of (..., G, E) values of the finest groups over the groups of ``unit``."""
        if unit == "document" or self.sequence_of_group_G is None:
            return values_GE
        out = values_GE.new_zeros(*values_GE.shape[:-2], self.num_sequences, values_GE.shape[-1])
        return out.index_add_(-2, self.sequence_of_group_G, values_GE)

    def spread(self, values_HE: Tensor, unit: Unit) -> Tensor:
        """Repeat values of the groups of ``unit`` on the finest groups; the adjoint of `merge`."""
        if unit == "document" or self.sequence_of_group_G is None:
            return values_HE
        return values_HE.index_select(-2, self.sequence_of_group_G)

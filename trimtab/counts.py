"""What is counted: maps from routing decisions to integers, and what a loss may read of them.

Shapes: T tokens, K top-k, E experts, G groups (the finest that any loss asks for: documents or
sequences), H groups of one loss (documents, sequences or one microbatch), A count maps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

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
    counts_GE = ids_TK.new_zeros(num_groups, num_experts)
    if group_ids_T is None:
        places = ids_TK.reshape(num_groups, ids_TK.numel() // max(num_groups, 1))
        into = counts_GE
    else:
        places = torch.add(ids_TK, group_ids_T[:, None], alpha=num_experts).reshape(-1)
        into = counts_GE.view(-1)
    if valid_mask_T is None:
        ones = torch.ones_like(places, dtype=counts_GE.dtype)
    else:
        ones = valid_mask_T[:, None].to(counts_GE.dtype).expand_as(ids_TK).reshape(places.shape)
    into.scatter_add_(-1, places, ones)
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
    scale_H = inverse(num_tokens_H) * (counts_HE.shape[-1] / slots_per_token)
    return counts_HE * scale_H.unsqueeze(-1)


def inverse(numbers: Tensor) -> Tensor:
    """1 / n in the dtype of n; 1 where n is 0, and whatever it multiplies is 0."""
    return numbers.clamp(min=1).reciprocal()


def batch_sizes(num_tokens_G: Tensor, sequence_of_group_G: Tensor | None, num_sequences: int) -> Tensor:
    """(3,) int64 valid tokens, and sequences and documents that have one."""
    documents = sequences = (num_tokens_G > 0).sum()
    if sequence_of_group_G is not None:
        tokens_B = num_tokens_G.new_zeros(num_sequences)
        sequences = (tokens_B.index_add_(0, sequence_of_group_G, num_tokens_G) > 0).sum()
    return torch.stack([num_tokens_G.sum(), sequences, documents])


def place_of(device: torch.device) -> Any:
    """Where tensors are of use again that were made now: on a device, and of a CUDA device on its current stream.

    None while a CUDA graph is recorded, whose memory is its own.
    """
    if device.type != "cuda":
        return device
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device)


class TokenGroups:
    """The finest groups of one microbatch's tokens, and what follows from them alone, each formed once.

    Args:
        num_tokens_G: (G,) int64 valid tokens of each group.
        sequence_of_group_G: (G,) int64 sequence of each document; None if groups are sequences.
        num_sequences: B.
    """

    def __init__(
        self, num_tokens_G: Tensor, sequence_of_group_G: Tensor | None = None, num_sequences: int = 0
    ) -> None:
        self.num_tokens_G = num_tokens_G
        self.sequence_of_group_G = sequence_of_group_G
        self.num_sequences = num_sequences
        self._floats: dict[Any, tuple[Tensor, dict[Any, Any]]] = {}

    def are(self, other: "TokenGroups") -> bool:
        """Whether both are made of the same tensors, and not only of equal ones."""
        return (
            self.num_tokens_G is other.num_tokens_G
            and self.sequence_of_group_G is other.sequence_of_group_G
            and self.num_sequences == other.num_sequences
        )

    @cached_property
    def sizes(self) -> Tensor:
        """(3,) int64 valid tokens, and sequences and documents that have one."""
        return batch_sizes(self.num_tokens_G, self.sequence_of_group_G, self.num_sequences)

    def floats(self, dtype: torch.dtype) -> tuple[Tensor, dict[Any, Any]]:
        """(G,) valid tokens in a floating dtype, and what `Reading.formed` holds of them."""
        key = dtype, place_of(self.num_tokens_G.device)
        if key not in self._floats:
            self._floats[key] = self.num_tokens_G.to(dtype), {}
        found = self._floats[key]
        _bound(found[1])
        return found


class StepCounts(NamedTuple):
    """What is known of the step's counts when backward reads them; ... is nothing, or L layers.

    Args:
        counts_AE: (..., A, E) float counts.
        num_tokens: (...) or () float valid tokens.
        load_AE: (..., A, E) load fractions of the counts, with K slots per token.
    """

    counts_AE: Tensor
    num_tokens: Tensor
    load_AE: Tensor


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
    _inverses: dict[tuple[str, float], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def inverse(self, name: str, coef: float = 1.0) -> Tensor:
        """coef / total of one of the fields; coef where it is 0."""
        key = (name, coef)
        if key not in self._inverses:
            _bound(self._inverses)
            self._inverses[key] = inverse(getattr(self, name)) if coef == 1 else self.inverse(name) * coef
        return self._inverses[key]

    def weight(self, name: str, coef: float) -> Tensor:
        """`inverse` as () or (L, 1, 1), which fit (..., G, E)."""
        weight = self.inverse(name, coef)
        return weight[:, None, None] if weight.dim() else weight


@dataclass(frozen=True, slots=True)
class Reading:
    """What the losses of layers see of one microbatch and of the step around it.

    Layers of equal shape are read together: what is of a layer then has an axis L in front, and what losses
    make of it too. Written with trailing axes alone, a loss serves both.

    Its tensors, and those of its totals, may be shared by readings of later microbatches: never write to them.

    Args:
        maps: the count maps, in the order of ``counts_AGE``.
        counts_AGE: (A, G, E) or (L, A, G, E) float counts of this microbatch.
        num_tokens_G: (G,) float valid tokens per finest group, the same for all layers.
        sequence_of_group_G: (G,) int64 sequence of each document; None if the groups are sequences.
        num_sequences: B, rows of the microbatch.
        top_k: K.
        totals: normalisers of the step.
        step_counts: late-bound counts of the step.
        prob_sums_GE: (G, E) sums of p over each group's valid tokens, where a loss asked for them.
        all_ranks: (A, E) float counts and () float valid tokens of this microbatch on all ranks together;
            None where this rank has all of it.
        formed: what follows from the groups alone; readings of one batch after the other may share it.
    """

    maps: tuple[CountMap, ...]
    counts_AGE: Tensor
    num_tokens_G: Tensor
    sequence_of_group_G: Tensor | None
    num_sequences: int
    top_k: int
    totals: StepTotals
    step_counts: Callable[[CountsMode], StepCounts]
    prob_sums_GE: Tensor | None = None
    all_ranks: tuple[Tensor, Tensor] | None = None
    formed: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    _loads: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        if unit == "document" or self.sequence_of_group_G is None:
            return self.num_tokens_G
        return self._once("tokens", lambda: self.merge(self.num_tokens_G[:, None], unit)[:, 0])

    def inverse_tokens(self, unit: Unit, coef: float = 1.0) -> Tensor:
        """(H, 1) coef / valid tokens per sequence or per document; coef where there are none."""
        if coef == 1:
            return self._once(("inverse", self._finest(unit)), lambda: inverse(self.tokens(unit))[:, None])
        key = ("inverse", self._finest(unit), coef)
        return self._once(key, lambda: self.inverse_tokens(unit) * coef)

    def mean_weight(self, unit: Unit, total: str, coef: float) -> Tensor:
        """(..., H, 1) coef / (n_h N), N one of `StepTotals`: weight of a token in the mean of groups' means."""
        key = ("mean", self._finest(unit), total, coef)
        totals, weight_H1 = self.formed.get(key, (None, None))
        if weight_H1 is None or totals is not self.totals:
            weight_H1 = self.inverse_tokens(unit) * self.totals.weight(total, coef)
            self.formed[key] = self.totals, weight_H1
        return weight_H1

    def load(self, count_map: CountMap, unit: Unit, slots_per_token: float | None = None) -> Tensor:
        """(..., H, E) `load_fraction` of each sequence or document, with K slots per token or others."""
        slots = self.top_k if slots_per_token is None else slots_per_token
        key = (count_map, self._finest(unit), slots)
        if key not in self._loads:
            counts_HE, _ = self.grouped(count_map, unit)
            self._loads[key] = counts_HE * self.inverse_tokens(unit, self.num_experts / slots)
        return self._loads[key]

    def microbatch(self, count_map: CountMap, *, local: bool = False) -> tuple[Tensor, Tensor]:
        """Counts (..., E) and valid tokens (...) of the microbatch on all ranks, or of one data rank's own."""
        place = self.maps.index(count_map)
        if self.all_ranks is None or local:
            return self.counts_AGE.select(-3, place).sum(dim=-2), self.num_tokens_G.sum()
        counts_AE, num_tokens = self.all_ranks
        return counts_AE.select(-2, place), num_tokens

    def microbatch_load(
        self, count_map: CountMap, coef: float, *, local: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Load fraction (..., 1, E), with K slots per token, and coef / n, n valid tokens, of the microbatch.

        The second is () or (L, 1, 1).
        """
        place, slots = self.maps.index(count_map), self.num_experts / self.top_k
        if self.all_ranks is not None and not local:
            counts_AE, num_tokens = self.all_ranks
            inverse_tokens = inverse(num_tokens)
            if inverse_tokens.dim():
                inverse_tokens = inverse_tokens[:, None, None]
            return counts_AE.narrow(-2, place, 1) * (inverse_tokens * slots), inverse_tokens * coef
        inverse_tokens = self._once("inverse_num_tokens", lambda: inverse(self.num_tokens_G.sum()))
        scale = self._once(("load", slots), lambda: inverse_tokens * slots)
        weight = self._once(("inverse_num_tokens", coef), lambda: inverse_tokens * coef)
        return self.counts_AGE.select(-3, place).sum(dim=-2, keepdim=True) * scale, weight

    def step(self, count_map: CountMap, mode: CountsMode) -> tuple[Tensor, Tensor]:
        """Counts (..., E) and valid tokens (...) of the step, as far as ``mode`` knows them."""
        known = self.step_counts(mode)
        return known.counts_AE.select(-2, self.maps.index(count_map)), known.num_tokens

    def step_load(self, count_map: CountMap, mode: CountsMode) -> Tensor:
        """Load fraction (..., 1, E) of the step, with K slots per token, as far as ``mode`` knows it."""
        return self.step_counts(mode).load_AE.narrow(-2, self.maps.index(count_map), 1)

    def _finest(self, unit: Unit) -> Unit:
        return "document" if self.sequence_of_group_G is None else unit

    def _once(self, key: Any, form: Callable[[], Tensor]) -> Tensor:
        """What follows from the groups alone."""
        if key not in self.formed:
            self.formed[key] = form()
        values: Tensor = self.formed[key]
        return values

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


def _bound(formed: dict[Any, Any]) -> None:
    """Forget all if coefficients that change from step to step have left too much behind."""
    if len(formed) > 64:
        formed.clear()

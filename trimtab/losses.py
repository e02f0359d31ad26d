"""Balance objectives: one formula, several scopes.

Shapes: T tokens, E experts, K top-k, G finest groups, H groups of one loss, D devices.

With the load fraction f held constant, every balance loss is linear in the router probabilities,

    L = sum_t sum_e target_te p_te,       dL/dp_te = target_te,

so an objective is fully described by its ``targets``: coef times weight times f, per group and expert.
Targets of all objectives are added before one pass over the tokens. Each class states its own scope,
normaliser and source.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.counts import (
    CountMap,
    CountsMode,
    DeviceCounts,
    ExecutedCounts,
    Reading,
    UnbiasedCounts,
    Unit,
    load_fraction,
)
from trimtab.scale import Accumulation

Assignments = Literal["executed", "unbiased"]
Weighting = Literal["sequence", "token"]


class Objective(ABC):
    """One term of the reference objective, for every MoE layer.

    Subclasses hold a frozen ``Config`` whose ``build()`` returns them, and override what applies: a
    balance loss overrides `targets`, z-loss overrides `z_weight`.
    """

    name: ClassVar[str]
    scope: ClassVar[str]
    needs_prob_sums: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ABC):
        """What every objective has.

        Args:
            coef: coefficient in the step's objective, dimensionless, not negative.
        """

        coef: float

        def __post_init__(self) -> None:
            """Validate."""
            if not 0 <= self.coef < float("inf"):
                raise ValueError(f"coef={self.coef} must be a finite number, at least 0")

        @abstractmethod
        def build(self) -> "Objective":
            """Return the objective."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.coef = config.coef

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """The count maps this objective reads."""
        return ()

    @property
    def unit(self) -> Unit | None:
        """The groups this objective needs to tell apart within a microbatch."""
        return None

    @property
    def totals(self) -> tuple[str, ...]:
        """The totals of the step that normalise it, as named in `StepTotals`."""
        return ()

    def check(self, num_experts: int, top_k: int, accumulation: Accumulation) -> None:
        """Raise a ValueError if this objective cannot be had on such a router and step."""

    def targets(self, reading: Reading) -> Tensor | None:
        """(G or 1, E) gradient of ``coef`` times the loss with respect to p; None if there is none."""
        return None

    def z_weight(self, reading: Reading) -> Tensor | None:
        """() gradient of ``coef`` times the loss with respect to sum_t lse_t^2; None if there is none."""
        return None

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the unscaled loss, each a sum over the microbatches of a step.

        Args:
            reading: the microbatch; for step scope the whole step, once, with its final counts.
            prob_sums_GE: (G, E) sums of p over valid tokens of each group.
            squared_lse_sum: () sum of lse^2 over valid tokens.
        """
        raise NotImplementedError


def _assignment_map(assignments: Assignments) -> CountMap:
    if assignments not in ("executed", "unbiased"):
        raise ValueError(
            f"assignments={assignments!r} must be 'executed' (what the router dispatched) or "
            "'unbiased' (top-k of the raw scores)"
        )
    return ExecutedCounts() if assignments == "executed" else UnbiasedCounts()


class SequenceWise(Objective):
    """Sequence-wise balance loss: sum_e f_ge P_ge of each sequence or document g, averaged over the step.

        f_ge = E / (K n_g) c_ge,   P_ge = (1 / n_g) sum_{t in g} p_te,   1.0 at balance

    Gradient with respect to p of a token of group g: coef * f_g / (B n_g) with ``weighting="sequence"``
    and B the groups of the step that have a valid token, coef * f_g / N with ``weighting="token"`` and N
    the step's valid tokens. f carries no gradient.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20 (``assignments="unbiased"`` there); DeepSeek-V2,
        arXiv:2405.04434, eq. 23-25.
    """

    name: ClassVar[str] = "sequence_wise"
    scope: ClassVar[str] = "sequence"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Objective.Config):
        """Settings of the sequence-wise loss.

        Args:
            unit: "sequence" (each row of the batch) or "document" (each document of packed rows, from
                ``cu_seqlens`` or restarting ``position_ids``).
            weighting: "sequence" averages over groups, "token" weighs each group by its valid tokens.
            assignments: what f counts, "executed" or "unbiased".

        Raises:
            ValueError: negative coefficient or unknown word.
        """

        unit: Unit = "sequence"
        weighting: Weighting = "sequence"
        assignments: Assignments = "executed"

        def __post_init__(self) -> None:
            """Validate."""
            Objective.Config.__post_init__(self)
            _assignment_map(self.assignments)
            if self.unit not in ("sequence", "document"):
                raise ValueError(f"unit={self.unit!r} must be 'sequence' or 'document'")
            if self.weighting not in ("sequence", "token"):
                raise ValueError(f"weighting={self.weighting!r} must be 'sequence' or 'token'")

        def build(self) -> "SequenceWise":
            """Return the objective."""
            return SequenceWise(self)

    config: Config

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """The map that f counts."""
        return (_assignment_map(self.config.assignments),)

    @property
    def unit(self) -> Unit:
        """Sequences or documents."""
        return self.config.unit

    @property
    def totals(self) -> tuple[str, ...]:
        """Tokens, or groups of the unit."""
        if self.config.weighting == "token":
            return ("num_tokens",)
        return ("num_sequences" if self.config.unit == "sequence" else "num_documents",)

    def load(self, reading: Reading) -> Tensor:
        """(H, E) load fraction that multiplies P."""
        counts_HE, num_tokens_H = reading.grouped(self.maps[0], self.config.unit)
        return load_fraction(counts_HE, num_tokens_H, reading.top_k)

    def targets(self, reading: Reading) -> Tensor:
        """(G, E): coef * f_g / (B n_g), or coef * f_g / N."""
        totals = reading.totals
        num_tokens_H = reading.merge(reading.num_tokens_G, self.config.unit)
        if self.config.weighting == "token":
            weight_H = (num_tokens_H > 0) / totals.num_tokens.clamp(min=1)
        else:
            num_groups = getattr(totals, self.totals[0])
            weight_H = (num_tokens_H > 0) / (num_groups.clamp(min=1) * num_tokens_H.clamp(min=1))
        return reading.spread(self.coef * weight_H[:, None] * self.load(reading), self.config.unit)

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum over groups of their losses, and their number (or their tokens)."""
        num_tokens_H = reading.merge(reading.num_tokens_G, self.config.unit)
        mean_probs_HE = reading.merge(prob_sums_GE, self.config.unit) / num_tokens_H.clamp(min=1)[:, None]
        loss_H = (self.load(reading) * mean_probs_HE).sum(dim=1)
        weight_H = num_tokens_H if self.config.weighting == "token" else (num_tokens_H > 0).to(loss_H.dtype)
        return (loss_H * weight_H).sum(), weight_H.sum()


class DeviceLevel(SequenceWise):
    """Device-level balance loss of DeepSeek-V2: sum_d f'_d P'_d of each sequence, averaged over the step.

        f'_d = mean of f_e over the experts of device d,   P'_d = sum of P_e over them,   1.0 at balance

    It is the sequence-wise loss with f replaced by its mean over each device's experts.

    Source: DeepSeek-V2, arXiv:2405.04434, eq. 26-28.
    """

    name: ClassVar[str] = "device_level"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(SequenceWise.Config):
        """Settings of the device-level loss, beside those of `SequenceWise`.

        Args:
            num_devices: D; experts lie on devices in contiguous equal blocks.

        Raises:
            ValueError: fewer than one device.
        """

        num_devices: int

        def __post_init__(self) -> None:
            """Validate."""
            SequenceWise.Config.__post_init__(self)
            if self.num_devices < 1:
                raise ValueError(f"num_devices={self.num_devices} must be at least 1")

        def build(self) -> "DeviceLevel":
            """Return the objective."""
            return DeviceLevel(self)

    config: Config

    def check(self, num_experts: int, top_k: int, accumulation: Accumulation) -> None:
        """Devices must divide the experts."""
        if num_experts % self.config.num_devices:
            raise ValueError(
                f"num_devices={self.config.num_devices} must divide num_experts={num_experts}; "
                f"choose a divisor of {num_experts}"
            )

    def load(self, reading: Reading) -> Tensor:
        """(H, E) mean load fraction of each expert's device."""
        load_HE = SequenceWise.load(self, reading)
        load_HDe = load_HE.unflatten(1, (self.config.num_devices, -1))
        return load_HDe.mean(dim=2, keepdim=True).expand_as(load_HDe).flatten(1)


class CommunicationLevel(DeviceLevel):
    """Communication balance loss of DeepSeek-V2: sum_d f''_d P''_d of each sequence, averaged over the step.

        f''_d = D / (m n) * (tokens sent to device d),   P''_d = sum of P_e over its experts

    m is the number of devices a token may reach, so 1.0 when every token reaches m devices evenly.

    Source: DeepSeek-V2, arXiv:2405.04434, eq. 29-31.
    """

    name: ClassVar[str] = "communication_level"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(DeviceLevel.Config):
        """Settings of the communication-level loss, beside those of `DeviceLevel`.

        Args:
            max_devices_per_token: m, the device limit of the router.

        Raises:
            ValueError: m outside 1..num_devices, or unbiased assignments, which are never sent.
        """

        max_devices_per_token: int

        def __post_init__(self) -> None:
            """Validate."""
            DeviceLevel.Config.__post_init__(self)
            if not 1 <= self.max_devices_per_token <= self.num_devices:
                raise ValueError(
                    f"max_devices_per_token={self.max_devices_per_token} must be in "
                    f"[1, num_devices={self.num_devices}]"
                )
            if self.assignments != "executed":
                raise ValueError(
                    f"assignments={self.assignments!r}: communication is what the router executed; "
                    "leave it 'executed'"
                )

        def build(self) -> "CommunicationLevel":
            """Return the objective."""
            return CommunicationLevel(self)

    config: Config

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """Tokens per device."""
        return (DeviceCounts(self.config.num_devices),)

    def load(self, reading: Reading) -> Tensor:
        """(H, E) f'' of each expert's device."""
        counts_HE, num_tokens_H = reading.grouped(self.maps[0], self.config.unit)
        # A device's count stands at each of its experts, so slots are counted per expert too.
        slots = self.config.max_devices_per_token * reading.num_experts / self.config.num_devices
        return load_fraction(counts_HE, num_tokens_H, slots)


class BatchWise(Objective):
    """Batch-wise balance loss: sum_e f_e P_e over the tokens of one forward, averaged over microbatches.

    Gradient with respect to p: coef * f / (M n), n the microbatch's valid tokens. f carries no gradient.
    1.0 at balance.

    Source: DeepSeek-V3, arXiv:2412.19437, section 4.5.3 (batch-wise auxiliary loss); Fedus et al. 2021,
        arXiv:2101.03961, eq. 4-6 with f divided by K.
    """

    name: ClassVar[str] = "batch_wise"
    scope: ClassVar[str] = "microbatch"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Objective.Config):
        """Settings of the batch-wise loss.

        Args:
            assignments: what f counts, "executed" or "unbiased".
            average_microbatches: accept that with gradient accumulation each microbatch is balanced on
                its own and the losses are averaged, which is not balance over the batch.

        Raises:
            ValueError: negative coefficient or unknown word.
        """

        assignments: Assignments = "executed"
        average_microbatches: bool = False

        def __post_init__(self) -> None:
            """Validate."""
            Objective.Config.__post_init__(self)
            _assignment_map(self.assignments)

        def build(self) -> "BatchWise":
            """Return the objective."""
            return BatchWise(self)

    config: Config

    def check(self, num_experts: int, top_k: int, accumulation: Accumulation) -> None:
        """Refuse accumulation unless the user says that the mean over microbatches is meant."""
        num_microbatches = accumulation.num_microbatches
        if num_microbatches > 1 and not self.config.average_microbatches:
            raise ValueError(
                f"BatchWise with num_microbatches={num_microbatches} balances each microbatch on its own, "
                "not the batch; use GlobalBatch (counts over the whole step) or SequenceWise (counts per "
                "sequence), or set average_microbatches=True if the mean of microbatch losses is meant"
            )

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """The map that f counts."""
        return (_assignment_map(self.config.assignments),)

    def targets(self, reading: Reading) -> Tensor:
        """(1, E): coef * f / (M n)."""
        counts_E, num_tokens = reading.microbatch(self.maps[0])
        load_E = load_fraction(counts_E, num_tokens, reading.top_k)
        return (self.coef * load_E / (reading.totals.num_microbatches * num_tokens.clamp(min=1)))[None]

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The microbatch's loss, and 1."""
        counts_E, num_tokens = reading.microbatch(self.maps[0])
        load_E = load_fraction(counts_E, num_tokens, reading.top_k)
        loss = (load_E * prob_sums_GE.sum(dim=0)).sum() / num_tokens.clamp(min=1)
        return loss, torch.ones_like(loss)


class GlobalBatch(Objective):
    """Global-batch balance loss: sum_e f_e P_e over all tokens of the optimiser step.

    Gradient with respect to p: coef * f / N, N the step's valid tokens, f over all its microbatches and
    ranks as far as ``counts`` knows them when backward runs. f carries no gradient. 1.0 at balance.

    Source: Qiu et al. 2025, arXiv:2501.11873, eq. 4-6, without the assumption of equal token counts.
    """

    name: ClassVar[str] = "global_batch"
    scope: ClassVar[str] = "step"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Objective.Config):
        """Settings of the global-batch loss.

        Args:
            counts: where counts of microbatches that have not run yet come from. "prior": from the last
                step's mean (residual of the microbatch excess 1 / (2M)). "running": nowhere (residual
                (H_M - 1) / (M - 1), H_M the M-th harmonic number; Algorithm 1 of the source).
                "previous": all counts are last step's. "exact": all are known, which plain gradient
                accumulation cannot deliver.
            assignments: what f counts, "executed" or "unbiased".

        Raises:
            ValueError: negative coefficient or unknown word.
        """

        counts: CountsMode = "prior"
        assignments: Assignments = "executed"

        def __post_init__(self) -> None:
            """Validate."""
            Objective.Config.__post_init__(self)
            _assignment_map(self.assignments)
            if self.counts not in ("exact", "prior", "running", "previous"):
                raise ValueError(f"counts={self.counts!r} must be 'exact', 'prior', 'running' or 'previous'")

        def build(self) -> "GlobalBatch":
            """Return the objective."""
            return GlobalBatch(self)

    config: Config

    def check(self, num_experts: int, top_k: int, accumulation: Accumulation) -> None:
        """Exact counts need every forward of the step before its first backward."""
        if self.config.counts == "exact" and not accumulation.counts_are_complete:
            raise ValueError(
                f"counts='exact' cannot be had with num_microbatches={accumulation.num_microbatches} in "
                "order='alternating': the first backward runs before the last forward; run all forwards "
                "first (Accumulation(order='forward_first'), as GPipe does), add a counting pass "
                "(Accumulation(order='counting_pass')), or use counts='prior'"
            )

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """The map that f counts."""
        return (_assignment_map(self.config.assignments),)

    @property
    def totals(self) -> tuple[str, ...]:
        """Valid tokens."""
        return ("num_tokens",)

    def targets(self, reading: Reading) -> Tensor:
        """(1, E): coef * f / N."""
        counts_E, num_tokens = reading.step(self.maps[0], self.config.counts)
        load_E = load_fraction(counts_E, num_tokens, reading.top_k)
        return (self.coef * load_E / reading.totals.num_tokens.clamp(min=1))[None]

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The step's loss with its final counts, and 1."""
        counts_E, num_tokens = reading.step(self.maps[0], "exact")
        load_E = load_fraction(counts_E, num_tokens, reading.top_k)
        loss = (load_E * prob_sums_GE.sum(dim=0)).sum() / num_tokens.clamp(min=1)
        return loss, torch.ones_like(loss)


class ImportanceCV(Objective):
    """Importance loss of Shazeer: squared coefficient of variation of I_e = sum_t p_te, per microbatch.

        L = Var(I) / mean(I)^2,   dL/dI_e = 2/E ((I_e - mean) / mean^2 - Var / mean^3),   0.0 at balance

    Averaged over microbatches. It reads no counts: probability sums of the same microbatch are formed in
    backward. Deviation from the source: p is the dense router probability, not the noisy top-k gate; the
    source's load loss needs that noise and is not offered.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 6-7.
    """

    name: ClassVar[str] = "importance_cv"
    scope: ClassVar[str] = "microbatch"
    needs_prob_sums: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Objective.Config):
        """Settings of the importance loss: only its coefficient."""

        def build(self) -> "ImportanceCV":
            """Return the objective."""
            return ImportanceCV(self)

    def targets(self, reading: Reading) -> Tensor:
        """(1, E): coef / M * dL/dI."""
        assert reading.prob_sums_GE is not None
        importance_E = reading.prob_sums_GE.sum(dim=0)
        mean = importance_E.mean()
        mean = torch.where(mean > 0, mean, 1.0)
        variance = importance_E.var(correction=0)
        slope_E = 2 / reading.num_experts * ((importance_E - mean) / mean**2 - variance / mean**3)
        return (self.coef / reading.totals.num_microbatches * slope_E)[None]

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The microbatch's loss, and 1."""
        importance_E = prob_sums_GE.sum(dim=0)
        mean = importance_E.mean()
        loss = importance_E.var(correction=0) / torch.where(mean > 0, mean, 1.0) ** 2
        return loss, torch.ones_like(loss)


class ZLoss(Objective):
    """Router z-loss: mean over the step's valid tokens of logsumexp(z_t)^2.

    Gradient with respect to z: coef * 2 / N * lse_t * softmax(z_t).

    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5; the mean is over the whole step.
    """

    name: ClassVar[str] = "z"
    scope: ClassVar[str] = "token"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Objective.Config):
        """Settings of the z-loss: only its coefficient."""

        def build(self) -> "ZLoss":
            """Return the objective."""
            return ZLoss(self)

    @property
    def totals(self) -> tuple[str, ...]:
        """Valid tokens."""
        return ("num_tokens",)

    def z_weight(self, reading: Reading) -> Tensor:
        """(): coef / N."""
        return self.coef / reading.totals.num_tokens.clamp(min=1)

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of squared log-sum-exps, and number of tokens."""
        return squared_lse_sum, reading.num_tokens_G.sum()

"""Balance objectives: one formula, several scopes; and z-loss.

Shapes: T tokens, E experts, K top-k, G finest groups, H groups of one loss; ... nothing, or L layers read together.

Each class states its own scope, normaliser and source; `trimtab.objective` says what they share.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trimtab.counts import CountMap, CountsMode, Reading, Unit, load_fraction
from trimtab.objective import Assignments, Objective, assignment_map
from trimtab.scale import Accumulation

Weighting = Literal["sequence", "token"]


class SequenceWise(Objective):
    """Sequence-wise balance loss: sum_e f_ge P_ge of each sequence or document g, averaged over the step.

        f_ge = E / (K n_g) c_ge,   P_ge = (1 / n_g) sum_{t in g} p_te,   1.0 at balance

    Gradient with respect to p of a token of group g: coef * f_g / (B n_g) with ``weighting="sequence"``
    and B the groups of the step that have a valid token, coef * f_g / N with ``weighting="token"`` and N
    the step's valid tokens. f carries no gradient.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20 (``assignments="unbiased"`` there); DeepSeek-V2,
        arXiv:2405.04434, eq. 23-25.
    """

    name: str = "sequence_wise"
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
            assignment_map(self.assignments)
            if self.unit not in ("sequence", "document"):
                raise ValueError(f"unit={self.unit!r} must be 'sequence' or 'document'")
            if self.weighting not in ("sequence", "token"):
                raise ValueError(f"weighting={self.weighting!r} must be 'sequence' or 'token'")

        def build(self) -> "SequenceWise":
            """Return the objective."""
            return SequenceWise(self)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.unit == "document":
            self.name = {"sequence_wise": "document_wise"}.get(self.name, f"{self.name}_document")

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """The map that f counts."""
        return (assignment_map(self.config.assignments),)

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
        return reading.load(self.maps[0], self.config.unit)

    def targets(self, reading: Reading) -> Tensor:
        """(..., G, E): coef * f_g / (B n_g), or coef * f_g / N."""
        unit, (total,) = self.unit, self.totals
        if self.config.weighting == "token":
            weight_H1 = reading.totals.weight(total, self.coef)
        else:
            weight_H1 = reading.mean_weight(unit, total, self.coef)
        # A group without tokens has no load.
        return reading.spread(weight_H1 * self.load(reading), unit)

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum over groups of their losses, and their number (or their tokens)."""
        num_tokens_H = reading.tokens(self.config.unit)
        mean_probs_HE = reading.merge(prob_sums_GE, self.config.unit) / num_tokens_H.clamp(min=1)[:, None]
        loss_H = (self.load(reading) * mean_probs_HE).sum(dim=-1)
        weight_H = num_tokens_H if self.config.weighting == "token" else (num_tokens_H > 0).to(loss_H.dtype)
        return (loss_H * weight_H).sum(dim=-1), weight_H.sum()


class BatchWise(Objective):
    """Batch-wise balance loss: sum_e f_e P_e over the tokens of one forward, averaged over microbatches.

    The tokens are those that all data ranks process together in one forward, or with ``local=True`` those
    of each data rank alone. Gradient with respect to p: coef * f / (M n), n the valid tokens, with
    ``local`` divided by the number of data ranks as well. f carries no gradient. 1.0 at balance.

    Source: DeepSeek-V3, arXiv:2412.19437, section 4.5.3 (batch-wise auxiliary loss); Fedus et al. 2021,
        arXiv:2101.03961, eq. 4-6 with f divided by K.
    """

    name: str = "batch_wise"
    scope: ClassVar[str] = "microbatch"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Objective.Config):
        """Settings of the batch-wise loss.

        Args:
            assignments: what f counts, "executed" or "unbiased".
            average_microbatches: accept that with gradient accumulation each microbatch is balanced on
                its own and the losses are averaged, which is not balance over the batch.
            local: balance each data rank's tokens on their own and average over data ranks.

        Raises:
            ValueError: negative coefficient or unknown word.
        """

        assignments: Assignments = "executed"
        average_microbatches: bool = False
        local: bool = False

        def __post_init__(self) -> None:
            """Validate."""
            Objective.Config.__post_init__(self)
            assignment_map(self.assignments)

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
                "not the batch; use the global-batch loss (GlobalBatch: counts over the whole step) or the "
                "sequence-wise loss (SequenceWise: counts per sequence), or set average_microbatches=True if the "
                "mean of microbatch losses is meant"
            )

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """The map that f counts."""
        return (assignment_map(self.config.assignments),)

    @property
    def local(self) -> bool:
        """One data rank's own tokens, or all ranks'."""
        return self.config.local

    def targets(self, reading: Reading) -> Tensor:
        """(..., 1, E): coef * f / (M n), with ``local`` over data ranks."""
        num_batches = reading.totals.num_microbatches * (reading.totals.num_data_ranks if self.local else 1)
        load_1E, weight = reading.microbatch_load(self.maps[0], self.coef / num_batches, local=self.local)
        return weight * load_1E

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The microbatch's loss, and 1."""
        counts_E, num_tokens = reading.microbatch(self.maps[0], local=self.local)
        load_E = load_fraction(counts_E, num_tokens, reading.top_k)
        loss = (load_E * prob_sums_GE.sum(dim=-2)).sum(dim=-1) / num_tokens.clamp(min=1)
        return loss, torch.ones_like(loss)


class GlobalBatch(Objective):
    """Global-batch balance loss: sum_e f_e P_e over all tokens of the optimiser step.

    Gradient with respect to p: coef * f / N, N the step's valid tokens, f over all its microbatches as far
    as ``counts`` knows them when backward runs. f carries no gradient. 1.0 at balance.

    Source: Qiu et al. 2025, arXiv:2501.11873, eq. 4-6, without the assumption of equal token counts.
    """

    name: str = "global_batch"
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
            assignment_map(self.assignments)
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
        return (assignment_map(self.config.assignments),)

    @property
    def totals(self) -> tuple[str, ...]:
        """Valid tokens."""
        return ("num_tokens",)

    def targets(self, reading: Reading) -> Tensor:
        """(..., 1, E): coef * f / N."""
        load_1E = reading.step_load(self.maps[0], self.config.counts)
        return reading.totals.weight("num_tokens", self.coef) * load_1E

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The step's loss with its final counts, and 1."""
        counts_E, num_tokens = reading.step(self.maps[0], "exact")
        load_E = load_fraction(counts_E, num_tokens, reading.top_k)
        loss = (load_E * prob_sums_GE.sum(dim=-2)).sum(dim=-1) / num_tokens.clamp(min=1)
        return loss, torch.ones_like(loss)


class ImportanceCV(Objective):
    """Importance loss of Shazeer: squared coefficient of variation of I_e = sum_t p_te, per microbatch.

        L = Var(I) / mean(I)^2,   dL/dI_e = 2/E ((I_e - mean) / mean^2 - Var / mean^3),   0.0 at balance

    Averaged over microbatches. It reads no counts: probability sums of the same microbatch are formed in
    backward. They are not summed over ranks: with several data ranks it must be asked for with
    ``local=True``, and is then averaged over them. Deviation from the source: p is the dense router
    probability, not the noisy top-k gate; the source's load loss needs that noise and is not offered.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 6-7.
    """

    name: str = "importance_cv"
    scope: ClassVar[str] = "microbatch"
    needs_prob_sums: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Objective.Config):
        """Settings of the importance loss.

        Args:
            local: balance each data rank's tokens on their own and average over data ranks.
        """

        local: bool = False

        def build(self) -> "ImportanceCV":
            """Return the objective."""
            return ImportanceCV(self)

    config: Config

    @property
    def local(self) -> bool:
        """One data rank's own tokens."""
        return self.config.local

    def targets(self, reading: Reading) -> Tensor:
        """(..., 1, E): coef / M * dL/dI."""
        assert reading.prob_sums_GE is not None
        importance_E = reading.prob_sums_GE.sum(dim=-2)
        mean = importance_E.mean(dim=-1, keepdim=True)
        mean = torch.where(mean > 0, mean, 1.0)
        variance = importance_E.var(dim=-1, correction=0, keepdim=True)
        slope_E = 2 / reading.num_experts * ((importance_E - mean) / mean**2 - variance / mean**3)
        totals = reading.totals
        return (self.coef / (totals.num_microbatches * totals.num_data_ranks) * slope_E)[..., None, :]

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The microbatch's loss, and 1."""
        importance_E = prob_sums_GE.sum(dim=-2)
        mean = importance_E.mean(dim=-1)
        loss = importance_E.var(dim=-1, correction=0) / torch.where(mean > 0, mean, 1.0) ** 2
        return loss, torch.ones_like(loss)


class ZLoss(Objective):
    """Router z-loss: mean over the step's valid tokens of logsumexp(z_t)^2.

    Gradient with respect to z: coef * 2 / N * lse_t * softmax(z_t).

    Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5; the mean is over the whole step.
    """

    name: str = "z"
    scope: ClassVar[str] = "token"
    reads_logits: ClassVar[bool] = True

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
        """(...): coef / N."""
        return reading.totals.inverse("num_tokens", self.coef)

    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of squared log-sum-exps, and number of tokens."""
        return squared_lse_sum, reading.num_tokens_G.sum()

"""Bias balancing: expert biases that only selection sees, moved once per optimiser step.

Shapes: T tokens, E experts, K top-k, N histogram bins.

A rule turns the step's executed counts into a change of the bias; no gradient is involved (Wang et al. 2024,
arXiv:2408.15664). Counts are integers summed over all microbatches, so how a step is split into microbatches
does not change the bias by a bit.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.scores import ScoreName, compute_dtype, scores


@dataclass(slots=True)
class BiasState:
    """What a rule keeps for one layer between steps.

    Args:
        momentum_E: (E,) float32 momentum, for the momentum rule.
    """

    momentum_E: Tensor | None = None


class Statistic:
    """Histogram over tokens of each expert's margin, for the quantile rule.

    The margin of expert j for token t is s_tj - a_t, with a_t the (K+1)-th largest of s_t + b. Integer
    bins add over microbatches, so the result does not depend on how tokens are split.

    Args:
        num_bins: N, bins over [-(bound + max|b|), bound + max|b|]; the quantile is exact to one bin.
    """

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.histogram_EN: Tensor | None = None
        self.reach: Tensor | None = None

    def add(
        self, logits_TE: Tensor, score: ScoreName, top_k: int, bias_E: Tensor, valid_mask_T: Tensor | None
    ) -> None:
        """Add one microbatch of one layer."""
        scores_TE = scores(logits_TE, score)
        num_experts = scores_TE.shape[1]
        dtype = compute_dtype(logits_TE.dtype)
        bias_E = bias_E.to(dtype)
        # sqrt(softplus(z)) has no upper bound; 8 is reached at z = 64, and beyond it bins saturate.
        bound = 8.0 if score == "sqrt_softplus" else 1.0
        reach = bound + bias_E.abs().amax()
        threshold_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=1).values[:, -1:]
        position_TE = (scores_TE - threshold_T1 + reach) * (self.num_bins / (2 * reach))
        # A NaN has no place; as an index it would be out of bounds.
        bin_TE = position_TE.nan_to_num(0.0).floor().clamp(0, self.num_bins - 1).to(torch.int64)
        index_TE = bin_TE + torch.arange(num_experts, device=bin_TE.device) * self.num_bins
        ones_TE = torch.ones_like(index_TE)
        if valid_mask_T is not None:
            ones_TE = ones_TE * valid_mask_T[:, None]
        if self.histogram_EN is None:
            self.histogram_EN = torch.zeros(
                num_experts, self.num_bins, dtype=torch.int64, device=bin_TE.device
            )
        self.histogram_EN.view(-1).scatter_add_(0, index_TE.reshape(-1), ones_TE.reshape(-1))
        self.reach = reach

    def quantile(self, top_k: int) -> Tensor | None:
        """(E,) quantile 1 - K/E of each expert's margins, linear within a bin; None if nothing was counted."""
        if self.histogram_EN is None or self.reach is None:
            return None
        num_experts = self.histogram_EN.shape[0]
        cumulative_EN = self.histogram_EN.cumsum(dim=1)
        # The rank n (E - K) / E is compared in integers: as a float, 2/3 of 39 lies above 26.
        scaled_rank_E1 = cumulative_EN[:, -1:] * (num_experts - top_k)
        bin_E1 = (cumulative_EN * num_experts < scaled_rank_E1).sum(dim=1, keepdim=True)
        bin_E1 = bin_E1.clamp(max=self.num_bins - 1)
        in_bin_E1 = self.histogram_EN.gather(1, bin_E1)
        below_E1 = cumulative_EN.gather(1, bin_E1) - in_bin_E1
        part_E1 = (scaled_rank_E1 - below_E1 * num_experts).to(torch.float64)
        fraction_E1 = (part_E1 / (num_experts * in_bin_E1.clamp(min=1))).clamp(0, 1)
        reach = self.reach.to(torch.float64)
        return ((bin_E1 + fraction_E1) * (2 * reach / self.num_bins) - reach).squeeze(1)

    def counts(self) -> Tensor:
        """(E, N) int64 histogram of this rank's tokens, to be summed over ranks.

        Raises:
            RuntimeError: no token was counted.
        """
        if self.histogram_EN is None:
            raise RuntimeError("the quantile rule has counted no token in this step")
        return self.histogram_EN

    def merge(self, other: "Statistic") -> None:
        """Add the microbatches of another statistic of the same layer and step."""
        if other.histogram_EN is not None:
            mine_EN = self.histogram_EN
            self.histogram_EN = other.histogram_EN if mine_EN is None else mine_EN + other.histogram_EN
            self.reach = other.reach

    def clear(self) -> None:
        """Forget the step."""
        self.histogram_EN = self.reach = None


class BiasRule(ABC):
    """How the step's counts move the bias.

    A rule's ``speed`` may follow a schedule of (step, factor) points, linear in between and constant
    outside: ``schedule=((0, 1.0), (9000, 1.0), (10000, 0.0))`` freezes the bias at the end.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ABC):
        """What every rule has.

        Args:
            speed: step size of the bias, in units of the score.
            schedule: (optimiser step, factor on speed) points with increasing steps.
            layers: name patterns of the routers to balance, as in `fnmatch`; None for all that have an
                expert bias.

        Raises:
            ValueError: speed not positive, or a schedule that is not increasing in steps.
        """

        speed: float
        schedule: tuple[tuple[int, float], ...] = ((0, 1.0),)
        layers: tuple[str, ...] | None = None

        def __post_init__(self) -> None:
            """Validate."""
            if not 0 < self.speed < float("inf"):
                raise ValueError(
                    f"speed={self.speed} must be positive; leave the rule out to do without bias updates"
                )
            steps = [step for step, _ in self.schedule]
            if not steps or steps != sorted(set(steps)):
                raise ValueError(f"schedule={self.schedule} must hold points of increasing step")
            if not all(0 <= factor < float("inf") for _, factor in self.schedule):
                raise ValueError(f"schedule={self.schedule} must not have negative factors")

        @abstractmethod
        def build(self) -> "BiasRule":
            """Return the rule."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def speed(self, step: int) -> float:
        """Speed at an optimiser step, counted from 0."""
        points = self.config.schedule
        place = bisect_right([point[0] for point in points], step)
        if place == 0:
            return self.config.speed * points[0][1]
        if place == len(points):
            return self.config.speed * points[-1][1]
        (left, low), (right, high) = points[place - 1], points[place]
        return self.config.speed * (low + (high - low) * (step - left) / (right - left))

    def check(self, num_experts: int, top_k: int, grouped: bool) -> None:
        """Raise a ValueError if the rule cannot serve such a router."""

    def statistic(self) -> Statistic | None:
        """What the ledger must gather for this rule beside counts."""
        return None

    @abstractmethod
    def update(
        self,
        bias_E: Tensor,
        counts_E: Tensor,
        speed: float,
        state: BiasState,
        statistic: Statistic | None,
        top_k: int,
    ) -> Tensor:
        """(E,) float32 change of the bias.

        Args:
            bias_E: (E,) float32 bias that the step used.
            counts_E: (E,) int64 executed assignments of the step.
            speed: speed at this step.
            state: memory of this layer, updated in place.
            statistic: the layer's histogram, for the quantile rule.
            top_k: K.
        """


def violation(counts_E: Tensor) -> Tensor:
    """(E,) float32 relative deficit (mean - c) / mean; 0 where nothing was counted."""
    # Comparing in integers first: sign must not depend on how a mean rounds.
    deficit_E = counts_E.sum() - counts_E * counts_E.numel()
    return deficit_E.to(torch.float32) / counts_E.sum().clamp(min=1).to(torch.float32)


class Sign(BiasRule):
    """b_e += speed * sign(mean(c) - c_e).

    Source: Wang et al. 2024, arXiv:2408.15664, Algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(BiasRule.Config):
        """Settings of the sign rule; 1e-3 in the source."""

        speed: float = 1e-3

        def build(self) -> "Sign":
            """Return the rule."""
            return Sign(self)

    def update(
        self,
        bias_E: Tensor,
        counts_E: Tensor,
        speed: float,
        state: BiasState,
        statistic: Statistic | None,
        top_k: int,
    ) -> Tensor:
        """(E,) change of the bias."""
        return speed * violation(counts_E).sign()


class CentredSign(BiasRule):
    """Sign rule whose update has its mean over experts removed, so that the bias keeps mean zero.

    Source: torchtitan's expert-bias update.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(BiasRule.Config):
        """Settings of the centred sign rule."""

        speed: float = 1e-3

        def build(self) -> "CentredSign":
            """Return the rule."""
            return CentredSign(self)

    def update(
        self,
        bias_E: Tensor,
        counts_E: Tensor,
        speed: float,
        state: BiasState,
        statistic: Statistic | None,
        top_k: int,
    ) -> Tensor:
        """(E,) change of the bias."""
        step_E = speed * violation(counts_E).sign()
        return step_E - step_E.mean()


class Proportional(BiasRule):
    """b_e += speed * (mean(c) - c_e) / mean(c).

    Source: Wang et al. 2024, arXiv:2408.15664, section 4.3 (the variant without sign), with the error
        taken relative to the mean so that speed does not depend on the batch size.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(BiasRule.Config):
        """Settings of the proportional rule."""

        speed: float = 1e-2

        def build(self) -> "Proportional":
            """Return the rule."""
            return Proportional(self)

    def update(
        self,
        bias_E: Tensor,
        counts_E: Tensor,
        speed: float,
        state: BiasState,
        statistic: Statistic | None,
        top_k: int,
    ) -> Tensor:
        """(E,) change of the bias."""
        return speed * violation(counts_E)


class Momentum(BiasRule):
    """Soft-clamped momentum update (SMEBU).

        v = (mean(c) - c) / mean(c),  d = speed tanh(kappa v) - mean,  m = beta m + (1 - beta) d,  b += m

    Source: Trinity, arXiv:2602.17004 (kappa 2, beta 0.5).
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(BiasRule.Config):
        """Settings of the momentum rule.

        Args:
            kappa: sharpness of the soft sign.
            beta: momentum, in [0, 1).

        Raises:
            ValueError: kappa not positive or beta outside [0, 1).
        """

        speed: float = 1e-3
        kappa: float = 2.0
        beta: float = 0.5

        def __post_init__(self) -> None:
            """Validate."""
            BiasRule.Config.__post_init__(self)
            if not 0 < self.kappa < float("inf"):
                raise ValueError(f"kappa={self.kappa} must be positive")
            if not 0 <= self.beta < 1:
                raise ValueError(f"beta={self.beta} must be in [0, 1)")

        def build(self) -> "Momentum":
            """Return the rule."""
            return Momentum(self)

    config: Config

    def update(
        self,
        bias_E: Tensor,
        counts_E: Tensor,
        speed: float,
        state: BiasState,
        statistic: Statistic | None,
        top_k: int,
    ) -> Tensor:
        """(E,) change of the bias."""
        step_E = speed * torch.tanh(self.config.kappa * violation(counts_E))
        step_E = step_E - step_E.mean()
        momentum_E = (
            torch.zeros_like(step_E) if state.momentum_E is None else state.momentum_E.to(step_E.device)
        )
        state.momentum_E = self.config.beta * momentum_E + (1 - self.config.beta) * step_E
        return state.momentum_E


class Quantile(BiasRule):
    """Quantile balancing: b_j such that a share K/E of the step's tokens would select expert j.

        a_t = (K+1)-th largest of s_t + b,   b_j <- (1 - speed) b_j + speed * (-quantile_{1-K/E}(s_j - a))

    and the mean over experts is removed. Quantiles come from integer histograms, exact to one bin, with
    any number of valid tokens.

    Source: Su, "quantile balancing", kexue.fm 11619; Kimi K3, arXiv:2607.24653, eq. 13-14 and appendix D,
        with speed = 1.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(BiasRule.Config):
        """Settings of the quantile rule.

        Args:
            speed: share of the way to the new quantile, in (0, 1].
            num_bins: bins of the histogram.

        Raises:
            ValueError: speed above 1 or fewer than 2 bins.
        """

        speed: float = 1.0
        num_bins: int = 1000

        def __post_init__(self) -> None:
            """Validate."""
            BiasRule.Config.__post_init__(self)
            if self.speed > 1:
                raise ValueError(f"speed={self.speed} must be in (0, 1] for the quantile rule")
            if self.num_bins < 2:
                raise ValueError(f"num_bins={self.num_bins} must be at least 2")

        def build(self) -> "Quantile":
            """Return the rule."""
            return Quantile(self)

    config: Config

    def check(self, num_experts: int, top_k: int, grouped: bool) -> None:
        """The (K+1)-th expert must exist, and selection must be a plain top-k of s + b."""
        if top_k >= num_experts:
            raise ValueError(
                f"the quantile rule needs top_k={top_k} < num_experts={num_experts}: with all experts selected "
                "there is nothing to balance"
            )
        if grouped:
            raise ValueError(
                "the quantile rule assumes a plain top-k of s + b, but this router limits groups; "
                "use Sign, CentredSign, Proportional or Momentum"
            )

    def statistic(self) -> Statistic:
        """A histogram per layer."""
        return Statistic(self.config.num_bins)

    def update(
        self,
        bias_E: Tensor,
        counts_E: Tensor,
        speed: float,
        state: BiasState,
        statistic: Statistic | None,
        top_k: int,
    ) -> Tensor:
        """(E,) change of the bias."""
        assert statistic is not None
        quantile_E = statistic.quantile(top_k)
        statistic.clear()
        if quantile_E is None:
            return torch.zeros_like(bias_E)
        target_E = -(quantile_E - quantile_E.mean()).to(bias_E.dtype)
        return torch.where(counts_E.sum() > 0, speed * (target_E - bias_E), 0.0)


@dataclass(slots=True)
class LayerBias:
    """One layer's bias balancing: its memory and whether it is on.

    Args:
        enabled: whether this layer's bias moves.
        state: memory of the rule.
    """

    enabled: bool = True
    state: BiasState = field(default_factory=BiasState)

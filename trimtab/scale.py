"""The scale contract: how the host trainer treats gradients, in one place.

trimtab injects gradients of one reference objective for the whole optimiser step,

    L = CE + sum over layers and objectives of coef * loss,

with sequence-wise losses averaged over the step's sequences, microbatch losses over its microbatches,
step losses taken once and z-loss averaged over its valid tokens. What the trainer does to gradients
between backward and the optimiser is undone here and nowhere else.
"""

from dataclasses import dataclass
from typing import Literal

Reduce = Literal["sum", "mean"]
Order = Literal["alternating", "forward_first", "counting_pass"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GradReduction:
    """How local gradients become the optimiser's gradient.

        optimiser gradient = (1 / divisor) * reduce over ranks of sum over microbatches of local gradient

    Args:
        ranks: "sum" (trimtab's trainer; FSDP2 with sum reduction; one process) or "mean" (DDP, FSDP
            default).
        num_ranks: ranks R that share a step: data-parallel ones, times those that divide its sequences.
        microbatches: what the loss given to `Balancer.follow` is. "mean": the mean over its microbatch,
            which the trainer then divides by the number of microbatches. "sum": already this
            microbatch's share of the step's loss, which the trainer does not divide. Only needed when
            `follow` meets gradient accumulation.
        divisor: what the trainer later divides all gradients by, for example the number of label
            tokens when it backpropagates a token sum.

    Raises:
        ValueError: a size or divisor that is not positive, or an unknown word.
    """

    ranks: Reduce = "sum"
    num_ranks: int = 1
    microbatches: Reduce | None = None
    divisor: float = 1.0

    def __post_init__(self) -> None:
        """Validate."""
        for field, value in (("ranks", self.ranks), ("microbatches", self.microbatches)):
            if value not in ("sum", "mean") and not (field == "microbatches" and value is None):
                raise ValueError(f"{field}={value!r} must be 'sum' or 'mean'")
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks={self.num_ranks} must be at least 1")
        if not 0 < self.divisor < float("inf"):
            raise ValueError(f"divisor={self.divisor} must be positive and finite")

    @property
    def factor(self) -> float:
        """What injected gradients are multiplied by so that the optimiser sees the reference."""
        return (self.num_ranks if self.ranks == "mean" else 1) * self.divisor


@dataclass(frozen=True, kw_only=True, slots=True)
class Accumulation:
    """How the microbatches of one optimiser step follow each other.

    Args:
        num_microbatches: forwards per optimiser step, M.
        order: "alternating": forward, backward, forward, backward (plain gradient accumulation).
            "forward_first": all forwards, then all backwards. "counting_pass": the microbatches are
            first run forward without gradient inside `Balancer.counting_pass`, then as in
            "alternating". The last two make step-scope counts exact.

    Raises:
        ValueError: fewer than one microbatch, or an unknown order.
    """

    num_microbatches: int = 1
    order: Order = "alternating"

    def __post_init__(self) -> None:
        """Validate."""
        if self.num_microbatches < 1:
            raise ValueError(f"num_microbatches={self.num_microbatches} must be at least 1")
        if self.order not in ("alternating", "forward_first", "counting_pass"):
            raise ValueError(
                f"order={self.order!r} must be 'alternating', 'forward_first' or 'counting_pass'"
            )

    @property
    def counts_are_complete(self) -> bool:
        """Whether every count of the step is known when its first backward starts."""
        return self.num_microbatches == 1 or self.order != "alternating"

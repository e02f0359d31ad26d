"""What every objective is: a Config, and targets that are linear in the router probabilities.

Shapes: T tokens, E experts, G finest groups.

With the load fraction f held constant, every balance loss is linear in the router probabilities,

    L = sum_t sum_e target_te p_te,       dL/dp_te = target_te,

so an objective is fully described by its ``targets``: coef times weight times f, per group and expert.
Targets of all objectives are added before one pass over the tokens. A new objective is one subclass:
nothing else in the package changes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from trimtab.counts import CountMap, ExecutedCounts, Reading, UnbiasedCounts, Unit
from trimtab.scale import Accumulation

Assignments = Literal["executed", "unbiased"]

# One of each, because maps are looked up in each backward and the same object is found at once.
EXECUTED, UNBIASED = ExecutedCounts(), UnbiasedCounts()


class Objective(ABC):
    """One term of the reference objective, for every MoE layer.

    Subclasses hold a frozen ``Config`` whose ``build()`` returns them, and override what applies: a
    balance loss overrides `targets`, z-loss overrides `z_weight`.
    """

    name: str
    scope: ClassVar[str]
    needs_prob_sums: ClassVar[bool] = False  # `targets` reads sums of p of the same microbatch
    reads_logits: ClassVar[bool] = False  # `z_weight` is not None

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
    def coef(self) -> float:
        """Coefficient of the step; assign another number between steps.

        Raises:
            TypeError: a tensor was assigned, whose value may change unseen.
        """
        return self._coef

    @coef.setter
    def coef(self, coef: float) -> None:
        if isinstance(coef, Tensor):
            raise TypeError(
                f"coef of {type(self).__name__} must be a number, got a tensor; assign a new number for each step"
            )
        self._coef = coef

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """The count maps this objective reads."""
        return ()

    @property
    def unit(self) -> Unit | None:
        """The groups this objective needs to tell apart within a microbatch."""
        return None

    @property
    def local(self) -> bool:
        """Whether microbatch scope means one data rank's own tokens, not those of all ranks together."""
        return False

    @property
    def reads_groups(self) -> bool:
        """Whether `targets` reads counts of sequences or documents, or of one data rank's own microbatch."""
        return self.unit is not None or (self.scope == "microbatch" and self.local)

    @property
    def reads_totals(self) -> bool:
        """Whether `targets` reads counts of all ranks together."""
        return self.scope == "step" or (self.scope == "microbatch" and not self.local)

    @property
    def totals(self) -> tuple[str, ...]:
        """The totals of the step that normalise it, as named in `StepTotals`."""
        return ()

    def check(self, num_experts: int, top_k: int, accumulation: Accumulation) -> None:
        """Raise a ValueError if this objective cannot be had on such a router and step."""

    def targets(self, reading: Reading) -> Tensor | None:
        """(..., G or 1, E) gradient of ``coef`` times the loss with respect to p; None if there is none.

        Args:
            reading: the microbatch. Later microbatches may share its tensors: never write to them.
        """
        return None

    def z_weight(self, reading: Reading) -> Tensor | None:
        """(...) gradient of ``coef`` times the loss with respect to sum_t lse_t^2; None if there is none.

        Args:
            reading: the microbatch. Later microbatches may share its tensors: never write to them.
        """
        return None

    @abstractmethod
    def measure(
        self, reading: Reading, prob_sums_GE: Tensor, squared_lse_sum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the unscaled loss, each a sum over the microbatches of a step.

        Args:
            reading: the microbatch; for step scope the whole step, once, with its final counts.
            prob_sums_GE: (G, E) sums of p over valid tokens of each group.
            squared_lse_sum: () sum of lse^2 over valid tokens.
        """


def assignment_map(assignments: Assignments) -> CountMap:
    """The count map of what f counts.

    Raises:
        ValueError: an unknown word.
    """
    if assignments not in ("executed", "unbiased"):
        raise ValueError(
            f"assignments={assignments!r} must be 'executed' (what the router dispatched) or "
            "'unbiased' (top-k of the raw scores)"
        )
    return EXECUTED if assignments == "executed" else UNBIASED

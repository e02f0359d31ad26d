"""What a model family gives the trainer: sizes, a way to build the model, and how its experts are balanced.

Legend: E experts, K top-k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro
from torch import nn

from trimtab.bias import BiasRule
from trimtab.losses import Objective
from trimtab.parallel.mesh import Degrees
from trimtab.scale import Accumulation, Order
from trimtab.train.images import ImageLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Balancing:
    """How the experts of a model are balanced. Part of the model, written in Python, never a flag.

    Args:
        objectives: balance losses and z-loss, in any number.
        observe_only: balance nothing, and watch the load all the same; see `off`.
        bias: rule that moves expert biases after each step; None leaves them alone.
        bias_decay: share of the run's steps, at its end, over which the rule's speed falls linearly to 0;
            None keeps the schedule written in ``bias``.
        order: how the microbatches of a step follow each other, as in `Accumulation`. "counting_pass" and
            "forward_first" make counts of the whole step exact, at the cost of one more forward, or of
            holding the activations of all microbatches.
        visual_tokens: whether the tokens of images are balanced. "count": like any other, because they load
            experts as any other; "exclude": losses, expert biases and metrics of load are of text alone, and
            images may load experts as they like.

    Raises:
        ValueError: no objective and no rule, or one beside ``observe_only``; an objective given twice; or a
            decay without a rule, outside (0, 1], or beside a schedule.
    """

    objectives: tuple[Objective.Config, ...] = ()
    bias: BiasRule.Config | None = None
    bias_decay: float | None = None
    order: Order = "alternating"
    visual_tokens: Literal["count", "exclude"] = "count"
    observe_only: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        balances = bool(self.objectives) or self.bias is not None
        if not balances and not self.observe_only:
            raise ValueError(
                "Balancing() balances nothing; give objectives=(...) or bias=..., or a coefficient of 0 to "
                "measure a loss without its gradient, or Balancing.off() to watch the load alone"
            )
        if balances and self.observe_only:
            raise ValueError(
                "observe_only=True balances nothing, and objectives or bias are given; leave one of them out"
            )
        names = [objective.build().name for objective in self.objectives]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"objective {name!r} is given twice; add the coefficients into one")
        Accumulation(order=self.order)
        if self.visual_tokens not in ("count", "exclude"):
            raise ValueError(f"visual_tokens={self.visual_tokens!r} must be 'count' or 'exclude'")
        if self.bias_decay is None:
            return
        if self.bias is None:
            raise ValueError(f"bias_decay={self.bias_decay} needs a rule to act on; give bias=... or drop it")
        if not 0 < self.bias_decay <= 1:
            raise ValueError(f"bias_decay={self.bias_decay} is a share of the run and must be in (0, 1]")
        if len(self.bias.schedule) > 1:
            raise ValueError(
                f"bias_decay={self.bias_decay} and bias.schedule={self.bias.schedule} both set the speed; "
                "keep one"
            )

    @staticmethod
    def off() -> Balancing:
        """No balancing: loads, MaxVio and what routers do are measured as ever, and nothing is moved."""
        return Balancing(observe_only=True)

    def bias_for(self, num_steps: int) -> BiasRule.Config | None:
        """The rule with its speed scheduled for a run of ``num_steps`` steps."""
        if self.bias is None or self.bias_decay is None:
            return self.bias
        start = min(num_steps - 1, round(num_steps * (1 - self.bias_decay)))
        return replace(self.bias, schedule=((start, 1.0), (num_steps, 0.0)))

    def check(
        self,
        num_experts: int,
        top_k: int,
        *,
        grouped: bool,
        has_bias: bool,
        num_microbatches: int,
        order: Order | None = None,
    ) -> None:
        """Check that the balancing can be had on such routers and such a step.

        Args:
            num_experts: E.
            top_k: K.
            grouped: whether selection is limited to expert groups.
            has_bias: whether the routers have an expert bias.
            num_microbatches: forwards of one optimiser step.
            order: how they follow each other, where a pipeline's schedule decides it; None: as ``order`` says.

        Raises:
            ValueError: it cannot; the message says which part and what to use instead.
        """
        accumulation = Accumulation(num_microbatches=num_microbatches, order=order or self.order)
        try:
            for objective in self.objectives:
                objective.build().check(num_experts, top_k, accumulation)
            if self.bias is not None:
                if not has_bias:
                    raise ValueError(
                        f"bias={type(self.bias).__qualname__} needs routers with an expert bias, which this "
                        "family lacks; use a balance loss"
                    )
                self.bias.build().check(num_experts, top_k, grouped)
        except ValueError as error:
            raise ValueError(f"model.balancing: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(ABC):
    """Base of a family's model configuration.

    A family subclasses this in its own module under `trimtab.models`, with its sizes as further fields, and
    writes functions that return a whole `TrainConfig`. Nothing else has to know of it.

    Args:
        balancing: how experts are balanced.
        num_layers: decoder layers.
        num_experts: E, routed experts of a layer.
        top_k: K, experts of a token.
        max_seq_len: longest row of tokens that the positions of the model cover.

    Raises:
        ValueError: sizes that are not positive, or K larger than E.
    """

    balancing: Annotated[Balancing, tyro.conf.Suppress]
    num_layers: int
    num_experts: int
    top_k: int
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("num_layers", "num_experts", "top_k", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; raise model.{name}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} must be in [1, num_experts={self.num_experts}]; lower model.top_k or "
                "raise model.num_experts"
            )

    @property
    def grouped(self) -> bool:
        """Whether selection is limited to expert groups."""
        return False

    @property
    def has_expert_bias(self) -> bool:
        """Whether routers have a bias that only selection sees."""
        return False

    @property
    def directory(self) -> str | None:
        """Directory that the model is of: its weights are where a run starts, its tokenizer is called "model"."""
        return None

    @property
    def takes_images(self) -> bool:
        """Whether the model has a vision tower."""
        return False

    def image_layout(self, vocab_size: int) -> ImageLayout:
        """How the model cuts images, and the tokens that stand for them.

        Args:
            vocab_size: ids of the tokenizer.

        Raises:
            ValueError: the model takes no images.
        """
        raise ValueError(f"{type(self).__name__} takes no images")

    def check_rows(self, *, packing: bool, compiled: bool) -> None:
        """Check that the model can be trained on such rows.

        Args:
            packing: rows hold several documents.
            compiled: decoder layers are compiled.

        Raises:
            ValueError: it cannot.
        """

    @property
    def num_first_stage_layers(self) -> int:
        """Decoder layers that the first pipeline stage must have."""
        return 0

    def check_parallel(self, degrees: Degrees) -> None:
        """Check that the model can be divided so. A family adds what it divides besides experts.

        Args:
            degrees: processes along each axis.

        Raises:
            ValueError: it cannot; the message names the size and the degree.
        """
        self.check_divides("expert_parallel_degree", degrees.ep, "num_experts")

    def check_divides(self, option: str, degree: int, *names: str) -> None:
        """Check that a degree of `ParallelismConfig` divides sizes of this model, given by their names.

        Raises:
            ValueError: it does not.
        """
        for name in names:
            if getattr(self, name) % degree:
                raise ValueError(
                    f"parallelism.{option}={degree} must divide model.{name}={getattr(self, name)}; "
                    "change one of them"
                )

    @abstractmethod
    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """Build the model with initialised float32 parameters, in training mode.

        Args:
            vocab_size: rows of the embedding.
            seq_len: S of the rows it will be trained on.

        Returns:
            A causal language model called as ``model(input_ids=..., position_ids=...)``, whose output has
            ``logits`` of shape (B, S, vocab_size), and whose documents are told apart by position ids that
            restart. Its routers can be found by `trimtab.attach`.
        """

"""AdamW and its learning rate: warm-up, a plateau, and a decay at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_WARMUP_SHARE, _DECAY_SHARE = 0.05, 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        lr: peak learning rate.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) are not decayed.

    Raises:
        ValueError: a value out of range.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Validate."""
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be a positive number; set optimizer.lr, for example to 3e-4")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"betas={self.betas} must each be in [0, 1); set optimizer.betas, for example to 0.9 0.95"
            )
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps} must be positive; set optimizer.eps, for example to 1e-8")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay={self.weight_decay} must be at least 0; raise optimizer.weight_decay"
            )

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """Return the optimiser of the trainable ones of these parameters.

        Parameters that are divided over different ranks are in groups apart: an optimiser's operators take
        one mesh at a time.
        """
        groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                groups.setdefault((parameter.dim() >= 2, mesh), []).append(parameter)
        chosen = [parameter for group in groups.values() for parameter in group]
        return torch.optim.AdamW(
            [
                {"params": group, "weight_decay": self.weight_decay if is_matrix else 0.0}
                for (is_matrix, _), group in groups.items()
            ],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=all(parameter.is_cuda for parameter in chosen),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LRSchedulerConfig:
    """Warmup-stable-decay: linear from 0, constant, linear to ``min_factor`` times the peak.

    Args:
        warmup_steps: steps of the rise; None for a twentieth of the run.
        decay_steps: steps of the fall at the end; None for a fifth of the run.
        min_factor: where the fall ends, as a share of the peak.

    Raises:
        ValueError: a negative number of steps or a factor outside [0, 1].
    """

    warmup_steps: int | None = None
    decay_steps: int | None = None
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("warmup_steps", "decay_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be at least 0; raise lr_scheduler.{name}")
        if not 0 <= self.min_factor <= 1:
            raise ValueError(f"min_factor={self.min_factor} must be in [0, 1]; set lr_scheduler.min_factor")

    def phases(self, num_steps: int) -> tuple[int, int]:
        """Steps of the rise and of the fall in a run of ``num_steps`` steps.

        Raises:
            ValueError: they do not fit into the run.
        """
        warmup, decay = self.warmup_steps, self.decay_steps
        if (warmup or 0) + (decay or 0) > num_steps:
            raise ValueError(
                f"lr_scheduler.warmup_steps={warmup or 0} and lr_scheduler.decay_steps={decay or 0} do not fit "
                f"into training.steps={num_steps}; lower them, or leave them out for 5 % and 20 % of the run"
            )
        if warmup is None:
            warmup = min(round(_WARMUP_SHARE * num_steps), num_steps - (decay or 0))
        if decay is None:
            decay = min(round(_DECAY_SHARE * num_steps), num_steps - warmup)
        return warmup, decay

    def factor(self, step: int, num_steps: int) -> float:
        """Share of the peak learning rate that optimiser step ``step`` uses, counted from 1."""
        warmup, decay = self.phases(num_steps)
        if step <= warmup:
            return step / warmup
        if step > num_steps - decay:
            remaining = (num_steps - step + 1) / (decay + 1)
            return self.min_factor + (1 - self.min_factor) * max(0.0, remaining)
        return 1.0

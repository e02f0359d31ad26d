"""Which parameters of a model a run trains: all of them, or adapters beside them; and whether routers learn."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from trimtab.integrations.discovery import FoundRouter
from trimtab.integrations.lora import Lora, Target, add_adapters
from trimtab.integrations.parallel import Divided
from trimtab.parallel.mesh import Degrees, Mesh
from trimtab.train.model import Balancing

_OF_LORA = ("rank", "alpha", "dropout", "target", "save_adapter")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """What is trained. The default trains everything, as pretraining does.

    Args:
        method: "full" trains the model's own parameters; "lora" freezes them and trains low-rank adapters (Hu et
            al. 2021, arXiv:2106.09685), which a model without them can be given later.
        router: "trained": routers learn, with their own weights under either method; "frozen": they keep those
            that they start with. Expert biases are no weights: a bias rule moves them under either.
        rank: of adapters.
        alpha: adapters are scaled by ``alpha / rank``.
        dropout: of the adapters' inputs.
        target: what gets adapters: "attention", "mlp" (dense feed-forwards and shared experts), "experts" (routed
            ones, each its own).
        save_adapter: write the adapter as peft reads it, into the run's folder ``adapter``, when the run ends.

    Raises:
        ValueError: a value out of range, or no target.
    """

    method: Literal["full", "lora"] = "full"
    router: Literal["trained", "frozen"] = "trained"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: tuple[Target, ...] = ("attention",)
    save_adapter: bool = True

    def __post_init__(self) -> None:
        """Validate."""
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1; raise finetune.rank")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be positive; raise finetune.alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1); lower finetune.dropout")
        if not self.target or len(set(self.target)) < len(self.target):
            raise ValueError(
                f"target={self.target} must name each of attention, mlp and experts at most once, and one of them; "
                "set finetune.target"
            )
        changed = [
            field.name
            for field in fields(self)
            if field.name in _OF_LORA and getattr(self, field.name) != field.default
        ]
        if self.method == "full" and changed:
            warnings.warn(f"finetune.{changed[0]} has no effect without finetune.method lora", stacklevel=3)

    @property
    def adapts(self) -> bool:
        """Whether the run trains adapters."""
        return self.method == "lora"

    @property
    def scale(self) -> float:
        """Factor on the product of an adapter's halves."""
        return self.alpha / self.rank

    def check_balancing(self, balancing: Balancing) -> None:
        """Warn of losses that cannot reach what they are about."""
        names = [entry.build().name for entry in balancing.objectives if entry.build().coef]
        if self.router == "frozen" and names:
            warnings.warn(
                f"finetune.router is frozen: {', '.join(names)} of model.balancing cannot move routers, and their "
                "gradient trains what feeds them instead; use a config without balance losses, or set "
                "finetune.router to trained",
                stacklevel=3,
            )

    def check_parallel(self, degrees: Degrees) -> None:
        """Check that what is trained can be had here, and divided so.

        Raises:
            ValueError: it cannot; the message names the option.
        """
        if self.adapts and importlib.util.find_spec("peft") is None:
            raise ValueError(
                "finetune.method='lora' needs the package peft; install it with: pip install 'trimtab[train]'"
            )
        if self.adapts and "experts" in self.target and degrees.etp > 1:
            raise ValueError(
                f"parallelism.expert_tensor_parallel_degree={degrees.etp} divides the hidden layer of each expert, "
                "for all of which its adapter has one matrix; set it to 1, or take experts out of finetune.target"
            )

    def apply(
        self,
        model: nn.Module,
        routers: Sequence[FoundRouter],
        *,
        mesh: Mesh | None = None,
        divided: Divided | None = None,
    ) -> None:
        """Add adapters to a model, or a pipeline stage of it, and freeze what is not trained, in place.

        Called after the model is divided and before FSDP; adapters have no values yet.

        Args:
            model: the model.
            routers: its routers.
            mesh: what it is divided over.
            divided: how; parts of adapters are added to it.
        """
        own = [p for router in routers for p in router.module.parameters() if p.requires_grad]
        if self.adapts:
            lora = Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, target=self.target)
            add_adapters(model, lora, routers, mesh=mesh, divided=divided)
        for parameter in own:
            parameter.requires_grad_(self.router == "trained")

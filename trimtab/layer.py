"""One balanced MoE layer, as the balancer sees it.

Shapes: E experts, K top-k.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.bias import BiasRule, LayerBias
from trimtab.scores import ScoreName


class RouterView(Protocol):
    """What the balancer must know of a router; `trimtab.integrations.discovery.FoundRouter` is one."""

    @property
    def canonical_name(self) -> str:
        """Path in the model."""
        ...

    @property
    def module(self) -> nn.Module:
        """The router, whose output the hook sees."""
        ...

    @property
    def num_experts(self) -> int:
        """E."""
        ...

    @property
    def top_k(self) -> int:
        """K."""
        ...

    @property
    def score(self) -> ScoreName:
        """Score function."""
        ...

    @property
    def block(self) -> nn.Module:
        """The module that calls the router."""
        ...

    @property
    def weight(self) -> Tensor | None:
        """(E, D) weight of the gate."""
        ...

    @property
    def expert_bias(self) -> Tensor | None:
        """(E,) live selection bias."""
        ...

    def add_to_expert_bias(self, delta_E: Tensor) -> None:
        """Move the selection bias in place."""
        ...

    @property
    def grouped(self) -> bool:
        """Whether selection is limited to expert groups."""
        ...


@dataclass(slots=True)
class Layer:
    """One balanced MoE layer.

    Args:
        router: the router.
        bias: its bias balancing; None if no rule moves its bias.
        running_load_E: (E,) decayed mean load, for MaxVio over many steps.
    """

    router: RouterView
    bias: LayerBias | None = None
    running_load_E: Tensor | None = None
    hooks: list[Any] = field(default_factory=list)


def layer_bias(rule: BiasRule | None, router: RouterView) -> LayerBias | None:
    """Bias balancing of one layer; None if no rule wants to move this router's bias.

    Raises:
        ValueError: the rule wants a router that has no expert bias, one in low precision, or one that the
            rule cannot serve.
    """
    if rule is None:
        return None
    name = router.canonical_name
    wanted = rule.config.layers
    if wanted is not None and not any(fnmatch(name, pattern) for pattern in wanted):
        return None
    bias = router.expert_bias
    if bias is None:
        raise ValueError(
            f"{type(rule).__name__} bias balancing needs an expert bias, but {name} "
            f"({type(router.module).__name__}) has none; use a balance loss for this model, or name the "
            "layers that have one with layers=(...)"
        )
    check_bias_dtype(name, bias, rule)
    try:
        rule.check(router.num_experts, router.top_k, router.grouped)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return LayerBias()


def check_bias_dtype(name: str, bias: Tensor, rule: BiasRule) -> None:
    """Raise a ValueError if updates of the expert bias would be rounded away."""
    if bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the expert bias of {name} is {bias.dtype}, in which updates of {rule.config.speed:g} are lost; "
            "keep it in float32, as transformers does when a checkpoint is loaded"
        )

"""One balanced MoE layer, as the balancer sees it.

Shapes: E experts, K top-k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimtab.bias import BiasRule, LayerBias
from trimtab.measure import StepNumbers
from trimtab.metrics import RUNNING_DECAY, LayerSnapshot
from trimtab.row import Row
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

    def snapshot(self, row: Row, measured: StepNumbers, count_error: Tensor | None) -> LayerSnapshot:
        """What metrics need of the step that ends; moves the running load on."""
        assert row.counts_AE is not None
        assert row.sizes is not None
        assert row.sizes_min is not None
        assert row.sizes_max is not None
        counts_E, bias_E = row.counts_AE[0], self.router.expert_bias
        load_E = counts_E.to(torch.float32) / counts_E.sum().clamp(min=1) * counts_E.numel()
        running_E = self.running_load_E
        running_E = load_E if running_E is None else torch.lerp(load_E, running_E.to(load_E), RUNNING_DECAY)
        self.running_load_E = running_E
        return LayerSnapshot(
            name=row.name,
            counts_E=counts_E,
            sizes=row.sizes,
            running_load_E=running_E,
            sizes_range=(row.sizes_min, row.sizes_max),
            losses=measured.losses,
            logit_max=measured.logit_max,
            router_entropy=measured.router_entropy,
            count_error=count_error,
            bias_E=None if bias_E is None else bias_E.detach().clone(),
        )


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


def save_layers(layers: Sequence[Layer], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What the next step needs of each layer, by name, on the CPU."""
    saved = {}
    for layer, row in zip(layers, rows, strict=True):
        entry: dict[str, Any] = {
            **row.state(),
            "running_load_E": layer.running_load_E,
            "momentum_E": None if layer.bias is None else layer.bias.state.momentum_E,
            "bias_enabled": layer.bias is not None and layer.bias.enabled,
        }
        # On the CPU: it may be read on another rank, which has no business on this one's device.
        saved[row.name] = {
            name: value.cpu() if isinstance(value, Tensor) else value for name, value in entry.items()
        }
    return saved


def _device_of(layer: Layer) -> torch.device | None:
    """Where a layer's counts will be; None if it is not known yet."""
    parameter = next(layer.router.module.parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


def load_layers(layers: Sequence[Layer], rows: Sequence[Row], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore what `save_layers` returned.

    Raises:
        ValueError: the state belongs to a model with other MoE layers.
    """
    have, given = {row.name for row in rows}, set(saved)
    if have != given:
        raise ValueError(
            f"the balancer state has layers {sorted(given - have)[:3]} that the model lacks and lacks "
            f"{sorted(have - given)[:3]}; load it into the model it was saved with"
        )
    for layer, row in zip(layers, rows, strict=True):
        entry: dict[str, Any] = dict(saved[row.name])
        device = _device_of(layer)
        if device is not None:
            # Moved here once, or the first step would copy it in each of its backwards, and wait.
            entry |= {name: value.to(device) for name, value in entry.items() if isinstance(value, Tensor)}
        row.load_state(entry)
        layer.running_load_E = entry["running_load_E"]
        if layer.bias is not None:
            layer.bias.state.momentum_E = entry["momentum_E"]
            layer.bias.enabled = entry["bias_enabled"]

"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on a model that may be divided over ranks.

Linears get peft's own layers: ``q_proj`` becomes a `peft.tuners.lora.Linear` with the linear as ``base_layer``, and
names, results and files are those of peft. Stacked experts get adapters of trimtab's, which are peft's
``target_parameters`` in every number, but are divided over ep as the experts are.

Where attention is divided over tp, one half of each adapter lies along heads and is divided with them: B of a
linear whose outputs are heads, A of the one whose inputs are. The other half is whole on each rank, and its
gradient is partial over tp, as that of every parameter outside attention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trimtab.integrations.attention import ColumnLinear, RowLinear, shard_linear
from trimtab.integrations.discovery import FoundRouter
from trimtab.integrations.empty import INITIALISE
from trimtab.integrations.expert_adapters import LORA_A, LORA_B, add_expert_adapters, draw_a, draw_b
from trimtab.integrations.experts import layout_of
from trimtab.integrations.parallel import Divided, decoder_layers
from trimtab.parallel.mesh import Mesh

Target = Literal["attention", "mlp", "experts"]
#: Name of the adapter within peft's layers.
ADAPTER = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """What an adapter is.

    Args:
        rank: r.
        alpha: the product B A is scaled by ``alpha / rank``.
        dropout: of its input while it trains.
        target: what it is added to.
    """

    rank: int
    alpha: float
    dropout: float
    target: tuple[Target, ...]


def add_adapters(
    model: nn.Module,
    lora: Lora,
    routers: Sequence[FoundRouter],
    *,
    mesh: Mesh | None = None,
    divided: Divided | None = None,
) -> None:
    """Add adapters to a model or one pipeline stage of it, in place, and freeze everything else.

    Called after the model is divided and before FSDP. The adapters are on the meta device.

    Args:
        model: the model.
        lora: what to add.
        routers: its routers, which get none.
        mesh: what the model is divided over.
        divided: how; the parts of adapters that lie along heads are added to it.

    Raises:
        ValueError: experts whose hidden layers are divided.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _inject(model, routers, lora)
    if divided is not None and mesh is not None:
        _divide(model, divided, mesh)
    if "experts" in lora.target:
        for layer in own_layers(model):
            for module in layer.modules():
                if (layout := layout_of(module)) is not None:
                    _initialised(
                        *add_expert_adapters(
                            module,
                            rank=lora.rank,
                            scale=lora.alpha / lora.rank,
                            dropout=lora.dropout,
                            transposed=layout.transposed,
                            mesh=mesh,
                        )
                    )


def own_layers(model: nn.Module) -> list[nn.Module]:
    """Decoder layers of the stock model: not those of multi-token prediction, which its class does not have."""
    mtp = getattr(model, "mtp", None)
    further = set() if mtp is None else set(mtp.modules())
    return [layer for layer in decoder_layers(model) if layer not in further]


def target_linears(
    layer: nn.Module, routers: Sequence[FoundRouter], target: Collection[Target]
) -> Iterator[str]:
    """Names within a decoder layer of the linears that adapters are added to.

    "attention" is every linear of what mixes tokens, whatever kind of attention that is; "mlp" every linear of
    dense feed-forwards and shared experts. Routers and gates of one output are neither.
    """
    routing = {module for router in routers for module in router.module.modules()}
    for prefix, child in layer.named_children():
        kind: Target = "attention" if _mixes_tokens(child) else "mlp"
        if kind not in target:
            continue
        for name, module in child.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear) and module not in routing and module.out_features > 1:
                yield name


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return not {LORA_A, LORA_B}.isdisjoint(name.split("."))


def _mixes_tokens(module: nn.Module) -> bool:
    """Whether a child of a decoder layer is its attention, or what stands in for it."""
    if hasattr(module, "o_proj") or hasattr(module, "out_proj"):
        return True
    return any(word in type(module).__name__ for word in ("Attention", "DeltaNet", "Mamba", "Conv"))


def _inject(model: nn.Module, routers: Sequence[FoundRouter], lora: Lora) -> None:
    # A list of layers and not the model, of which peft knows older releases: it would take shared experts for
    # routed ones.
    layers = nn.ModuleList(own_layers(model))
    names = [
        f"{i}.{name}"
        for i, layer in enumerate(layers)
        for name in target_linears(layer, routers, lora.target)
    ]
    if not names:
        return
    from peft import LoraConfig, inject_adapter_in_model

    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    config = LoraConfig(**settings, target_modules=names)
    inject_adapter_in_model(config, layers, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for layer in _adapted(model):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        for half in (a, b):
            half.to(layer.base_layer.weight.dtype)
        _initialised(a, b)


def _initialised(a: nn.Module, b: nn.Module) -> None:
    """Say how both halves of adapters begin."""
    setattr(a, INITIALISE, draw_a)
    setattr(b, INITIALISE, draw_b)


def _adapted(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import Linear

    return (module for module in model.modules() if isinstance(module, Linear))


def _divide(model: nn.Module, divided: Divided, mesh: Mesh) -> None:
    """Divide the halves that lie along heads, and name them beside the linears of their attention."""
    if not divided.heads:
        return
    adapters = {layer.base_layer: layer for layer in _adapted(model)}
    for group in divided.heads:
        for linear in [module for module in group if isinstance(module, nn.Linear)]:
            layer = adapters.get(linear)
            if layer is None:
                continue
            is_row = isinstance(linear, RowLinear)
            half: Any = (layer.lora_A if is_row else layer.lora_B)[ADAPTER]
            half.__class__ = RowLinear if is_row else ColumnLinear
            # peft makes adapters of what the rank has of a weight, or of all of it, depending on its version.
            layer.in_features, layer.out_features = linear.in_features, linear.out_features
            rank, whole = layer.r[ADAPTER], linear.in_features if is_row else linear.out_features
            shape = (rank, whole) if is_row else (whole, rank)
            half.weight = nn.Parameter(torch.empty(shape, dtype=half.weight.dtype, device="meta"))
            shard_linear(half, "weight", 1 if is_row else 0, mesh)
            group.append(half)

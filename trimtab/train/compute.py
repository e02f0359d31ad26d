"""How the model is run: device, precision, activation checkpointing, compilation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from trimtab.parallel.zero_bubble import HasCurrent, keep_microbatch

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["none", "bfloat16"]

# Products of matrices and exchanges between ranks are what recomputation costs; the rest is cheap.
_EXPENSIVE = (
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_attention_math",
    "trimtab::grouped_mm",
    "trimtab::gather",
    "trimtab::reduce_scatter",
    "trimtab::exchange_counts",
    "trimtab::exchange_rows",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileConfig:
    """torch.compile of each decoder layer, as one graph without breaks.

    Args:
        enable: compile. The first step then takes up to a minute longer.
        backend: backend of torch.compile: "inductor" generates code, "aot_eager" only traces.
    """

    enable: bool = False
    backend: str = "inductor"

    def __post_init__(self) -> None:
        """Validate."""
        if self.enable and self.backend not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise ValueError(f"backend={self.backend!r} must be one of {sorted(known)}; set compile.backend")

    def apply(self, layers: Sequence[nn.Module], *, whole: bool = True) -> None:
        """Compile layers in place; their names and state dict stay.

        Args:
            layers: decoder layers.
            whole: each is one graph. Not so where FSDP gathers parameters inside of them: a graph ends there.
        """
        if self.enable:
            for layer in layers:
                layer.compile(fullgraph=whole, backend=self.backend)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationCheckpointConfig:
    """What backward computes again instead of keeping.

    Args:
        mode: "none" keeps all activations; "selective" keeps products of matrices and attention, and
            computes the rest of each decoder layer again; "full" keeps only the layers' inputs.
    """

    mode: Literal["none", "selective", "full"] = "none"

    def apply(self, model: nn.Module, contexts: Sequence[HasCurrent] = ()) -> None:
        """Switch checkpointing on in place.

        Args:
            model: the model, or a pipeline stage of it.
            contexts: of its balancers, read when a layer runs.

        Raises:
            ValueError: the model has no checkpointing.
        """
        if self.mode == "none":
            return
        # transformers 5.23 renamed it; either name takes the arguments of torch's checkpoint.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ValueError(
                f"activation_checkpoint.mode={self.mode!r}: {type(model).__name__} has no checkpointing; "
                "set activation_checkpoint.mode to none"
            )
        context_fn = None
        if self.mode == "selective":
            context_fn = functools.partial(create_selective_checkpoint_contexts, keep_products_of_matrices)
        enable({"use_reentrant": False, "context_fn": keep_microbatch(contexts, context_fn)})


def keep_products_of_matrices(
    context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Policy of selective checkpointing: keep what `_EXPENSIVE` names."""
    if operator.name().split(".")[0] in _EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def find_device(device: Device) -> torch.device:
    """The device to train on: the machine's GPU if it has one, else its CPU.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "training.device='cuda', but PyTorch finds no GPU here; leave training.device at auto, or install "
            "a PyTorch built for your GPU's driver"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Check that a device computes in a precision.

    Raises:
        ValueError: it does not.
    """
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"training.mixed_precision='bfloat16' is not supported by {torch.cuda.get_device_name(device)}; "
            "set training.mixed_precision to none"
        )


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which the model's forward runs."""
    if precision == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def keep_routers_in_float32(routers: Sequence[nn.Module], device: torch.device) -> None:
    """Let routers compute outside autocast, which would round their float32 logits to bfloat16."""
    for router in routers:
        router.forward = functools.partial(_outside_autocast, router.forward, device.type)


def _outside_autocast(forward: Callable[..., Any], device_type: str, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device_type, enabled=False):
        return forward(*args, **kwargs)

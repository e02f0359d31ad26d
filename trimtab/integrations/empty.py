"""Models of transformers without values: built on the meta device, filled when every rank has its part.

Legend: E experts, e experts of this rank.

Initial values are those of transformers (`_init_weights`), drawn for each module by itself with a seed made of the
run's seed and the module's name, and for stacked experts by each expert. So a tensor's values depend neither on the
ranks nor on what was drawn before, and no rank holds more than its own part and one whole module, or one expert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.experts import layout_of

# On a module: (module) -> None, sets the initial values of its own parameters, which transformers does not know.
INITIALISE = "_trimtab_initialise"
# Shape of a parameter as the stock model has it, by name within its module.
Shapes = Mapping[str, tuple[int, ...]]


def make_buffers(model: Any) -> None:
    """Give the buffers of a model on the meta device their memory, on the CPU, and their values.

    Raises:
        ValueError: transformers does not say what is in one of them.
    """
    for name, module in model.named_modules():
        owned = {
            key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta
        }
        if not owned:
            continue
        with torch.device("cpu"):
            for key, buffer in owned.items():
                module._buffers[key] = _unset(buffer.shape, buffer.dtype)
            model._init_weights(module)
        for key in owned:
            if _is_unset(module._buffers[key]):
                raise ValueError(
                    f"{type(module).__name__} at {name!r} does not initialise its buffer {key!r} outside its "
                    "constructor; build the model with real tensors"
                )


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move what has memory to a device, in place; what is on the meta device stays."""
    _apply(module, lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give what is on the meta device memory on another, in place, with values that are not set."""
    _apply(module, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change tensors in place; parameters that are one stay one, also where they move between kinds of devices."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, name))
    module._apply(change)
    for (first, first_name), *others in places.values():
        for owner, name in others:
            owner._parameters[name] = first._parameters[first_name]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Initial values of some of the experts of a module, or of the module.

    Args:
        values: by parameter name within the module, in the stock shape; of experts, with E = 1.
        expert: index of the expert; None if the module's parameters are not stacked experts'.
    """

    values: dict[str, Tensor]
    expert: int | None


def draw(
    model: Any,
    name: str,
    module: nn.Module,
    parent: nn.Module | None,
    shapes: Shapes,
    *,
    seed: int,
    wants_expert: Callable[[int], bool] = lambda expert: True,
) -> Iterator[Drawn]:
    """Initial values of one module's own parameters, on the CPU.

    Args:
        model: the model of transformers, which says how modules are initialised.
        name: of the module in the stock model; part of the seed.
        module: the module, in whatever state; its attributes are read.
        parent: the module that it is a child of.
        shapes: of the parameters.
        seed: of the run.
        wants_expert: which experts to draw, where parameters are stacked.

    Yields:
        The values of one expert at a time, or once those of the module.

    Raises:
        ValueError: transformers does not say how to initialise a parameter.
    """
    if layout_of(module) is None:
        yield Drawn(_draw(model, name, module, parent, shapes, f"{seed}/{name}"), None)
        return
    (num_experts,) = {shape[0] for shape in shapes.values()}
    one = {key: (1, *shape[1:]) for key, shape in shapes.items()}
    for expert in filter(wants_expert, range(num_experts)):
        yield Drawn(_draw(model, name, module, parent, one, f"{seed}/{name}/{expert}"), expert)


def _draw(
    model: Any, name: str, module: nn.Module, parent: nn.Module | None, shapes: Shapes, key: str
) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
        values = {leaf: nn.Parameter(_unset(shape, torch.float32)) for leaf, shape in shapes.items()}
        hollow = _copy(module, parameters={**_hollow_parameters(module), **values})
        getattr(module, INITIALISE, model._init_weights)(hollow)
        if parent is not None and any(_is_unset(value) for value in values.values()):
            # Some blocks initialise their router.
            children = {
                key: hollow
                if child is module
                else child and _copy(child, parameters=_hollow_parameters(child))
                for key, child in parent._modules.items()
            }
            model._init_weights(_copy(parent, parameters=_hollow_parameters(parent), modules=children))
    for leaf, value in values.items():
        if _is_unset(value):
            raise ValueError(
                f"{type(model).__name__} does not say how to initialise {leaf!r} of {type(module).__name__} at "
                f"{name!r}; build the model with real tensors"
            )
    return {leaf: value.detach() for leaf, value in values.items()}


def _hollow_parameters(module: nn.Module) -> dict[str, Any]:
    """Stand-ins on the meta device for a module's own parameters, which must not be written to."""
    return {
        key: parameter
        if parameter is None
        else nn.Parameter(torch.empty(tuple(parameter.shape), device="meta"))
        for key, parameter in module._parameters.items()
    }


def _copy(
    module: nn.Module, *, parameters: dict[str, Any], modules: dict[str, Any] | None = None
) -> nn.Module:
    """A module with the same class and attributes, other parameters, and copies of its buffers."""
    cls = type(module)
    hollow: nn.Module = object.__new__(cls)
    buffers = {key: buffer if buffer is None else buffer.clone() for key, buffer in module._buffers.items()}
    hollow.__dict__ = {**module.__dict__, "_parameters": parameters, "_buffers": buffers}
    if modules is not None:
        hollow.__dict__["_modules"] = modules
    return hollow


def _unset(shape: Any, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.full(tuple(shape), float("nan"), dtype=dtype)
    return torch.full(tuple(shape), torch.iinfo(dtype).min if dtype != torch.bool else 0, dtype=dtype)


def _is_unset(tensor: Tensor | None) -> bool:
    if tensor is None or not tensor.numel():
        return False
    flat = tensor.detach().reshape(-1)
    return (
        bool(flat.isnan().any())
        if tensor.is_floating_point()
        else bool((flat == _unset((1,), tensor.dtype)).all())
    )

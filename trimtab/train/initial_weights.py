"""Initial weights of this rank's part of a model: each tensor is what it would be in one process.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.empty import Shapes, draw
from trimtab.parallel.experts import SPLIT_DIMS
from trimtab.train.checkpoint_state import Parts, canonical_name, parts_of


@torch.no_grad()
def draw_weights(
    parts: Sequence[nn.Module], *, seed: int, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Set parameters to their initial values, in place, without communication.

    Args:
        parts: of a transformers model, on this rank, divided in any way.
        seed: of the run.
        wanted: which parameters, by their names in the stock model.

    Raises:
        ValueError: transformers does not say how to initialise a parameter.
    """
    done: set[int] = set()
    for part in parts:
        parents = {id(child): module for module in part.modules() for child in module.children()}
        for full_name, module in part.named_modules():
            name = canonical_name(full_name)
            targets = _targets(name, module, wanted, done)
            if targets:
                # All of the module's own: values must not depend on which are wanted.
                shapes = {key: parts.shape for key, parts in _own_parts(module).items()}
                _fill(part, name, module, parents.get(id(module)), targets, shapes, seed)


def _targets(name: str, module: nn.Module, wanted: Callable[[str], bool], done: set[int]) -> dict[str, Parts]:
    targets = {}
    for key, parts in _own_parts(module).items():
        parameter = module._parameters[key]
        if id(parameter) in done or not wanted(f"{name}.{key}" if name else key):
            continue
        done.add(id(parameter))  # tied parameters have the values of the first
        targets[key] = parts
    return targets


def _own_parts(module: nn.Module) -> dict[str, Parts]:
    split_dims = getattr(module, SPLIT_DIMS, {})
    return {
        key: parts_of(parameter, split_dims.get(key))
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def _fill(
    model: Any,
    name: str,
    module: nn.Module,
    parent: nn.Module | None,
    targets: dict[str, Parts],
    shapes: Shapes,
    seed: int,
) -> None:
    held = {
        expert
        for parts in targets.values()
        for offset, box in parts.boxes.items()
        if box.dim()
        for expert in range(offset[0], offset[0] + box.shape[0])
    }
    if not any(parts.boxes for parts in targets.values()):
        return
    for drawn in draw(model, name, module, parent, shapes, seed=seed, wants_expert=held.__contains__):
        for key, parts in targets.items():
            for offset, box in parts.boxes.items():
                _copy_box(box, offset, drawn.values[key], drawn.expert)


def _copy_box(box: Tensor, offset: tuple[int, ...], value: Tensor, expert: int | None) -> None:
    """Copy what a box has of a value: a whole tensor, or the (1, ...) of one expert."""
    if expert is not None:
        if not offset[0] <= expert < offset[0] + box.shape[0]:
            return
        place = expert - offset[0]
        box, offset = box[place : place + 1], (0, *offset[1:])
    index = tuple(slice(start, start + size) for start, size in zip(offset, box.shape, strict=True))
    box.copy_(value[index])

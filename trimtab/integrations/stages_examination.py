"""Whether a model can be divided into stages: it is run with everything that stages divide taken out.

Hidden states must then come out as they went in, and layers must be given nothing that one of them could change
for another. Costs no more than the model's masks and rotary angles of ten tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.stages_anatomy import Anatomy, PassThrough, locate, refusal, replace
from trimtab.integrations.vision import FixedTower, sample_images


@dataclass
class _Record:
    """What one forward of the emptied model did.

    Args:
        calls: arguments of each layer's call: (layer, hidden states, keyword arguments).
        after: names of the owner's children called after the last layer.
    """

    calls: list[tuple[int, Any, dict[str, Any]]] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


def examine(model: nn.Module) -> Anatomy:
    """The parts of a model, if hidden states are all that goes from each to the next.

    Raises:
        ValueError: they are not.
    """
    anatomy = locate(model)
    if any(buffer.is_meta for buffer in model.buffers()):
        raise ValueError(
            f"{type(model).__name__} has buffers on the meta device, where it cannot be tried out; build it with "
            "real buffers before dividing it"
        )
    weight: Any = model.get_submodule(anatomy.embedding).weight
    device = _device(model)
    hidden = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device, weight.dtype).requires_grad_()
    ids = torch.ones(2, 5, dtype=torch.int64, device=device)
    # Which of the owner's children come after the layers shows only when it runs.
    final = _run_emptied(model, anatomy, {"inputs_embeds": hidden})[0].after
    anatomy = changed(anatomy, final=tuple(name for name in final if name != anatomy.head))
    _check_nothing_else_learns(model, anatomy)
    inner, out = _run_emptied(model, anatomy, {"inputs_embeds": hidden})
    _check_identity(model, inner, hidden, out, len(anatomy.layers))
    first, _ = _run_emptied(model, anatomy, {"input_ids": ids}, embedded=hidden)
    for (_, _, there), (_, _, here) in zip(inner.calls, first.calls, strict=True):
        differing = [name for name in here if (here[name] is None) != (there.get(name) is None)]
        if differing:
            raise ValueError(
                refusal(model, f"its layers read {differing[0]!r}, which only the first stage would have")
            )
    if anatomy.first:
        anatomy = changed(anatomy, num_first=_layers_that_images_reach(model, anatomy, hidden))
    return anatomy


def _layers_that_images_reach(model: nn.Module, anatomy: Anatomy, hidden: Tensor) -> int:
    """How many layers must be where images are: after them, only hidden states tell of images.

    Raises:
        ValueError: a later layer is given something else that depends on them.
    """
    sample = sample_images(model, (hidden.shape[0], hidden.shape[1]))
    images = {name: value.to(hidden.device) for name, value in sample.items()}
    inner_tokens = {"inputs_embeds": hidden, "position_ids": images["position_ids"]}
    inner, out = _run_emptied(model, anatomy, inner_tokens)
    _check_identity(model, inner, hidden, out, len(anatomy.layers))
    first, out = _run_emptied(model, anatomy, images, embedded=hidden)
    if [index for index, _, _ in first.calls] != list(range(len(anatomy.layers))):
        raise ValueError(refusal(model, "given images, its layers do not run once each, in order"))
    passed = [*(given for _, given, _ in first.calls), out]
    changed_after = [i for i in range(len(anatomy.layers)) if not torch.equal(passed[i], passed[i + 1])]
    num_first = 1 + max(changed_after, default=-1)
    for (index, _, without), (_, _, with_images) in zip(inner.calls, first.calls, strict=True):
        for name in without.keys() | with_images.keys():
            if index >= num_first and not _equal(without.get(name), with_images.get(name)):
                reason = (
                    f"layer {index} reads {name!r}, which depends on images, and they are on the first stage"
                )
                raise ValueError(refusal(model, reason))
    return num_first


def _device(model: nn.Module) -> torch.device:
    """Where a model has values: parameters may be on the meta device, buffers are not."""
    places = (tensor.device for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    return next(places, torch.device("cpu"))


def _check_nothing_else_learns(model: nn.Module, anatomy: Anatomy) -> None:
    """Raise if a parameter would be on more stages than one."""
    places = (anatomy.embedding, anatomy.head, *anatomy.first, *anatomy.final)
    if anatomy.mtp is not None:
        places = (*places, anatomy.mtp)
    divided = {
        p for module in (anatomy.layers, *map(model.get_submodule, places)) for p in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter not in divided:
            reason = f"every stage would hold and train a copy of {name!r}, which is in no decoder layer"
            raise ValueError(refusal(model, reason))


def _run_emptied(
    model: nn.Module, anatomy: Anatomy, tokens: dict[str, Tensor], embedded: Tensor | None = None
) -> tuple[_Record, Tensor]:
    """Run the model with pass-throughs for everything that stages divide; the model is left as it was."""
    record = _Record()
    device = next(iter(tokens.values())).device
    random = torch.random.fork_rng(devices=[] if device.type == "cpu" else [device])
    with _emptied(model, anatomy, record, embedded), torch.enable_grad(), random:
        try:
            output: Any = model(**tokens, use_cache=False)
            return record, output.logits
        except Exception as error:
            reason = f"its forward fails without them ({type(error).__name__}: {error})"
            raise ValueError(refusal(model, reason)) from error


@contextmanager
def _emptied(model: nn.Module, anatomy: Anatomy, record: _Record, embedded: Tensor | None) -> Iterator[None]:
    layers, owner = list(anatomy.layers), model.get_submodule(anatomy.owner)
    modes = [(module, module.training) for module in model.modules()]
    old: dict[str, nn.Module] = {}
    hooks: list[Any] = []
    empty: list[tuple[nn.Module, str, nn.Parameter]] = []
    # In training mode: dropout on embeddings would be drawn again on every stage.
    model.train()
    try:
        for index, layer in enumerate(layers):
            anatomy.layers[index] = _RecordedLayer(layer, index, record)
        weight: Any = model.get_submodule(anatomy.embedding).weight
        old[anatomy.embedding] = replace(model, anatomy.embedding, _FixedEmbedding(embedded))
        for name in anatomy.first:
            tower = FixedTower(model.get_submodule(name), weight.shape[1], weight.dtype)
            old[name] = replace(model, name, tower)
        for name in (anatomy.head, *anatomy.final):
            old[name] = replace(model, name)
        for name, child in owner.named_children():
            path = f"{anatomy.owner}.{name}" if anatomy.owner else name
            if child is not anatomy.layers:
                hooks.append(child.register_forward_hook(_after_layers(path, record, len(layers))))
        empty = [
            (m, key, p)
            for m in model.modules()
            for key, p in m._parameters.items()
            if p is not None and p.is_meta
        ]
        for module, key, parameter in empty:
            # One zero for all: what the final norm makes of hidden states does not matter until it is found.
            zeros = torch.zeros((), dtype=parameter.dtype, device=_device(model)).expand(parameter.shape)
            module._parameters[key] = nn.Parameter(zeros)
        yield
    finally:
        for module, key, parameter in empty:
            module._parameters[key] = parameter
        for hook in hooks:
            hook.remove()
        for name, module in old.items():
            replace(model, name, module)
        for index, layer in enumerate(layers):
            anatomy.layers[index] = layer
        for module, training in modes:
            module.training = training


class _RecordedLayer(PassThrough):
    """A pass-through that writes down what it is called with."""

    def __init__(self, replaced: nn.Module, index: int, record: _Record) -> None:
        super().__init__(replaced)
        self.index, self.record = index, record

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Identity."""
        positional = {f"argument {place}": value for place, value in enumerate(args, start=2)}
        self.record.calls.append((self.index, hidden_states, positional | kwargs))
        return hidden_states


class _FixedEmbedding(nn.Module):
    """Embeds any token ids as the same hidden states."""

    def __init__(self, embedded: Tensor | None) -> None:
        super().__init__()
        self.embedded = embedded
        # For models that ask where their embedding is.
        self.register_buffer("weight", None if embedded is None else torch.empty_like(embedded[0]))

    def forward(self, input_ids: Tensor) -> Tensor | None:
        """The hidden states."""
        return self.embedded


def _after_layers(name: str, record: _Record, num_layers: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if len(record.calls) >= num_layers:
            record.after.append(name)

    return hook


def _check_identity(model: nn.Module, record: _Record, hidden: Tensor, out: Tensor, num_layers: int) -> None:
    """Raise unless the emptied model passed hidden states on as they were, and nothing beside them."""
    if [index for index, _, _ in record.calls] != list(range(num_layers)):
        raise ValueError(refusal(model, "its layers do not run once each, in order"))
    for index, given, arguments in record.calls:
        if not _same(given, hidden):
            raise ValueError(
                refusal(model, f"it changes hidden states before layer {index} even if given inputs_embeds")
            )
        for name, value in arguments.items():
            if not _is_stateless(value):
                raise ValueError(refusal(model, f"its layers share more than hidden states, in {name!r}"))
    if not _same(out, hidden):
        raise ValueError(
            refusal(model, "it changes hidden states between its last layer and its head, or after")
        )


def _same(value: Any, hidden: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == hidden.dtype
        and value.shape == hidden.shape
        and torch.equal(value, hidden)
    )


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are the same values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _same(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)


def _is_stateless(value: Any) -> bool:
    """Whether an argument of all layers cannot carry anything from one to the next."""
    if isinstance(value, Tensor):
        return not value.requires_grad
    if isinstance(value, Mapping):
        return len(value) > 0 and all(_is_stateless(entry) for entry in value.values())
    if isinstance(value, tuple):
        return all(_is_stateless(entry) for entry in value)
    # A mask of flexible attention is an object of torch.
    torch_object = type(value).__module__.partition(".")[0] == "torch"
    return value is None or torch_object or isinstance(value, bool | int | float | str)

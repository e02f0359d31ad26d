"""Where a transformers causal language model keeps what pipeline stages divide, and what takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from trimtab.integrations.vision import tower_of

# Name of the modules of multi-token prediction in a model, as in released checkpoints of families that name them.
MTP = "mtp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """Where a model keeps what stages divide; names are paths of modules.

    Args:
        layers: its decoder layers.
        owner: module that calls them.
        embedding: token embedding.
        head: what makes logits of hidden states.
        final: what the owner calls after the last layer: the final norm.
        mtp: modules of multi-token prediction, if the model has any: they follow the head.
        tied: embedding and head are one parameter.
        first: what the first stage alone runs before its layers, beside the embedding: a vision tower.
        num_first: layers that the first stage must have, because what comes of images is added after them.
    """

    layers: nn.ModuleList
    owner: str
    embedding: str
    head: str
    final: tuple[str, ...] = ()
    mtp: str | None = None
    tied: bool = False
    first: tuple[str, ...] = ()
    num_first: int = 0

    @property
    def last_embeds(self) -> bool:
        """Whether the last stage needs the embedding as well as the first."""
        return self.tied or self.mtp is not None


class PassThrough(nn.Module):
    """Returns the hidden states it is called with.

    Keeps plain attributes of the module it replaces and, by name, those of its children: some models' loops read
    from a layer which mask it wants.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.training = replaced.training
        for name, value in _plain_attributes(replaced).items():
            setattr(self, name, value)
        for name, child in replaced.named_children():
            setattr(self, name, SimpleNamespace(**_plain_attributes(child)))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Identity."""
        return hidden_states


class NoHead(PassThrough):
    """A pass-through that returns no view, as models' slices of hidden states are.

    Schedules detach what a stage returned in place, and FSDP puts a hook on it that would not survive that.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Identity."""
        return hidden_states.clone() if hidden_states._is_view() else hidden_states


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    own = nn.Module().__dict__
    return {
        name: value
        for name, value in vars(module).items()
        if name not in own and (value is None or isinstance(value, bool | int | float | str))
    }


def replace(model: nn.Module, name: str, new: nn.Module | None = None) -> nn.Module:
    """Put a module (a pass-through by default) in a place; return what was there."""
    old = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, PassThrough(old) if new is None else new)
    return old


def locate(model: nn.Module) -> Anatomy:
    """Find the parts of a model by what transformers says of them.

    Raises:
        ValueError: it has not all of them.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_layers = getattr(text_config, "num_hidden_layers", None)
    tower = tower_of(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not (tower is not None and name.startswith(f"{tower}."))
        and len(module) == num_layers
        and all("Layer" in type(layer).__name__ or "Block" in type(layer).__name__ for layer in module)
        and name.partition(".")[0] != MTP
    ]
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (
        getattr(model, getter, lambda: None)() for getter in ("get_input_embeddings", "get_output_embeddings")
    )
    if len(lists) != 1 or embedding is None or head is None:
        missing = (
            "an embedding and a head" if len(lists) == 1 else f"one list of its {num_layers} decoder layers"
        )
        raise ValueError(refusal(model, f"it does not say where it has {missing}"))
    ((layers_name, layers),) = lists
    return Anatomy(
        layers=layers,
        owner=layers_name.rpartition(".")[0],
        embedding=names[id(embedding)],
        head=names[id(head)],
        mtp=MTP if hasattr(model, MTP) else None,
        tied=embedding.weight is head.weight,
        first=() if tower is None else (tower,),
    )


def refusal(model: nn.Module, reason: str) -> str:
    """What to say of a model that cannot be divided."""
    return (
        f"{type(model).__name__} cannot be divided into pipeline stages: {reason}; train it without pipeline "
        "parallelism (pp=1)"
    )

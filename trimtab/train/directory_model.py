"""Models of directories that hold a configuration of transformers: their classes, sizes and families.

Legend: E experts, K top-k.
"""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.integrations.discovery import discover
from trimtab.integrations.empty import make_buffers
from trimtab.integrations.linear_attention import separate_documents
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.model import Balancing
from trimtab.train.registry import load_module, module_names

LONGEST = 2**31  # positions of a model that does not say how many it has


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the trainer must know of a model.

    Args:
        num_layers: decoder layers.
        num_experts: E.
        top_k: K.
        max_seq_len: positions.
        grouped: selection is limited to expert groups.
        has_expert_bias: routers have a bias that only selection sees.
        mixes_documents: layers would carry one document of a row into the next.
    """

    num_layers: int
    num_experts: int
    top_k: int
    max_seq_len: int
    grouped: bool
    has_expert_bias: bool
    mixes_documents: bool


def sizes_of(path: str) -> Sizes:
    """Sizes of a directory's model.

    Raises:
        ValueError: the directory holds no model that can be trained.
    """
    config = Path(path).expanduser() / "config.json"
    return _examine(path, config.stat().st_mtime_ns if config.is_file() else 0)


@functools.lru_cache(maxsize=4)
def _examine(path: str, changed: int) -> Sizes:
    """Sizes of a directory's model, read off the model; it takes seconds where there are many layers."""
    architecture, config = read_model(path)
    model = build_model(architecture, config)
    routers = discover(model)
    text, first = config.get_text_config(), routers[0]
    if any((r.num_experts, r.top_k) != (first.num_experts, first.top_k) for r in routers):
        raise ValueError(
            f"{path}: layers have different numbers of experts, which the trainer does not serve"
        )
    return Sizes(
        num_layers=text.num_hidden_layers,
        num_experts=first.num_experts,
        top_k=first.top_k,
        max_seq_len=getattr(text, "max_position_embeddings", LONGEST),
        grouped=first.grouped,
        has_expert_bias=first.expert_bias is not None,
        mixes_documents=_mixes_documents(config, model),
    )


def read_model(path: str) -> tuple[str, Any]:
    """Class and configuration of a directory's model, for training.

    Raises:
        ValueError: the directory holds no configuration of a model that transformers has.
    """
    import transformers

    folder = Path(path).expanduser()
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
        config: Any = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"model.path={path!r} holds no configuration that transformers reads ({error}); give a directory with "
            "config.json and weights, such as save_pretrained and trimtab export write"
        ) from error
    architecture = next(iter(architectures or ()), None)
    if architecture is None or not hasattr(transformers, architecture):
        raise ValueError(
            f"{folder / 'config.json'}: architectures={architectures} names no class of transformers "
            f"{transformers.__version__}; install the version that the model needs, or complete the file"
        )
    text = config.get_text_config()
    text.use_cache = False
    for name, value in (("output_router_logits", False), ("num_mtp_layers", 0)):
        if hasattr(text, name):
            setattr(text, name, value)
    return architecture, config


def build_model(architecture: str, config: Any) -> Any:
    """The model, its parameters on the meta device, its buffers real and initialised, in training mode."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    make_buffers(model)
    if _has_delta_networks(model):
        separate_documents(model)
    return model.train()


def _has_delta_networks(model: nn.Module) -> bool:
    return any(type(module).__name__.endswith("GatedDeltaNet") for module in model.modules())


def _mixes_documents(config: Any, model: nn.Module) -> bool:
    """Whether layers run over a row from token to token, and so from one document of it into the next."""
    if _has_delta_networks(model):
        return False
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    named = any(word in kind for kind in kinds for word in ("linear", "mamba", "conv", "recurrent", "hybrid"))
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    return named or any(isinstance(module, nn.Conv1d) for module in decoder.modules())


def family_of(architecture: str) -> tuple[str, type[HFModelConfig] | None]:
    """Module of `trimtab.models` that has a model class of transformers, and its configuration; ("", None)."""
    for name in module_names():
        module = load_module(name)
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if (
                own
                and issubclass(value, HFModelConfig)
                and getattr(value, "architecture", "") == architecture
            ):
                return name, value
    return "", None


def family_balancing(path: str, sizes: Sizes) -> Balancing:
    """The preset of a model's family; without one, or if it does not fit, no balancing and a warning.

    Args:
        path: the directory.
        sizes: of its model.
    """
    architecture, _ = read_model(path)
    name, _ = family_of(architecture)
    preset = getattr(load_module(name), f"{name}_balancing", None) if name else None
    why = "no module of trimtab.models knows it"
    if preset is not None:
        known: Mapping[str, Any] = {"num_layers": sizes.num_layers}
        parameters = inspect.signature(preset).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty]
        try:
            if not known.keys() >= set(needed):
                raise ValueError(f"it must be told {', '.join(needed)}")
            balancing: Balancing = preset(**{name: known[name] for name in needed})
            balancing.check(
                sizes.num_experts,
                sizes.top_k,
                grouped=sizes.grouped,
                has_bias=sizes.has_expert_bias,
                num_microbatches=1,
            )
            return balancing
        except ValueError as error:
            why = f"the preset {name}_balancing does not fit it: {error}"
    warnings.warn(
        f"experts of {path} ({architecture}) are watched and not balanced: {why}; write a config with "
        "PretrainedModelConfig(balancing=...) to balance them",
        stacklevel=4,
    )
    return Balancing.off()

"""Whether the configuration beside a checkpoint's weights describes the model that is to take them.

Sizes of tensors are left to the tensors themselves. What else is in a configuration changes what the same weights
compute, without any other sign of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

CONFIG = "config.json"

# Of training, of generation, or seen in shapes of tensors alone.
_HARMLESS = frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "pretraining_tp",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "model_type",
    }
)
# Settings that others replace or switch off: by name, what must hold of a configuration for them to count.
_COUNTS = {
    "sliding_window": lambda c: "sliding_attention" in c.get("layer_types", ("sliding_attention",)),
    "attention_chunk_size": lambda c: "chunked_attention" in c.get("layer_types", ("chunked_attention",)),
    "n_group": lambda c: c.get("topk_method") != "greedy",
    "topk_group": lambda c: c.get("topk_method") != "greedy",
    "floor_scale": lambda c: bool(c.get("attn_temperature_tuning")),
    "attn_scale": lambda c: bool(c.get("attn_temperature_tuning")),
    # The layers that follow from them are listed.
    "interleave_moe_layer_step": lambda c: c.get("moe_layers") is None,
    "no_rope_layer_interval": lambda c: c.get("no_rope_layers") is None,
    # Rotary angles that depend on it without saying at which length they were trained.
    "max_position_embeddings": lambda c: any(
        rope.get("rope_type", "default") != "default" and "original_max_position_embeddings" not in rope
        for rope in _ropes(c.get("rope_parameters"))
    ),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in a directory, as it stands there.

    Raises:
        ValueError: there is none.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"has no readable {CONFIG}, which says how its weights are to be used; put it there"
        ) from error
    except ValueError as error:
        raise ValueError(f"{CONFIG} is not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} holds no settings; copy it again")
    return found


def as_config_of(own: Any, architecture: str, found: Mapping[str, Any]) -> Any:
    """A directory's configuration as transformers' class for the model has it.

    Args:
        own: configuration of the model.
        architecture: name of the model's class.
        found: from `read_config`.

    Raises:
        ValueError: it is of another family, or transformers refuses it.
    """
    settings = dict(found)
    text = found.get("text_config")
    if found.get("model_type") != own.model_type and architecture not in (found.get("architectures") or ()):
        if not isinstance(text, dict) or text.get("model_type") != own.model_type:
            raise ValueError(
                f"it holds a model of type {found.get('model_type')!r} {found.get('architectures') or ''}, and "
                f"this one is of type {own.model_type!r} [{architecture!r}]; give a checkpoint of this family, or "
                "train with the module of that one"
            )
        settings = dict(text)
        if "tie_word_embeddings" in found:
            settings["tie_word_embeddings"] = found["tie_word_embeddings"]
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config"):
        settings.pop(name, None)
    try:
        return type(own).from_dict(settings)
    except Exception as error:  # transformers validates with several classes
        raise ValueError(
            f"{CONFIG} cannot be read as {type(own).__name__} ({type(error).__name__}: {error})"
        ) from error


def config_differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """Settings that change what the same weights compute and differ, as ``name (... there, ... here)``.

    Args:
        there: configuration of the checkpoint.
        here: that of the model, of the same class.
        prefix: of the names.
    """
    first, second = _settings(there), _settings(here)
    changed = []
    for name in sorted(_names(here)):
        if name in _HARMLESS or name.startswith("mtp_"):
            continue
        counts = _COUNTS.get(name)
        if counts is not None and not counts(first) and not counts(second):
            continue
        old, new = getattr(there, name, None), getattr(here, name, None)
        if hasattr(new, "model_type"):
            changed += config_differences(old, new, f"{prefix}{name}.") if old is not None else []
            continue
        for key, before, after in _unequal(f"{prefix}{name}", _plain(old), _plain(new)):
            changed.append(f"{key} ({_shown(before)} there, {_shown(after)} here)")
    return changed


def _names(config: Any) -> set[str]:
    """Settings that the class declares, and those that this configuration has besides."""
    from transformers import PreTrainedConfig

    base = {field.name for field in fields(PreTrainedConfig)}
    own = {name for name in vars(config) if not name.startswith("_")}
    return ({field.name for field in fields(config)} | own) - base - vars(PreTrainedConfig()).keys()


def _settings(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in _names(config)}


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """Rotary parameters: one dictionary, or one for each type of layer."""
    if isinstance(parameters, dict):
        nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
        yield from nested or [parameters]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        # The older name of the same, which transformers keeps beside it.
        dropped = "type" if "rope_type" in value else None
        return {key: _plain(entry) for key, entry in value.items() if key != dropped}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _unequal(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _unequal(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
